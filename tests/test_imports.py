"""Who may import whom. A new module needs a row here; every exception edits this file."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {path.stem: path for path in (ROOT / "ssl_xcit").glob("*.py") if path.stem != "__init__"}
SCRIPTS = [ROOT / "main_dino.py", *(ROOT / "eval").glob("*.py"), *(ROOT / "launch").glob("*.py")]

# A module imports only from rows above its own, so there are no cycles.
ROWS = [
    ["errors", "processor", "neighbours"],
    ["options", "schedules", "distributed", "draws", "products", "model_zoo", "signals", "tokens"],
    ["charts", "report_style", "prototypes", "xca", "lpi", "drop_path"],
    ["config", "precision", "sync_batchnorm", "guard", "watch", "report_curves", "chunked_loss"],
    ["finetune_config", "supervised_config", "visualize_config", "plan", "submission", "verdict"],
    ["eval_config", "metrics", "xcit", "augment", "optim", "kernels", "images", "diagnostics"],
    ["formats", "sinks"],
    ["weights"],
    ["checkpoint", "dino", "beton"],
    ["networks"],
    ["convert"],
    ["loader", "features", "flops", "training_memory"],
    ["knn", "training_cost", "run_folder", "preview", "evaluation_data", "subject"],
    ["class_order", "supervised_tables", "results", "feature_cache", "linear", "classifier"],
    ["knn_evaluation", "linear_protocols", "visualize"],
    ["probe", "linear_evaluation", "report_pictures"],
    ["report_page"],
    ["task", "tensor_augment", "mixing", "weight_average", "starting_point"],
    ["run_log", "supervised", "distillation", "finetune_batch", "init_from"],
    ["saving"],
    ["engine"],
    ["train", "finetune"],
    ["replay", "job"],
    ["job_folder"],
    ["slurm", "demo", "runs"],
    ["report"],
]
ROW = {module: number for number, row in enumerate(ROWS) for module in row}

# (module, what it imports although that row is not above its own), inside of a function only: the
# command `beton preview` draws what the loader, which is built on beton, makes of a file, and the
# commands `checkpoint convert` and `info` are built on what checkpoint reads.
LAZY = {("beton", "preview"), ("checkpoint", "convert")}

# These packages have owners; nobody else imports them.
OWNERS = {
    "jsonargparse": {"options"},
    "yaml": {"options"},
    "submitit": {"slurm"},
    "torchvision": {"images", "evaluation_data", "mixing", "tensor_augment", "distillation"},
    "numba": {"kernels", "loader"},
    "llvmlite": {"kernels"},
    "ffcv": {"kernels"},
    "onnxruntime": {"convert"},
    "wandb": {"sinks"},
    "timm": set(),  # the tests' oracle
    "sklearn": set(),
}
# Usable in a notebook, testable in a line: plain arguments, no configuration.
PLAIN = {"xcit", "dino", "augment", "optim", "schedules", "kernels", "draws", "metrics"}
PLAIN |= {"linear", "classifier", "diagnostics", "prototypes", "chunked_loss", "products"}
PLAIN |= {"tokens", "xca", "lpi", "drop_path"}
PLAIN |= {"mixing", "tensor_augment", "weight_average", "distillation"}
CONFIGURATION = {"config", "eval_config", "finetune_config", "options"}
# Imported by every --help, so nothing heavy.
LIGHT = {"errors", "processor", "options", "config", "eval_config", "finetune_config"}
LIGHT |= {"model_zoo", "supervised_config", "visualize_config", "plan", "submission", "verdict"}
# Not in requirements.txt: who wants to export or to log there installs them, and is told to.
OPTIONAL = {"onnxruntime", "wandb"}
PACKAGE_OF = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "PyYAML"}


def imports(source: str, everywhere: bool = True) -> tuple[set[str], set[str]]:
    """(modules of ssl_xcit, other top-level packages) that `source` imports.

    Without `everywhere` the bodies of functions at the module's top level are left out.
    """
    ours, others = set(), set()
    tree = ast.parse(source)
    if not everywhere:
        tree.body = [node for node in tree.body if not isinstance(node, ast.FunctionDef)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        else:
            continue
        for top, *rest in (name.split(".") for name in dotted):
            if top == "ssl_xcit":
                ours.add(rest[0] if rest else "")
            else:
                others.add(top)
    return ours, others


def violations(module: str, source: str) -> list[str]:
    """What `source` imports against the rules for `module`."""
    ours, others = imports(source)
    others -= sys.stdlib_module_names
    requirements = (ROOT / "requirements.txt").read_text()
    light = {"jsonargparse", "yaml"}
    at_once, _ = imports(source, everywhere=False)
    bound = {name for name in ours if name in at_once or (module, name) not in LAZY}
    return [
        *(f"row: {name}" for name in bound if ROW.get(name, 99) >= ROW[module]),
        *(f"owner: {name}" for name in others if module not in OWNERS.get(name, {module})),
        *(f"plain: {name}" for name in ours & CONFIGURATION if module in PLAIN),
        *(f"light: {name}" for name in (others - light) | (ours - LIGHT) if module in LIGHT),
        *(
            f"requirements.txt: {name}"
            for name in others - OPTIONAL
            if not re.search(rf"(?mi)^{PACKAGE_OF.get(name, name)}==", requirements)
        ),
    ]


def test_every_module_has_a_row_and_every_row_its_modules():
    assert sum(map(len, ROWS)) == len(ROW)
    assert set(MODULES) == set(ROW)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_it_may(module):
    assert violations(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("xcit", "from ssl_xcit import dino", ["row: dino"]),
        ("xcit", "from ssl_xcit.dino import DINOLoss", ["row: dino"]),
        ("xcit", "import ssl_xcit.optim", ["row: optim"]),
        ("xcit", "def f():\n    from ssl_xcit.train import train", ["row: train"]),
        ("beton", "def f():\n    from ssl_xcit.preview import write_preview", []),
        ("beton", "from ssl_xcit.preview import write_preview", ["row: preview"]),
        ("beton", "if True:\n    import ssl_xcit.preview", ["row: preview"]),
        ("images", "def f():\n    from ssl_xcit.preview import write_preview", ["row: preview"]),
        ("checkpoint", "from ssl_xcit.convert import main", ["row: convert"]),
        ("weights", "def f():\n    import onnxruntime", ["owner: onnxruntime"]),
        ("dino", "from ssl_xcit.config import Head", ["plain: config"]),
        ("train", "import submitit.helpers", ["owner: submitit"]),
        ("train", "from yaml import safe_load", ["owner: yaml"]),
        ("xcit", "import timm", ["owner: timm", "requirements.txt: timm"]),
        ("train", "import main_dino", ["requirements.txt: main_dino"]),
        ("train", "import eval.knn", ["requirements.txt: eval"]),
        ("options", "import numpy", ["light: numpy"]),
        ("config", "from ssl_xcit import schedules", ["light: schedules"]),
        ("train", "from ssl_xcit.unknown import f", ["row: unknown"]),
        ("train", "import os, torch\nfrom ssl_xcit import xcit", []),
    ],
)
def test_the_rules_would_notice(module, source, found):
    assert violations(module, source) == found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_thin_and_shadows_no_package(script):
    ours, others = imports(script.read_text())
    assert "config" in ours
    assert ours <= LIGHT
    assert others <= sys.stdlib_module_names
    assert not any(isinstance(n, ast.If | ast.For) for n in ast.parse(script.read_text()).body[:-1])
    if script.parent != ROOT:  # python eval/x.py puts eval/ first on the path
        assert not (script.parent / "__init__.py").exists()
        assert importlib.util.find_spec(script.stem) is None
