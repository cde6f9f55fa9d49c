"""scripts/setup.sh on machines of every kind: stubs play what it calls and keep a record."""

import shutil
import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[1] / "scripts/setup.sh"
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


INSTALL = ["venv ", "pip install --quiet --disable-pip-version-check -r requirements-dev.txt"]


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
