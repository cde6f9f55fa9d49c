"""The run folder: whose it is, and a record of what ran there."""

import json
import os
import platform
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from ssl_xcit.config import TrainConfig, config_differences, read_config, save_config
from ssl_xcit.errors import UserError

RUN_FORMAT = 1  # of the run folder's layout; raised when an older program could misread it


def claim_folder(out: Path, config: TrainConfig, global_batch: int) -> None:
    """Make the run folder this configuration's, or refuse it when it is another's."""
    described = out / "config.yaml"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if described.exists():
            run = json.loads((out / "run.json").read_text())
            differences = config_differences(read_config(TrainConfig, described), config)
            if run["format"] > RUN_FORMAT:
                raise UserError(
                    f"{out} has run-folder format {run['format']}, this program reads up to "
                    f"{RUN_FORMAT}: update ssl_xcit"
                )
            if run["global_batch"] != global_batch:
                differences.append(f"global batch: {run['global_batch']} -> {global_batch}")
            if differences:
                raise UserError(
                    f"{out} belongs to a run with another configuration ({'; '.join(differences)});"
                    " choose another --out, or repeat the run's own settings to continue it"
                )
        else:
            facts = {"format": RUN_FORMAT, "global_batch": global_batch}
            (out / "run.json").write_text(json.dumps(facts) + "\n")
            save_config(config, described)
        environment = {"command": sys.argv, "started": _now(), **host(), **versions()}
        (out / "environment.json").write_text(json.dumps(environment, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write the run folder {out}: {error.strerror}; choose another --out"
        ) from error


def versions() -> dict[str, str | None]:
    """Versions that decide what a run computes, and the git commit of the code if it has one."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "commit": commit or None,
    }


def host() -> dict[str, str | int | None]:
    """Facts of this machine."""
    cuda = torch.cuda.is_available()
    return {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "gpus": torch.cuda.device_count(),
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
