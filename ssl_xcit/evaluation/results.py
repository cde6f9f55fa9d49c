"""What every evaluation reports: a `Result`, printed as a table and stored as one JSON file."""

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ssl_xcit.data.datasets import Images
from ssl_xcit.data.views import EvalView
from ssl_xcit.runtime import distributed
from ssl_xcit.runtime.distributed import Distributed
from ssl_xcit.runtime.files import write_text
from ssl_xcit.runtime.sealed import seal


class Result(NamedTuple):
    """What an evaluation measured, and everything that decided it."""

    facts: dict  # the content of the JSON file
    heading: Sequence[str] = ()  # lines above the table: which network, which images
    # Title and width of each column of the table; the cells of a negative width begin at the left
    columns: Sequence[tuple[str, int]] = ()
    rows: Iterable[Sequence[str]] = ()  # cells; those beyond the columns follow as they are

    def report(self, out: str | Path = "") -> dict:
        """Print the result, store its facts in `out` unless that is empty, and return them."""
        lines = list(self.heading)
        for row in [[title for title, _ in self.columns], *self.rows] if self.columns else []:
            cells = [
                cell.rjust(width) if width > 0 else cell.ljust(-width)
                for cell, (_, width) in zip(row, self.columns, strict=False)
            ]
            lines.append("".join([*cells, *row[len(cells) :]]).rstrip())
        print("\n".join(lines))
        if out:
            write_result(self.facts, out)
        return self.facts


def run_evaluation(
    measure: Callable[[Distributed], Result], device: str, out: str | Path = ""
) -> dict:
    """All ranks measure, and rank 0 reports; the facts of the result, on every rank."""
    ranks = distributed.setup(device)
    try:
        result = measure(ranks)
    finally:
        distributed.teardown()
    return result.report(out) if ranks.rank == 0 else result.facts


def count_classes(images: Images) -> int:
    """Classes of labelled images: by their names, else by the largest label."""
    return len(images.class_names) if images.class_names else int(images.labels.max()) + 1


def describe_images(images: Images) -> dict:
    """Facts of a dataset."""
    return {
        "path": str(images.path.absolute()),
        "images": images.num_samples,
        "classes": None if images.labels is None else len(set(images.labels.tolist())),
    }


def describe_view(view: EvalView, mean: Sequence[float] = (), std: Sequence[float] = ()) -> dict:
    """How images are cut and normalised; without statistics they are not."""
    normalisation = {"mean": list(mean) or None, "std": list(std) or None}
    return dataclasses.asdict(view) | normalisation


def describe_machine(ranks: Distributed) -> dict:
    """Where an evaluation ran, and the versions that decide what it computes."""
    return {
        "device": str(ranks.device),
        "ranks": ranks.world_size,
        "versions": {
            "ssl_xcit": importlib.metadata.version("ssl_xcit"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def describe_subject(facts: dict) -> str:
    """A network's facts in words."""
    assumed = facts.get("statistics") == "assumed"
    note = ", which states no mean and std: ImageNet's are assumed" if assumed else ""
    return {
        "checkpoint": "{arch}, {role} of {checkpoint}" + note,
        "random_init": "{arch}, untrained (seed {seed})",
        "pixels": "no network",
    }[facts["source"]].format(**facts)


def write_result(result: dict, path: str | Path) -> None:
    """Store `result` and its checksum as JSON, complete or not at all.

    Raises UserError when the disk refuses.
    """
    write_text(Path(path), json.dumps(seal(result), indent=1) + "\n")
