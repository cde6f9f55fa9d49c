"""Results of evaluations: what they have in common, and how they are stored."""

import importlib.metadata
import json
import platform
from pathlib import Path

import torch

from ssl_xcit.data.datasets import Images
from ssl_xcit.runtime.files import write_text


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
    write_text(Path(path), json.dumps(result, indent=1) + "\n")
