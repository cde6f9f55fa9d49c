"""The wheel: what it holds, and that it works where there is no checkout.

It is built from a copy of the checkout and unpacked into a folder of its own. The commands run in
another folder, and fail if they open a file of the checkout, or load FFCV or OpenCV. The libraries
are those of the tests.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import photo_tiles
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ssl_xcit.__main__ import main
from ssl_xcit.data.writer import write_beton

ROOT = Path(__file__).parents[1]
SOURCES = ("ssl_xcit", "configs", "pyproject.toml", "README.md", "LICENSE")

# Python imports this module when it starts.
GUARD = """
import atexit
import os
import sys

def forbid(event, arguments):
    if event == "open" and str(arguments[0]).startswith({forbidden!r}):
        raise AssertionError(f"opens {{arguments[0]}} of the checkout")

def check():
    with open("/proc/self/maps") as file:
        libraries = {{word for line in file for word in line.split() if ".so" in word}}
    loaded = [word for word in libraries if "ffcv" in word or "opencv" in word]
    if loaded:
        print("loads", *loaded, file=sys.stderr, flush=True)
        os._exit(3)

sys.addaudithook(forbid)
atexit.register(check)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "source" / name)
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source"))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """A folder with what the wheel installs, and the guard. It lies in somebody's repository."""
    folder = tmp_path_factory.mktemp("site")
    author = ["-c", "user.name=a", "-c", "user.email=a@localhost"]
    for words in (["init"], [*author, "commit", "--allow-empty", "--message", "theirs"]):
        subprocess.run(["git", *words, "--quiet"], cwd=folder, check=True)
    pip("install", "--target", str(folder), str(wheel))
    forbidden = tuple(str(ROOT / name) for name in ("ssl_xcit", "configs", "eval", "main_dino.py"))
    (folder / "sitecustomize.py").write_text(GUARD.format(forbidden=forbidden))
    return folder


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    """A working directory with train.beton: 40 photographs of two classes, as JPEGs."""
    folder = tmp_path_factory.mktemp("elsewhere")
    write_beton(photo_tiles(folder / "tiles", 20), folder / "train.beton", progress=False)
    return folder


def pip(command: str, *words: str) -> None:
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", command, *options, *words], check=True)


def python(site: Path, cwd: Path, *words: str) -> str:
    """What Python prints with the wheel's contents first on its path."""
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def command(site: Path, cwd: Path, *words: str) -> str:
    """What the installed `ssl-xcit WORDS` prints."""
    return python(site, cwd, str(site / "bin/ssl-xcit"), *words)


def test_the_wheel_holds_every_module_and_every_recipe_and_nothing_else(wheel):
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "ssl_xcit").rglob("*.py")}
    recipes = {f"ssl_xcit/{p.relative_to(ROOT)}" for p in (ROOT / "configs").rglob("*.*")}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == modules | recipes
    assert "ssl_xcit/configs/pretrain/xcit_nano_12_p8.yaml" in held


def test_the_guard_notices_a_file_of_the_checkout_and_ffcv(site, elsewhere):
    with pytest.raises(AssertionError, match=r"opens .*demo\.yaml of the checkout"):
        python(site, elsewhere, "-c", f"open({str(ROOT / 'configs/demo.yaml')!r})")
    code = "import ctypes, ssl_xcit.data.turbojpeg as t; t.NAMES = ()\n"
    with pytest.raises(AssertionError, match=r"loads .*_libffcv"):
        python(site, elsewhere, "-c", code + "t.load_turbojpeg(ctypes.CDLL)")


def test_what_is_imported_is_the_wheels(site, elsewhere):
    code = "import ssl_xcit.dino.train, ssl_xcit.runtime.config as c, ssl_xcit as s\n"
    code += "import ssl_xcit.checkpoints.zoo as z\n"
    code += "print(s.__file__, c.CONFIGS, s.load.__module__, len(z.zoo()))"
    package = site / "ssl_xcit"
    expected = f"{package / '__init__.py'} {package / 'configs'} ssl_xcit.api 42\n"
    assert python(site, elsewhere, "-c", code) == expected


