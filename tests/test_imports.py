"""Which package may import which. Every exception edits this file."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ssl_xcit"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__"
}
SCRIPTS = [ROOT / "main_dino.py", *(ROOT / "eval").glob("*.py"), *(ROOT / "launch").glob("*.py")]

# A package imports from itself and from rows above its own.
ROWS = [
    {"runtime"},
    {"operators"},
    {"models"},
    {"data"},
    {"checkpoints"},
    {"training"},
    {"evaluation"},
    {"dino", "finetune"},
    {"report"},
    {"slurm"},
    {"demo", "doctor", "api"},
    {"__main__"},
]
ROW = {package: number for number, row in enumerate(ROWS) for package in row}

# These libraries have owners; nobody else imports them.
OWNERS = {
    "yaml": {"runtime.options"},
    "submitit": {"slurm.submit"},
    "torchvision": {"data.sources", "data.datasets", "finetune.augment"}
    | {"finetune.distillation"},
    "numba": {"data.kernels", "data.loader", "data.batches"},
    "llvmlite": {"data.kernels"},
    "ffcv": {"data.kernels"},
    "onnxruntime": {"checkpoints.convert"},
    "wandb": {"training.sinks"},
    "timm": set(),  # the tests' oracle
    "sklearn": set(),
}
# Usable in a notebook, testable in a line: plain arguments, no configuration.
PLAIN = {"operators", "models"}
PLAIN_MODULES = {"dino.head", "dino.loss", "dino.teacher", "dino.health", "data.views"}
PLAIN_MODULES |= {"data.kernels", "runtime.draws", "training.optim", "training.schedules"}
PLAIN_MODULES |= {"training.metrics", "evaluation.accuracy", "evaluation.linear_classifiers"}
PLAIN_MODULES |= {"evaluation.linear_file"}
PLAIN_MODULES |= {"finetune.augment", "finetune.average"}
PLAIN_MODULES |= {"finetune.distillation"}
# Imported by every --help, so nothing heavy.
LIGHT = {"runtime.errors", "runtime.processor", "runtime.options", "runtime.config"}
LIGHT |= {"runtime.files", "runtime.sealed", "runtime.provenance", "data.views"}
LIGHT |= {
    "training.config",
    "training.verdict",
    "dino.config",
    "finetune.config",
}
LIGHT |= {"evaluation.config", "report.config", "slurm.config", "slurm.command"}
LIGHT |= {"slurm.evaluations", "models.variants", "checkpoints.zoo", "dino.verdict", "__main__"}
# Not in requirements.txt: who wants to export or to log there installs them, and is told to.
OPTIONAL = {"onnxruntime", "wandb"}
DISTRIBUTION = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "PyYAML"}


def imports(source: str) -> tuple[set[str], set[str]]:
    """(dotted modules of ssl_xcit, other top-level packages) that `source` imports.

    A string "package.module:function" stands for an import, too.
    """
    ours, others = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = re.fullmatch(r"(?:ssl_xcit\.)?([a-z_]+(?:\.[a-z_]+)*):\w+", node.value)
            dotted = [f"ssl_xcit.{found[1]}"] if found and found[1] in MODULES else []
        else:
            continue
        for name in dotted:
            top, _, rest = name.partition(".")
            if top == "ssl_xcit":
                ours.add(module_of(rest))
            else:
                others.add(top)
    return ours, others


def module_of(name: str) -> str:
    """The module that "package.module.attribute" lies in; the name itself if there is none."""
    parts = name.split(".")
    candidates = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in candidates if name in MODULES), name)


def strings(source: str) -> set[str]:
    """What is imported by a string alone, when it is needed."""
    plain = re.sub(r"\"[\w.]+:\w+\"", '""', source)
    return imports(source)[0] - imports(plain)[0]


def violations(module: str, source: str) -> list[str]:
    """What `source` imports against the rules for `module`."""
    ours, others = imports(source)
    others -= sys.stdlib_module_names
    requirements = (ROOT / "requirements.txt").read_text()
    package = module.partition(".")[0]
    light = {"yaml"}

    def allowed(name: str) -> bool:
        other = name.partition(".")[0]
        return name in MODULES and (other == package or ROW[other] < ROW[package])

    is_plain = package in PLAIN or module in PLAIN_MODULES
    configuration = {name for name in ours if name.endswith((".config", ".options"))}
    heavy = {name for name in ours - strings(source) if name not in LIGHT}
    return [
        *(f"row: {name}" for name in ours if not allowed(name)),
        *(f"owner: {name}" for name in others if module not in OWNERS.get(name, {module})),
        *(f"plain: {name}" for name in configuration if is_plain),
        *(f"light: {name}" for name in (others - light) | heavy if module in LIGHT),
        *(
            f"requirements.txt: {name}"
            for name in others - OPTIONAL
            if not re.search(rf"(?mi)^{DISTRIBUTION.get(name, name)}==", requirements)
        ),
    ]


def test_every_package_has_a_row_and_every_row_its_packages():
    assert {name.partition(".")[0] for name in MODULES} == set(ROW)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_it_may(module):
    assert violations(module, MODULES[module].read_text()) == []


def test_no_module_imports_itself_by_way_of_others():
    edges = {name: imports(path.read_text())[0] for name, path in MODULES.items()}
    while edges:
        free = [name for name, found in edges.items() if not (found & edges.keys()) - {name}]
        assert free, f"a circle among {sorted(edges)}"
        for name in free:
            del edges[name]


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("models.xcit", "from ssl_xcit.dino import loss", ["row: dino.loss"]),
        ("models.xcit", "from ssl_xcit.dino.loss import DINOLoss", ["row: dino.loss"]),
        ("models.xcit", "import ssl_xcit.training.optim", ["row: training.optim"]),
        ("models.xcit", "def f():\n    from ssl_xcit.data import beton", ["row: data.beton"]),
        ("dino.train", "from ssl_xcit.finetune import train", ["row: finetune.train"]),
        ("data.loader", "name = 'dino.train:train'", ["row: dino.train"]),
        ("data.loader", "name = 'ssl_xcit.dino.train:train'", ["row: dino.train"]),
        ("checkpoints.read", "def f():\n    import onnxruntime", ["owner: onnxruntime"]),
        ("dino.head", "from ssl_xcit.dino.config import Head", ["plain: dino.config"]),
        ("dino.train", "import submitit.helpers", ["owner: submitit"]),
        ("dino.train", "from yaml import safe_load", ["owner: yaml"]),
        ("models.xcit", "import timm", ["owner: timm", "requirements.txt: timm"]),
        ("dino.train", "import main_dino", ["requirements.txt: main_dino"]),
        ("dino.train", "import eval.knn", ["requirements.txt: eval"]),
        ("runtime.options", "import numpy", ["light: numpy"]),
        ("dino.config", "from ssl_xcit.training import schedules", ["light: training.schedules"]),
        ("dino.train", "from ssl_xcit.dino.unknown import f", ["row: dino.unknown.f"]),
        ("dino.train", "import os, torch\nfrom ssl_xcit.models import xcit", []),
    ],
)
def test_the_rules_would_notice(module, source, found):
    assert violations(module, source) == found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_thin_and_shadows_no_package(script):
    ours, others = imports(script.read_text())
    assert ours - strings(script.read_text()) <= LIGHT
    assert others <= sys.stdlib_module_names
    assert not any(isinstance(n, ast.If | ast.For) for n in ast.parse(script.read_text()).body[:-1])
    if script.parent != ROOT:  # python eval/x.py puts eval/ first on the path
        assert not (script.parent / "__init__.py").exists()
        assert importlib.util.find_spec(script.stem) is None
