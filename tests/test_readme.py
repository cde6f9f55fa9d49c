"""README.md keeps its word: each of its commands is taken from it and run, and what it says of
their output, of files and of options is looked up.

The commands run in a folder that holds the photographs where the README says images are. Options
that make the training tiny are added; nothing else is changed. The long tests leave every command
to a shell, whose `python`, `torchrun` and `sleep` are shims that add them. The others do so for a
block of several commands alone: a command by itself is read here, and its processes are forked.
"""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from conftest import photo_tiles

from ssl_xcit import demo
from ssl_xcit.__main__ import COMMANDS
from ssl_xcit.dino import verdict
from ssl_xcit.dino.config import PlanConfig, TrainConfig
from ssl_xcit.evaluation.config import KnnConfig, LinearConfig, SupervisedConfig
from ssl_xcit.finetune.config import FinetuneConfig
from ssl_xcit.report.config import VisualizeConfig
from ssl_xcit.runtime import options
from ssl_xcit.slurm.config import SubmitConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
PROGRAMS = """bash cat cd cp export git kill make mkdir mv pip python python3 rm sbatch scancel
    scontrol sed sleep srun squeue ssl-xcit sudo tail tensorboard torchrun wandb watch""".split()  # noqa: SIM905

# Commands that are not run here -> the file that runs them, and how it says so
ELSEWHERE = {
    "make demo": ("tests/test_demo.py", "demo.demo("),
    "make test": (".ci/run", "make test"),
    "python launch/submit.py --arch xcit_small_12_p8 --nodes 8": (
        "tests/test_slurm_cluster.py",
        "launch/submit.py",
    ),
    "python launch/submit.py eval knn --checkpoint RUN --train A --test B": (
        "tests/test_slurm.py",
        '"eval", "knn"',
    ),
    "tail -F RUN/slurm/JOB_0_log.out": ("tests/test_slurm_cluster.py", "_0_log.out"),
    "scancel JOB": ("tests/test_slurm_cluster.py", "scancel"),
}
TINY = """
crops: {global_crops_size: 32, local_crops_number: 1, local_crops_size: 16}
head: {out_dim: 64, head_hidden_dim: 32, head_bottleneck_dim: 16}
loss: {momentum_teacher: 0.9, teacher_temp: 0.04, warmup_teacher_temp_epochs: 0}
optim: {epochs: 4, warmup_epochs: 1, batch_size_per_gpu: 12}
run: {device: cpu, precision: fp32, num_workers: 1, log_every: 1}
"""
SIZE = "--resize 32 --crop 32 --device cpu --num_workers 1"
# What the shim adds to a script's options. The last of a repeated option counts.
ADDED = {
    "main_dino.py": "--config tiny.yaml --arch xcit_nano_12_p16",
    "eval/knn.py": SIZE,
    "eval/linear.py": f"{SIZE} --mode fast --features cls --l2 0.1 0.01",
    "eval/finetune.py": "--image_size 32 --epochs 1 --batch_size_per_gpu 12 --device cpu "
    "--precision fp32 --num_workers 1 --log_every 1",
    "eval/visualize.py": "--size 64 --limit 2 --device cpu",
}
# How a command begins -> words that it must print
PROMISES = {
    "ssl-xcit data write": ("48",),
    "python main_dino.py --arch": ("verdict: ", "saved runs/a/checkpoints/step_"),
    "python eval/knn.py": ("top-1 %",),
    "python eval/linear.py": ("top-1 %",),
    "python eval/finetune.py": ("top-1",),
    "python eval/visualize.py": (".png",),
    "ssl-xcit checkpoint convert": ("timm", "sha256"),
    "ssl-xcit report": ("runs/a/report.html",),
    "ssl-xcit verdict": ("verdict: ",),
    "ssl-xcit runs": ("a_ft", "verdict", "finished"),
    "ssl-xcit plan": ("at the peak", "GPU hours"),
    "python launch/submit.py": ("#!/bin/bash", "#SBATCH --nodes=8"),
    "torchrun": ("x 2",),
    "python main_dino.py --config configs/demo.yaml": ("resuming runs/k/checkpoints/step_",),
}
LOG_LINE = re.compile(
    r"epoch \d+/\d+  step \d+/\d+  loss \d+\.\d{4}  lr \d\.\d\de[-+]\d\d  \d+ images/s  "
    r"data wait \d+ %  ETA \d+:\d\d:\d\d(  top1_\w+ \d+\.\d\d)*(  evaluation [\d.]+ % of the time)?"
)


