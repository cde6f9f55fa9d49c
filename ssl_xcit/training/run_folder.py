"""The run folder: whose it is, and a record of what ran there."""

import json
import platform
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from ssl_xcit.runtime.config import (
    INSTALLED,
    PACKAGE,
    config_differences,
    read_config,
    save_config,
)
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.runtime.processor import usable_cores
from ssl_xcit.training.config import TaskConfig

RUN_FORMAT = 1  # of the run folder's layout; raised when an older program could misread it


def claim_folder(out: Path, kind: str, config: TaskConfig, global_batch: int) -> None:
    """Make the run folder this configuration's, or refuse it when it is another's.

    `kind`: of training, "pretraining" or "fine-tuning".
    """
    described = out / "config.yaml"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if described.exists():
            run = json.loads((out / "run.json").read_text())
            if run["format"] > RUN_FORMAT:
                raise UserError(
                    f"{out} has run-folder format {run['format']}, this program reads up to "
                    f"{RUN_FORMAT}: update ssl_xcit"
                )
            if run.get("kind", "pretraining") != kind:
                raise UserError(
                    f"{out} is the folder of a {run.get('kind', 'pretraining')}, not of a {kind}: "
                    "choose another --out"
                )
            differences = config_differences(read_config(type(config), described), config)
            if run["global_batch"] != global_batch:
                differences.append(f"global batch: {run['global_batch']} -> {global_batch}")
            if differences:
                raise UserError(
                    f"{out} belongs to a run with another configuration ({'; '.join(differences)});"
                    " choose another --out, or repeat the run's own settings to continue it"
                )
        else:
            facts = {"format": RUN_FORMAT, "kind": kind, "global_batch": global_batch}
            (out / "run.json").write_text(json.dumps(facts) + "\n")
            save_config(config, described)
        environment = {"command": sys.argv, "started": _now(), **host(), **versions()}
        (out / "environment.json").write_text(json.dumps(environment, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write the run folder {out}: {error.strerror}; choose another --out"
        ) from error


def stored_precision(out: Path, config: object) -> str | None:
    """The precision of what was begun in `out` with a configuration of the kind of `config`.

    None: nothing was, or it cannot be read; `claim_folder` says so then.
    """
    try:
        stored = read_config(type(config), out / "config.yaml")
    except UserError:
        return None
    found = getattr(stored, "run", stored).precision
    return None if found == "auto" else found


def versions() -> dict[str, str | None]:
    """Versions that decide what a run computes, and the git commit of the code if it has one."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "commit": commit(),
    }


def commit() -> str | None:
    """The code's commit: what a job's frozen copy notes beside it, else git's word, if any."""
    folder = PACKAGE.parent
    noted = folder / "COMMIT"
    if noted.is_file():
        return noted.read_text().strip() or None
    if INSTALLED:  # git would describe whatever repository the environment lies in
        return None
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:  # compute nodes may have no git
        return None
    return described.stdout.strip() or None


def host() -> dict[str, str | int | None]:
    """Facts of this machine."""
    cuda = torch.cuda.is_available()
    return {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cores": usable_cores(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "gpus": torch.cuda.device_count(),
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
