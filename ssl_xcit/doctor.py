"""`ssl-xcit doctor`: what this machine has for training and what it lacks, one line each.

ok: as it should be. warn: training works, and the line says what does not. missing: it does not.
"""

import argparse
import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

from ssl_xcit.data.turbojpeg import load_turbojpeg
from ssl_xcit.runtime import processor
from ssl_xcit.runtime.config import CONFIGS
from ssl_xcit.runtime.errors import UserError, starting

OK, WARN, MISSING = "ok", "warn", "missing"
Finding = tuple[str, str]  # one of these three, and the line

ROOM = 5e9  # bytes: a few checkpoints of a small network, each of 1 GB or less
SHARED_MEMORY = 1e9  # bytes: a container's default of 64 MB makes NCCL fail


def main(argv: list[str] | None = None) -> None:
    """Print every finding; exit status 1 if training cannot run here."""
    parser = argparse.ArgumentParser(prog="ssl-xcit doctor", description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run folders")
    runs = parser.parse_args(argv).runs
    processor.prepare()
    findings = [finding for check in CHECKS for finding in check()] + room(runs)
    for state, line in findings:
        print(f"{state:<9}{line}")
    if any(state == MISSING for state, _ in findings):
        raise SystemExit(1)


def versions() -> list[Finding]:
    """The program, Python, and whether everything that a training imports is there."""
    found = {name: _version(name) for name in ("ssl_xcit", "torch", "torchvision", "numba")}
    line = ", ".join(f"{name} {version or 'not installed'}" for name, version in found.items())
    findings = [(OK, f"Python {platform.python_version()}, {line}; recipes in {CONFIGS}")]
    try:
        with starting():
            importlib.import_module("ssl_xcit.dino.train")
    except (ImportError, OSError, UserError) as error:  # OSError: of a library
        return [*findings, (MISSING, f"training: {error}")]
    findings.append((OK, "training: every module can be imported"))
    spec = importlib.util.find_spec("torchvision")
    for folder in spec.submodule_search_locations if spec else []:
        for library in Path(folder).glob("_C*.so"):  # its own import takes seconds
            try:
                ctypes.CDLL(str(library))
            except OSError as error:
                line = f"torchvision: {error}: install the build that belongs to your torch"
                findings.append((WARN, f"{line}; without, no datasets by name or image folders"))
    return findings


def accelerator() -> list[Finding]:
    """GPUs, the precision that "auto" takes on them, and NCCL's shared memory."""
    try:
        import torch

        from ssl_xcit.runtime import precision
    except (ImportError, OSError) as error:
        return [(MISSING, f"torch: {error}")]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = {torch.cuda.get_device_name(number) for number in range(count)}
    if count:
        findings = [(OK, f"GPU: {count} x {', '.join(sorted(names))}, CUDA {torch.version.cuda}")]
    else:
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
        findings = [(WARN, f"GPU: none that torch (built for {built}) can use: trains on the CPU")]
    chosen = precision.quickest(torch.device("cuda" if count else "cpu"))
    findings.append((OK, f"precision: {chosen.name}: {chosen.reason}"))
    if count > 1:
        shared = shutil.disk_usage("/dev/shm").total
        line = f"shared memory: {_gigabytes(shared)} in /dev/shm"
        few = f"{line}, too little for several GPUs: docker run --shm-size 8g"
        findings.append((OK, line) if shared >= SHARED_MEMORY else (WARN, few))
    return findings


def threads() -> list[Finding]:
    """The cores that a command uses of those that the machine has."""
    usable, allowed = processor.usable_cores(), len(os.sched_getaffinity(0))
    why = f", by the quota of the cgroup (it sees {allowed})" if usable < allowed else ""
    threads = os.environ.get("OMP_NUM_THREADS", str(usable))
    return [(OK, f"threads: {threads} on {usable} of {os.cpu_count()} cores{why}")]


def jpeg() -> list[Finding]:
    """The JPEG decoder, and FFCV, which is not needed."""
    try:
        load_turbojpeg(ctypes.CDLL)
    except UserError as error:
        return [(MISSING, f"JPEG: {error}")]
    mapped = Path("/proc/self/maps").read_text().split()
    path = next((word for word in mapped if "libturbojpeg" in word), "inside of ffcv's library")
    ffcv = _version("ffcv")
    note = f"ffcv: {ffcv}" if ffcv else "ffcv: not installed, and not needed"
    return [(OK, f"JPEG: libjpeg-turbo, {path}"), (OK, note)]


def slurm() -> list[Finding]:
    """What submitting takes; a machine without SLURM needs none of it."""
    sbatch, submitit = shutil.which("sbatch"), _version("submitit")
    if sbatch and not submitit:
        return [(WARN, "SLURM: submitting needs submitit: pip install 'ssl_xcit[slurm]'")]
    return [(OK, f"SLURM: {sbatch or 'no sbatch here'}; submitit {submitit or 'not installed'}")]


def room(runs: Path) -> list[Finding]:
    """Free disk where the runs go."""
    there = next(path for path in (runs.absolute(), *runs.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        return [(MISSING, f"disk: {there} cannot be written: choose another --runs, and --out")]
    free = shutil.disk_usage(there).free
    line = f"disk: {_gigabytes(free)} free in {there}"
    return [(OK, line) if free >= ROOM else (WARN, f"{line}: a run takes some GB of checkpoints")]


CHECKS: tuple[Callable[[], list[Finding]], ...] = (versions, accelerator, threads, jpeg, slurm)


def _version(name: str) -> str | None:
    """The version of an installed package; None if it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