def blocks(text: str) -> list[str]:
    """The indented and fenced blocks, without their indentation and fences."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"(?:^\n|\A)((?:^(?: {4,}.*)?\n)+)", text, re.MULTILINE)
    indented = ["\n".join(line.strip() for line in block.splitlines()) for block in found]
    return [block for block in (*indented, *fenced) if block.strip()]


def commands(block: str) -> list[str]:
    """A block's commands, continued lines joined, comments dropped; none if it is no such block."""
    lines = re.sub(r"\s*\\\n\s*", " ", block).splitlines()
    lines = [re.sub(r"\s{2,}#.*", "", line).strip() for line in lines]
    return [line for line in lines if line.split()[:1] and line.split()[0] in PROGRAMS]


def units(text: str) -> list[str]:
    """What is run at once: a command, or a block whose commands are about each other."""
    found = []
    for block in blocks(text):
        lines = commands(block)
        found += ["\n".join(lines)] if "$!" in block else lines
    return found


def our_command(line: str) -> str:
    """The command of "ssl-xcit COMMAND ..."; "" for another program."""
    program, *words = line.split()
    names = [" ".join(words[:count]) for count in (1, 2)] if program == "ssl-xcit" else []
    return next((name for name in names if name in COMMANDS), "")


HERE = [unit for unit in units(README) if unit not in ELSEWHERE]


def shim(path: Path, body: str) -> None:
    """An executable."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.fixture(scope="module", params=["forked", pytest.param("shell", marks=pytest.mark.long)])
def way(request) -> str:
    """How commands are run."""
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photos, way) -> Path:
    """A checkout with images where the README has them, and a PATH of shims in bin/."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("main_dino.py", "ssl_xcit", "eval", "launch", "configs"):
        (folder / name).symlink_to(ROOT / name)
    photo_tiles(folder / "path/to/images", 24)
    photo_tiles(folder / "path/to/test_images", 5)
    (folder / "runs/demo").mkdir(parents=True)
    shutil.copy(photos, folder / "runs/demo/fashion_train.beton")
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "bin").mkdir()
    cases = "\n".join(f'{n}) exec {sys.executable} "$@" {more};;' for n, more in ADDED.items())
    shim(folder / "bin/python", f'case "$1" in\n{cases}\nesac\nexec {sys.executable} "$@"')
    shim(folder / "bin/ssl-xcit", f'exec {sys.executable} -m ssl_xcit "$@"')
    ranks = f"exec {sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2"
    known = 'test "$1" = --nproc-per-node && shift 2 || exit 9'
    shim(folder / "bin/torchrun", f'{known}\n{ranks} "$@" {ADDED["main_dino.py"]} --epochs 1')
    saved = "ls runs/k/checkpoints/step_*/manifest.json > /dev/null 2>&1"
    shim(
        folder / "bin/sleep",
        f"for i in $(seq 1800); do {saved} && exit; /bin/sleep 0.05; done; exit 1",
    )
    return folder


def run_in_shell(unit: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "-e", "-c", unit], **options)


def run_forked(unit: str, **options) -> subprocess.CompletedProcess:
    """Two processes for torchrun, which the shim gives two, too."""
    program, *words = shlex.split(unit)
    if program == "torchrun":
        assert words[0] == "--nproc-per-node"
        more = shlex.split(f"{ADDED['main_dino.py']} --epochs 1")
        ranks = {name: options[name] for name in ("cwd", "env", "timeout")}
        printed = forked.run_ranks(2, [sys.executable, *words[2:], *more], **ranks)
        return subprocess.CompletedProcess(unit, 0, "".join(printed))
    if program == "ssl-xcit":
        words = ["-m", "ssl_xcit", *words]
    else:
        assert program == "python"
    more = shlex.split(ADDED.get(words[0], ""))
    return forked.run([sys.executable, *words, *more], **options)


