"""The folder of a job: slurm/ in its run folder.

It holds the job's logs, submitit's files, a description of the submission (submission.json) and a
copy of the program, code_N, which the job runs even if the original changes meanwhile.
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
from ssl_xcit.report.runs import ENDED, job_states, read_json
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
    """Raise UserError if the folder belongs to another run, or to a job that has not ended."""
    out = Path(train.out)
    if (out / "config.yaml").exists():
        differences = config_differences(read_config(TrainConfig, out / "config.yaml"), train)
        if differences:
            raise UserError(
                f"{out} belongs to a run with another configuration ({'; '.join(differences)}); "
                "choose another --out, or repeat the run's own settings to continue it"
            )
    job = read_json(out / "slurm/submission.json").get("job")
    state = job_states().get(job, "COMPLETED")
    if job and state not in ENDED:
        raise UserError(
            f"{out} is the folder of job {job}, which is {state}: scancel {job} first, or choose "
            "another --out"
        )


@contextlib.contextmanager
def job_folder(out: Path, slurm: SlurmConfig, code: str) -> Iterator[None]:
    """Around a submission: makes out/slurm, and a copy of the program in `code` unless it is "".

    Removes both if the submission fails. Raises UserError if it cannot succeed.
    """
    if slurm.cluster == "slurm" and shutil.which("sbatch") is None:
        raise UserError(
            "no sbatch on this machine: go where SLURM jobs are submitted, or --cluster local"
        )
    made = [path for path in (out / "slurm", *(out / "slurm").parents) if not path.exists()]
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
        yield
    except BaseException:
        if code:
            shutil.rmtree(code, ignore_errors=True)
        # What submitit has prepared: its names do not hold a job's id yet
        for leftover in (out / "slurm").glob("*"):
            if leftover.name.startswith(".submission_file_") or len(leftover.stem) == 32:
                leftover.unlink()
        for path in made:
            with contextlib.suppress(OSError):  # something else lies in it by now
                path.rmdir()
        raise


def next_code(out: Path, slurm: SlurmConfig) -> str:
    """Path of the copy of the program; "" on the cluster "debug", whose job is this process."""
    if slurm.cluster == "debug":
        return ""
    folder = out.absolute() / "slurm"
    return str(next(p for n in itertools.count(1) if not (p := folder / f"code_{n}").exists()))


def freeze(code: Path) -> None:
    """Copy the program to `code`, with numba's compiled code but no other derived files."""
    code.mkdir(parents=True)
    for name in PROGRAM:
        if (ROOT / name).is_dir():
            # copytree keeps modification times, by which numba recognises its sources
            derived = shutil.ignore_patterns("*.pyc*")
            shutil.copytree(ROOT / name, code / name, ignore=derived)
        else:
            shutil.copy2(ROOT / name, code / name)
    (code / "COMMIT").write_text(f"{commit() or ''}\n")


def _check_shared(out: Path) -> None:
    """Raise UserError if the folder is in this machine's memory and the cluster has more nodes."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    above = {str(path) for path in (out.resolve(), *out.resolve().parents)}
    _, mount, kind, *_ = max((m for m in mounts if m[1] in above), key=lambda m: len(m[1]))
    if kind not in IN_MEMORY:
        return
    command = ["sinfo", "--noheader", "--format", "%n"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    if set(found) - {socket.gethostname(), socket.gethostname().partition(".")[0]}:
        raise UserError(
            f"{out} is in the memory of this machine ({kind} at {mount}), which the job's machines "
            "cannot see: choose an --out, or slurm.runs in configs/slurm.yaml, on a shared disk"
        )


def describe(folder: Path, job: str, cluster: str, code: str, facts: dict) -> None:
    """Write submission.json."""
    document = {
        "job": job,
        "cluster": cluster,
        "submitted": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "code": code,
        "commit": commit() or "",
        **facts,
    }
    write_text(folder / "submission.json", json.dumps(document, indent=1) + "\n")
