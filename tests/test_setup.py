"""scripts/setup.sh on machines of every kind: stubs play what it calls and keep a record.

And how the tests themselves are started.
"""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import jaxtyping
import pytest
import torch

from ssl_xcit.dino.loss import teacher_probs

ROOT = Path(__file__).parents[1]
SETUP = ROOT / "scripts/setup.sh"
PACKAGES = ["python3-venv", "python3-dev", "g++", "make", "pkg-config"]
PACKAGES += ["libopencv-dev", "libturbojpeg0-dev"]
DATASET = "dataset-fashion-mnist"

# A Python that can only be asked what setup.sh asks.
PYTHON = """#!/bin/sh
case "$1 $2" in
    "- ") exit $(cat {root}/unsuitable 2>/dev/null || echo 0) ;;
    "--version ") echo "Python 3.11.99" ;;
    "-m venv") echo "venv $4" >>{root}/calls; mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip") shift 2; echo "pip $*" >>{root}/calls; [ ! -e {root}/pip_fails ] ;;
esac
"""


class Machine:
    """A checkout and a PATH of stubs."""

    def __init__(self, root: Path) -> None:
        self.root, self.bin, self.checkout = root, root / "bin", root / "checkout"
        for folder in ("bin", "checkout/scripts", "installed"):
            (root / folder).mkdir(parents=True)
        shutil.copy(SETUP, root / "checkout/scripts")
        for name in ("requirements.txt", "requirements-dev.txt", "pyproject.toml"):
            (self.checkout / name).write_text(name)
        for name in ("bash", "sh", "cat", "cp", "dirname", "mkdir", "rm", "sha256sum", "touch"):
            (self.bin / name).symlink_to(shutil.which(name))
        self.stub("id", "echo 0")
        self.stub(
            "dpkg-query", f'eval name=\\$$#; [ -e {root}/installed/"$name" ] && printf installed'
        )
        self.stub(
            "apt-get",
            f"""shift 3; echo "apt-get $*" >>{root}/calls; [ "$1" = update ] && exit 0; shift 3
            for name; do
                [ -e {root}/unavailable-"$name" ] && exit 100; touch {root}/installed/"$name"
            done""",
        )
        self.stub("sudo", f'echo sudo >>{root}/calls; shift; exec "$@"')
        (self.bin / "python3").write_text(PYTHON.format(root=root))
        (self.bin / "python3").chmod(0o755)

    def stub(self, name: str, script: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.bin / name).chmod(0o755)

    def run(self, **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        """The finished setup.sh and what it called."""
        calls = self.root / "calls"
        calls.write_text("")
        done = subprocess.run(
            ["bash", self.checkout / "scripts/setup.sh"],
            env={"PATH": str(self.bin), **environment},
            cwd=self.root,
            capture_output=True,
            text=True,
            check=False,
        )
        return done, calls.read_text().splitlines()


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def install(*packages: str) -> str:
    return f"apt-get install -y --no-install-recommends {' '.join(packages)}"


PIP = "pip install --quiet --disable-pip-version-check --no-compile -r requirements-dev.txt"
INSTALL = ["venv ", PIP]


def test_a_fresh_machine_gets_everything_and_the_second_time_nothing(machine):
    done, calls = machine.run()
    assert done.returncode == 0, done.stderr
    assert calls == ["apt-get update", install(DATASET), install(*PACKAGES), *INSTALL]
    done, calls = machine.run()
    assert (done.returncode, done.stdout, done.stderr, calls) == (0, "", "", [])


def test_only_what_is_missing_is_installed(machine):
    for package in (*PACKAGES[1:], DATASET):
        (machine.root / "installed" / package).touch()
    _, calls = machine.run()
    assert calls == ["apt-get update", install("python3-venv"), *INSTALL]


def test_a_user_installs_with_sudo(machine):
    machine.stub("id", "echo 1000")
    done, calls = machine.run()
    assert done.returncode == 0, done.stderr
    assert calls.count("sudo") == 3
    assert install(*PACKAGES) in calls


def test_without_root_and_sudo_one_line_says_what_to_install(machine):
    machine.stub("id", "echo 1000")
    (machine.bin / "sudo").unlink()
    (machine.root / "installed/make").touch()
    done, calls = machine.run()
    assert (done.returncode, calls) == (2, [])
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: neither root nor sudo here")
    named = done.stderr.partition("apt-get install ")[2].rstrip("'\n").split()
    assert named == [name for name in (*PACKAGES, DATASET) if name != "make"]


@pytest.mark.parametrize("missing", ["dpkg-query", "apt-get"])
def test_what_is_not_debian_must_be_able_to_build(machine, missing):
    (machine.bin / missing).unlink()
    done, calls = machine.run()
    assert (done.returncode, calls) == (2, [])
    assert done.stderr.startswith("error: this is not Debian: install by hand")
    assert done.stderr.count("\n") == 1
    for tool in ("g++", "make", "pkg-config"):
        machine.stub(tool, "exit 0")
    done, calls = machine.run()
    assert (done.returncode, calls) == (0, INSTALL)


def test_the_data_package_may_be_unavailable(machine):
    (machine.root / f"unavailable-{DATASET}").touch()
    done, calls = machine.run()
    assert done.returncode == 0
    assert "torchvision will download" in done.stderr
    assert calls[-3:] == [install(*PACKAGES), *INSTALL]
    done, calls = machine.run()  # and is not asked for again
    assert (done.returncode, done.stderr, calls) == (0, "", [])


def test_a_package_that_cannot_be_installed_is_named(machine):
    (machine.root / "unavailable-libopencv-dev").touch()
    done, calls = machine.run()
    assert done.returncode == 2
    assert "error: apt-get could not install" in done.stderr
    assert INSTALL[1] not in calls


def test_an_interrupted_installation_is_done_again(machine):
    (machine.root / "pip_fails").touch()
    done, _ = machine.run()
    assert done.returncode != 0
    (machine.root / "pip_fails").unlink()
    done, calls = machine.run()
    assert (done.returncode, calls) == (0, INSTALL)
    _, calls = machine.run()
    assert calls == []


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt", "pyproject.toml"])
def test_changed_requirements_are_installed(machine, name):
    machine.run()
    (machine.root / "checkout" / name).write_text("changed")
    assert machine.run()[1] == INSTALL
    assert machine.run()[1] == []
    # A change whose installation fails is not forgotten, even when it is taken back half-way.
    (machine.root / "pip_fails").touch()
    (machine.root / "checkout" / name).write_text("again")
    machine.run()
    (machine.root / "pip_fails").unlink()
    (machine.root / "checkout" / name).write_text("changed")
    assert machine.run()[1] == INSTALL


def test_the_demo_waits_for_no_package_that_only_tests_need(machine, tmp_path):
    assert "REQUIREMENTS=requirements.txt scripts/setup.sh" in would_run(tmp_path, "demo")
    demo = {"REQUIREMENTS": "requirements.txt"}
    assert machine.run(**demo)[1][-1] == INSTALL[1].replace("-dev", "")
    assert machine.run(**demo)[1] == []
    assert machine.run()[1] == INSTALL  # of the tests, into the same environment
    assert machine.run()[1] == machine.run(**demo)[1] == []
    (machine.checkout / "requirements-dev.txt").write_text("changed")
    assert machine.run(**demo)[1] == []
    (machine.checkout / "requirements.txt").write_text("changed")
    assert machine.run(**demo)[1] != []
    assert machine.run()[1] == INSTALL


def test_a_broken_environment_is_repaired(machine):
    machine.run()
    (machine.root / "checkout/.venv/bin/python").unlink()
    assert machine.run()[1] == INSTALL


def test_a_moved_checkout_is_installed_again(machine):
    machine.run()
    machine.checkout = machine.checkout.rename(machine.root / "moved")
    assert machine.run()[1] == INSTALL
    assert machine.run()[1] == []


def test_another_python_starts_from_an_empty_environment(machine):
    machine.run()
    other = machine.root / "python3.12"
    other.write_text((machine.bin / "python3").read_text().replace("3.11.99", "3.12.99"))
    other.chmod(0o755)
    assert machine.run(PYTHON=str(other))[1] == ["venv --clear", INSTALL[1]]
    assert machine.run(PYTHON=str(other))[1] == []


def test_no_suitable_python_is_one_line(machine):
    (machine.root / "unsuitable").write_text("1")
    # Nor may one from outside the stubs do.
    script = machine.root / "checkout/scripts/setup.sh"
    script.write_text(script.read_text().replace("/usr/bin/python3", "python3.11"))
    done, calls = machine.run()
    assert done.returncode == 2
    assert done.stderr.startswith("error: need Python 3.11 or 3.12")
    assert done.stderr.count("\n") == 1
    assert INSTALL[1] not in calls


# The Makefile


def would_run(tmp_path: Path, *arguments: str, cores: int = 2) -> str:
    """What make would run on a machine that says that this process may use so many cores."""
    nproc = tmp_path / "nproc"
    nproc.write_text(f'#!/bin/sh\necho "${{OMP_NUM_THREADS:-{cores}}}"\n')
    nproc.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OMP_NUM_THREADS": "5"}
    environment = {k: v for k, v in environment.items() if k not in ("WORKERS", "MAKEFLAGS")}
    command = ["make", "--dry-run", *arguments]
    return subprocess.check_output(command, cwd=ROOT, env=environment, text=True)


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (2, 2), (8, 8), (64, 8)])
def test_the_tests_have_a_worker_for_each_core_and_at_most_eight(tmp_path, cores, workers):
    for target in ("test", "test-all"):
        shown = would_run(tmp_path, target, cores=cores)
        assert f"-m pytest -n {workers} --dist loadfile" in shown
    assert f"WORKERS={workers} scripts/oldest.sh" in would_run(tmp_path, "oldest", cores=cores)


