"""The run folder: which run owns it, and a record of what ran there."""

import json
import platform
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ssl_xcit.runtime.config import config_differences, read_config, save_config
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.runtime.files import make_folder, write_text
from ssl_xcit.runtime.options import read_tree
from ssl_xcit.runtime.processor import usable_cores
from ssl_xcit.runtime.provenance import commit
from ssl_xcit.runtime.sealed import read_sealed, seal
from ssl_xcit.training.config import TaskConfig

RUN_FORMAT = 1  # of the run folder's layout; raised when an older program could misread it


def claim_folder(out: Path, kind: str, config: TaskConfig, global_batch: int) -> None:
    """Create the run folder, or check that it belongs to this run.

    `kind`: "pretraining" or "fine-tuning". Raises UserError for a folder of another run, and for
    one that cannot be written.
    """
    make_folder(out)
    if (out / "config.yaml").exists():
        _check_owner(out, kind, config, global_batch)
    else:
        facts = {"format": RUN_FORMAT, "kind": kind, "global_batch": global_batch}
        write_text(out / "run.json", json.dumps(seal(facts)) + "\n")
        save_config(config, out / "config.yaml")
    started = datetime.now(UTC).isoformat(timespec="seconds")
    environment = {"command": sys.argv, "started": started, **host(), **versions()}
    write_text(out / "environment.json", json.dumps(seal(environment), indent=1) + "\n")


def _check_owner(out: Path, kind: str, config: TaskConfig, global_batch: int) -> None:
    """Raise UserError unless the run in `out` is of this kind and configuration."""
    try:
        run = read_sealed(out / "run.json")
        if lacking := {"format", "global_batch"} - run.keys():
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
    except (OSError, ValueError) as error:
        raise UserError(f"{out}/run.json cannot be read ({error}): choose another --out") from error
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
    differences = config_differences(read_config(type(config), out / "config.yaml"), config)
    if run["global_batch"] != global_batch:
        differences.append(f"global batch: {run['global_batch']} -> {global_batch}")
    if differences:
        raise UserError(
            f"{out} belongs to a run with another configuration ({'; '.join(differences)});"
            " choose another --out, or repeat the run's own settings to continue it"
        )


def stored_precision(file: Path | None) -> str | None:
    """The precision in which a run, features or a report was begun, in order to continue in it.

    `file`: a run's config.yaml, features (.safetensors), or a report (.json). None: it names none,
    does not exist, or cannot be read; whoever then reads its content says why.
    """
    if file is None:
        return None
    try:
        if file.suffix == ".yaml":
            said = read_tree(file)
        elif file.suffix == ".safetensors":
            with safe_open(file, "pt") as content:
                said = json.loads(content.metadata()["facts"])
        else:
            said = json.loads(file.read_text())
        found = (said.get("run") or said.get("settings") or said)["precision"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return None if found == "auto" else found


def versions() -> dict[str, str | None]:
    """Versions that affect what a run computes, and the git commit of the code if it has one."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "commit": commit(),
    }


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