@pytest.mark.parametrize(
    ("words", "promised"),
    [
        ("--help", "usage: ssl-xcit COMMAND"),
        ("demo --help", "usage: ssl-xcit demo"),
        ("plan --arch xcit_nano_12_p8 --batch_size_per_gpu 1", "at the peak"),
        ("submit --arch xcit_nano_12_p8 --dry-run", "#SBATCH --signal"),
        ("submit --arch xcit_nano_12_p8 --dry-run", "warmup_teacher_temp_epochs: 30"),  # recipe
    ],
)
def test_a_command_works_outside_of_the_checkout(site, elsewhere, words, promised):
    assert promised in command(site, elsewhere, *words.split())


def test_a_run_of_20_steps_and_its_evaluation_by_a_job(site, elsewhere):
    """With libturbojpeg alone. The cluster is "debug": its jobs run in the submitting process."""
    small = "--global_crops_size 32 --local_crops_size 16 --local_crops_number 1 --out_dim 64"
    small += " --batch_size_per_gpu 2 --epochs 1 --device cpu --log_every 1"
    words = f"pretrain --arch xcit_nano_12_p16 --data train.beton --out run {small}".split()
    command(site, elsewhere, *words)
    rows = (elsewhere / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(20))
    assert json.loads((elsewhere / "run/environment.json").read_text())["commit"] is None
    images = "--train train.beton --test train.beton --resize 32 --crop 32 --device cpu --k 1"
    job = f"submit eval knn --checkpoint run {images} --cluster debug"
    command(site, elsewhere, *job.split())
    (accuracy,) = json.loads((elsewhere / "run/eval/knn.json").read_text())["accuracy"]
    assert accuracy["top1"] == 100  # each image is its own neighbour


def test_the_copy_for_a_job_is_the_package_with_its_recipes_alone(site, elsewhere):
    (site / "eval").mkdir(exist_ok=True)  # of another distribution
    code = "from pathlib import Path; from ssl_xcit.slurm.folder import freeze; freeze(Path('c'))"
    python(site, elsewhere, "-c", code)
    copy = elsewhere / "c"
    assert {path.name for path in copy.iterdir()} == {"ssl_xcit", "COMMIT"}
    assert (copy / "COMMIT").read_text() == "\n"
    where = "import ssl_xcit.runtime.config as c; print(c.CONFIGS, c.CONFIGS.is_dir())"
    assert python(copy, elsewhere, "-c", where) == f"{copy / 'ssl_xcit/configs'} True\n"


def test_without_submitit_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.delitem(sys.modules, "ssl_xcit.slurm.submit", raising=False)
    for words in ("--arch xcit_nano_12_p8 --dry-run", "eval knn --pixels --train a --test b"):
        with pytest.raises(SystemExit) as stopped:
            main(["submit", *words.split()])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert error == "error: SLURM needs submitit: pip install 'ssl_xcit[slurm]'\n"


# What it depends on

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED = {
    canonicalize_name(requirement.name): requirement
    for texts in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for text in texts
    if (requirement := Requirement(text)).name != PROJECT["name"]
}
UNDECLARED = {"setuptools"}  # torch asks for it


def pins() -> dict[str, str]:
    """Name -> version, "" without one, of both files of requirements."""
    lines = [
        line
        for name in ("requirements.txt", "requirements-dev.txt")
        for line in (ROOT / name).read_text().splitlines()
        if not line.startswith("-")
    ]
    found = (line.partition("==") for line in lines)
    return {str(canonicalize_name(name)): version for name, _, version in found}


def test_every_pin_is_in_the_range_that_the_wheel_declares():
    pinned = pins()
    assert pinned.keys() - UNDECLARED == DECLARED.keys()
    for name, requirement in DECLARED.items():
        assert requirement.specifier.contains(pinned[name]), name


def test_the_oldest_versions_are_those_that_the_wheel_declares(tmp_path):
    """scripts/oldest.sh installs them: each in place of its pin."""
    script = (ROOT / "scripts/oldest.sh").read_text()
    program = re.search(r"<<'EOF' .*?\n(.*?)\nEOF\n", script, re.DOTALL)[1]
    printed = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True)
    lines = printed.splitlines()
    for text in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["slurm"]):
        requirement = Requirement(text)
        (least,) = (s.version for s in requirement.specifier if s.operator == ">=")
        assert f"{requirement.name}=={least}.*" in lines
    assert "-e ." in lines
    assert f"pytest=={pins()['pytest']}" in lines
    assert not [line for line in lines if line.startswith(f"torch=={torch.__version__[:4]}")]
