"""The folder of a job: slurm/ in its run folder.

There are the job's logs and submitit's files, a description of the submission (submission.json) and
a copy of the program, code_N, which the job will run whatever happens to the original meanwhile.
"""

import contextlib
import itertools
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.runtime.config import INSTALLED, config_differences, read_config
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.runtime.files import write_text
from ssl_xcit.runtime.provenance import commit
from ssl_xcit.slurm.config import SlurmConfig
from ssl_xcit.slurm.job import ROOT

PROGRAM = ("ssl_xcit", "configs", "eval", "launch", "main_dino.py", "pyproject.toml")
if INSTALLED:  # the package has the recipes in it, and beside it lie other people's packages
    PROGRAM = ("ssl_xcit",)
IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs"}  # file systems that no other machine sees


def check_run_folder(train: TrainConfig) -> None:
    """Raise UserError if the folder is another run's, or of a job that has not ended."""
    out = Path(train.out)
    if (out / "config.yaml").exists():
        differences = config_differences(read_config(TrainConfig, out / "config.yaml"), train)
        if differences:
            raise UserError(
                f"{out} belongs to a run with another configuration ({'; '.join(differences)}); "
                "choose another --out, or repeat the run's own settings to continue it"
            )
    described = out / "slurm/submission.json"
    if described.exists() and shutil.which("squeue"):
        job = json.loads(described.read_text())["job"]
        command = ["squeue", "--noheader", "--jobs", job, "--format", "%T"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.stdout.strip():
            raise UserError(
                f"{out} is the folder of job {job}, which is {found.stdout.split()[0]}: scancel "
                f"{job} first, or choose another --out"
            )


@contextlib.contextmanager
def job_folder(out: Path, slurm: SlurmConfig) -> Iterator[str]:
    """Around a submission: a copy of the program in out/slurm, whose path is given.

    When the submission fails nothing is left. Raises UserError if there can be none.
    """
    if slurm.cluster == "slurm" and shutil.which("sbatch") is None:
        raise UserError(
            "no sbatch on this machine: go where SLURM jobs are submitted, or --cluster local"
        )
    made = [path for path in (out / "slurm", *(out / "slurm").parents) if not path.exists()]
    code = next_code(out, slurm)
    try:
        try:
            (out / "slurm").mkdir(parents=True, exist_ok=True)
            if slurm.cluster == "slurm":
                _check_shared(out)
            if code:
                freeze(Path(code))
        except OSError as error:
            raise UserError(
                f"cannot write {out}: {error.strerror}; choose another --out"
            ) from error
        yield code
    except BaseException:
        if code:
            shutil.rmtree(code, ignore_errors=True)
        # What submitit has prepared, under names that are not yet a job's
        for leftover in (out / "slurm").glob("*"):
            if leftover.name.startswith(".submission_file_") or len(leftover.stem) == 32:
                leftover.unlink()
        for path in made:
            with contextlib.suppress(OSError):  # it has become somebody else's, too
                path.rmdir()
        raise


def next_code(out: Path, slurm: SlurmConfig) -> str:
    """Where the copy of the program goes; "" for none, where the job is this very process."""
    if slurm.cluster == "debug":
        return ""
    folder = out.absolute() / "slurm"
    return str(next(p for n in itertools.count(1) if not (p := folder / f"code_{n}").exists()))


def freeze(code: Path) -> None:
    """Copy the program to `code`, with what numba has compiled, but nothing else derived."""

    def derived(folder: str, names: list[str]) -> list[str]:
        if Path(folder).name == "__pycache__":
            return [name for name in names if not name.endswith((".nbi", ".nbc"))]
        return []

    code.mkdir(parents=True)
    for name in PROGRAM:
        if (ROOT / name).is_dir():
            # numba's files are valid for a source of the same time of change, which is copied
            shutil.copytree(ROOT / name, code / name, ignore=derived)
        else:
            shutil.copy2(ROOT / name, code / name)
    (code / "COMMIT").write_text(f"{commit() or ''}\n")


def _check_shared(out: Path) -> None:
    """Raise UserError if the folder is in this machine's memory and the cluster has others."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    above = {str(path) for path in (out.resolve(), *out.resolve().parents)}
    _, mount, kind, *_ = max((m for m in mounts if m[1] in above), key=lambda m: len(m[1]))
    if kind not in IN_MEMORY:
        return
    command = ["sinfo", "--noheader", "--format", "%n"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    if set(found) - {socket.gethostname(), socket.gethostname().partition(".")[0]}:
        raise UserError(
            f"{out} is in the memory of this machine ({kind} at {mount}), where the job's machines "
            "do not see it: choose an --out, or slurm.runs in configs/slurm.yaml, on a shared disk"
        )


def describe(folder: Path, job: str, cluster: str, code: str, facts: dict) -> None:
    """Write submission.json."""
    submitted = datetime.now(UTC).isoformat(timespec="seconds")
    document = {
        "job": job,
        "cluster": cluster,
        "submitted": submitted,
        "command": sys.argv,
        "code": code,
        "commit": commit() or "",
        **facts,
    }
    write_text(folder / "submission.json", json.dumps(document, indent=1) + "\n")