@pytest.fixture(scope="module")
def done(folder, way) -> dict[str, subprocess.CompletedProcess]:
    """What became of every command, run in the README's order until one fails."""
    found = {}
    for unit in HERE:
        run = run_forked if way == "forked" and "\n" not in unit else run_in_shell
        found[unit] = run(
            unit,
            cwd=folder,
            env={"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        if found[unit].returncode:
            break
    return found


@pytest.mark.parametrize("unit", HERE)
def test_a_command_of_the_readme_does_what_it_says(done, unit):
    assert unit in done, f"not run, because this failed: {list(done)[-1]}"
    assert done[unit].returncode == 0, done[unit].stdout
    last = unit.splitlines()[-1]
    words = [PROMISES[start] for start in PROMISES if last.startswith(start)]
    assert len(words) == 1, f"what does {last} promise?"
    assert [word for word in words[0] if word not in done[unit].stdout] == [], done[unit].stdout


@pytest.mark.parametrize("command", ELSEWHERE)
def test_a_command_that_is_not_run_here_is_run_elsewhere(command):
    file, words = ELSEWHERE[command]
    assert command in units(README), "no longer in the README"
    assert words in (ROOT / file).read_text()


def test_the_readme_has_the_commands_that_it_is_about():
    words = " ".join(units(README)).split()
    scripts = {word for word in words if word.endswith(".py")}
    assert {f"eval/{name}.py" for name in ("knn", "linear", "finetune", "visualize")} <= scripts
    assert {"main_dino.py", "launch/submit.py"} <= scripts
    assert {"data write", "report"} <= {our_command(unit) for unit in units(README)}
    assert any("kill -9" in unit for unit in HERE)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_block_with_a_command_holds_nothing_else(path):
    for block in blocks(PAGES[path]):
        lines = re.sub(r"\s*\\\n\s*", " ", block).strip().splitlines()
        assert len(commands(block)) in (0, len(lines)), block


def test_commands_inside_of_sentences_are_about_what_exists():
    for path, text in PAGES.items():
        for command in re.findall(r"`((?:python|ssl-xcit) [^`]+)`", text):
            program, target, *_ = command.split()
            if program == "ssl-xcit":
                known = target == "--help" or our_command(command)
            else:
                known = (ROOT / target).is_file()
            assert known, f"{path.name}: {command}"


def test_the_log_looks_as_the_readme_shows_it(done):
    shown = [line for line in README.splitlines() if line.startswith("    epoch ")]
    assert len(shown) >= 3
    unit = next(unit for unit in HERE if unit.startswith("python main_dino.py --arch"))
    printed = done[unit].stdout
    lines = [line for line in printed.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 16
    assert [line for line in (*map(str.strip, shown), *lines) if not LOG_LINE.fullmatch(line)] == []
    saved = re.compile(r"saved runs/\S+/step_\d{8} \(\d+ MB in \d+\.\d s\)")
    about = re.compile(
        r"xcit_nano_12_p\d+ \(\S+ M parameters\) on .*: \d epochs of \d+ steps, \d+ images"
    )
    assert [
        form for form in (saved, about) if not (form.search(README) and form.search(printed))
    ] == []


def test_the_run_folder_holds_what_the_readme_lists(done, folder):
    tree = next(block for block in blocks(README) if block.startswith("runs/a/\n"))
    names = [line.split()[0] for line in tree.splitlines()[1:] if line.split()]
    assert {"config.yaml", "metrics.jsonl", "checkpoints/", "report.html"} <= set(names)
    assert [name for name in names if not (folder / "runs/a" / name).exists()] == []
    saved = next((folder / "runs/a/checkpoints").glob("step_*"))
    suffixes = {path.suffix for path in saved.iterdir()}
    assert suffixes == {".safetensors", ".json"}


def test_the_strip_names_every_verdict_that_is_none_of_the_early_one():
    table = README[README.index("| verdict |") :].split("\n\n")[0]
    named = {line.split("|")[1].strip() for line in table.splitlines()[2:]}
    known = {value for value in vars(verdict).values() if isinstance(value, str)}
    assert named <= known
    assert named == {
        verdict.HEALTHY,
        verdict.UNIFORM_COLLAPSE,
        verdict.SINGLE_PROTOTYPE,
        verdict.DIVERGING,
        verdict.TEACHER_NOT_MOVING,
    }


def test_the_demo_ends_as_the_readme_shows_it():
    shown = next(block for block in blocks(README) if block.startswith("top-1 in %"))
    table, _, rest = shown.partition("\nverdict: ")
    numbers = [[float(x) for x in re.findall(r"\d+\.\d", line)] for line in table.splitlines()[3:6]]
    labels = ("raw pixels", "untrained network", "pretrained teacher")
    first, last, steps = re.search(r"loss (\S+) -> (\S+) in (\d+) steps", table).groups()
    rows = [{"train/loss": float(first)}, {"train/loss": float(last), "step": int(steps) - 1}]
    expected = demo.table(dict(zip(labels, numbers, strict=True)), rows).split("\n")
    assert [line.split() for line in table.splitlines()] == [
        line.split() for line in expected if line
    ]
    assert rest.startswith("healthy: loss ")
    assert rest.splitlines()[-2:] == [
        "run folder runs/demo/run",
        "report     runs/demo/run/report.html",
    ]


def plan_rows() -> list[list[str]]:
    """The cells of the table of memory and time."""
    lines = README[README.index("| architecture |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def assert_planned(row: list[str], printed: str) -> None:
    """Memory and hours of a row of the table are those that a plan has printed."""
    megabytes = float(re.search(r"at the peak +([\d,.]+) MB", printed)[1].replace(",", ""))
    assert row[5] == f"{megabytes / 1e3:.1f} GB"
    assert f" {row[6]} GPU hours" in printed


def test_the_table_of_memory_and_time_is_the_plans(done):
    first, *others = plan_rows()
    printed = next(done[unit].stdout for unit in HERE if unit.startswith("ssl-xcit plan"))
    assert first[:5] == ["xcit_small_12_p16", "64", "1", "bf16", ""]
    assert_planned(first, printed)
    options = {"crops in turn": "--crops_in_turn", "checkpointing": "--activation_checkpointing"}
    for means, option in options.items():
        row = next(row for row in others if row[4] == means)
        arch, batch, accumulation, precision, *_ = row
        flags = ["--arch", arch, "--batch_size_per_gpu", batch, "--precision", precision]
        flags += ["--accumulation_steps", accumulation, option, "true", "--gpus", "8"]
        command = [sys.executable, "-m", "ssl_xcit", "plan", *flags]
        plan = forked.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        assert_planned(row, plan)


def test_the_readme_is_short_and_its_picture_small():
    assert len(README.splitlines()) <= 200
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert len(pictures) == 1
    assert (ROOT / pictures[0]).read_bytes().startswith(b"\x89PNG")
    assert (ROOT / pictures[0]).stat().st_size < 300_000


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGES[path]) if "://" not in link]
    missing = [link for link in links if not (path.parent / link.partition("#")[0]).exists()]
    assert missing == []
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for file in {path.parent / link.partition("#")[0] for link in links if "#" in link}
        for line in file.read_text().splitlines()
        if line.startswith("#")
    }
    assert [link for link in links if "#" in link and link.partition("#")[2] not in headings] == []


CLASSES = {
    "main_dino.py": TrainConfig,
    "eval/knn.py": KnnConfig,
    "eval/linear.py": LinearConfig,
    "eval/finetune.py": FinetuneConfig,
    "eval/supervised.py": SupervisedConfig,
    "eval/visualize.py": VisualizeConfig,
    "launch/submit.py": SubmitConfig,
    "plan": PlanConfig,
}


def settings(target: str) -> set[str]:
    """The options of a script, a command or a module, spelled with _."""
    common = {"help", "config"}
    if target in CLASSES:
        names = options.leaves(CLASSES[target])
        return common | set(names) | {name.rpartition(".")[2] for name in names}
    file = ROOT / (target if target.endswith(".py") else f"ssl_xcit/{target}.py")
    found = re.findall(r'add_argument\(\s*"--([\w-]+)"', file.read_text())
    return common | {name.replace("-", "_") for name in found}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_option_that_is_named_exists(path):
    others = {command.function for command in COMMANDS.values() if not command.config}
    others = {name.partition(":")[0].replace(".", "/") for name in others} - {"slurm/command"}
    everywhere = set().union(*map(settings, (*CLASSES, *others, "benchmarks/loader.py")))
    everywhere |= {"nproc_per_node", "nnodes", "test_only"}  # of torchrun, of sbatch
    named = re.findall(r"(?<![\w-])--([a-z][\w.-]*\w)", PAGES[path])
    assert [name for name in named if name.replace("-", "_") not in everywhere] == []
    for command in (line for block in blocks(PAGES[path]) for line in commands(block)):
        words = command.split()
        target = next((word for word in words[1:] if word in CLASSES), "")
        if name := our_command(command):
            target = name if name in CLASSES else COMMANDS[name].function.partition(":")[0]
            target = target.replace(".", "/")
        if words[0] in ("python", "ssl-xcit") and "eval" not in words:
            given = [word[2:].replace("-", "_") for word in words if word.startswith("--")]
            assert set(given) <= settings(target), command