def test_the_number_of_workers_can_be_given(tmp_path):
    assert "-m pytest -n 1 --dist loadfile " in would_run(tmp_path, "test", "WORKERS=1")


def test_long_tests_are_left_out_of_make_test_only(tmp_path):
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]
    assert settings["ini_options"]["addopts"].endswith(" -m 'not long'")
    assert " -m pytest" in would_run(tmp_path, "test")
    assert ' -m ""' not in would_run(tmp_path, "test")
    for target in ("test-all", "soak"):  # the last -m counts
        assert ' -m ""' in would_run(tmp_path, target)
    assert ' -m pytest -m "" ' in (ROOT / "scripts/oldest.sh").read_text()
    assert " -m pytest -m long " in (ROOT / ".ci/run").read_text()


def test_make_help_lists_every_target():
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    shown = subprocess.check_output(["make", "help"], cwd=ROOT, text=True)
    assert re.findall(r"^make ([a-z-]+) +\w", shown, re.MULTILINE) == targets.split()


def test_types_and_shapes_are_checked_while_testing():
    """In each worker: what addopts say must have reached it."""
    logits, center = torch.zeros(2, 3), torch.zeros(1, 3)
    assert teacher_probs(logits, center, 0.04).shape == (2, 3)
    with pytest.raises(jaxtyping.TypeCheckError):
        teacher_probs(logits[0], center, 0.04)
