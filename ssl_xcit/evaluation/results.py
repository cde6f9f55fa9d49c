"""Results of evaluations: what they have in common, and how they are stored."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path

import torch

from ssl_xcit.data.datasets import Images
from ssl_xcit.runtime.errors import UserError


def describe_images(images: Images) -> dict:
    """Facts of a dataset."""
    return {
        "path": str(images.path.absolute()),
        "images": images.num_samples,
        "classes": None if images.labels is None else len(set(images.labels.tolist())),
    }


def describe_software() -> dict:
    """Versions that decide what an evaluation computes."""
    return {
        "ssl_xcit": importlib.metadata.version("ssl_xcit"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def describe_subject(facts: dict) -> str:
    """A subject's facts in words."""
    return {
        "checkpoint": "{arch}, {role} of {checkpoint}",
        "random_init": "{arch}, untrained (seed {seed})",
        "pixels": "no network",
    }[facts["source"]].format(**facts)


def write_result(result: dict, path: str | Path) -> None:
    """Store `result` as JSON, complete or not at all.

    Raises UserError when the disk refuses.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --out") from error
