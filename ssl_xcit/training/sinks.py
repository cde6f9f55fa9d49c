"""Where the rows of metrics.jsonl go, too, when asked: TensorBoard and Weights & Biases.

metrics.jsonl is the record; these are copies for those who like to look there. A run that is
continued has each step once in them: TensorBoard drops what lies beyond the step that it resumes
from, and Weights & Biases, told by its own id that this is the same run, refuses steps it has.
Neither package is in requirements.txt, and neither is imported unless it is asked for.
"""

import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

from ssl_xcit.runtime import options
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.training.config import Run, TaskConfig

Row = Mapping[str, float | int | None]


class Sink(ABC):
    """Takes rows one by one."""

    @abstractmethod
    def write(self, row: Row) -> None:
        """Pass one row on, readable there soon even if this process is killed."""

    @abstractmethod
    def close(self) -> None:
        """Pass on what is pending."""


class TensorBoardSink(Sink):
    """Scalars under `out`/tensorboard."""

    def __init__(self, out: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A fresh run purges nothing, but one that starts anew in an old folder does
        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=first_step)

    def write(self, row: Row) -> None:
        """Every number of the row, at the row's step."""
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()  # or a kill would take two minutes of rows

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandbSink(Sink):
    """A run of Weights & Biases with an id that is kept in `out`/wandb.json."""

    def __init__(self, out: Path, project: str, settings: Mapping[str, options.Value]) -> None:
        import wandb

        note = out / "wandb.json"
        if note.exists():
            identity = json.loads(note.read_text())["id"]
        else:
            identity = uuid4().hex[:8]
            note.write_text(json.dumps({"id": identity}) + "\n")
        try:
            self._run = wandb.init(
                project=project,
                id=identity,
                resume="allow",
                name=out.absolute().name,
                dir=str(out),
                config=dict(settings),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"Weights & Biases cannot start: {error}; log in with `wandb login`, set "
                "WANDB_MODE=offline, or drop --run.wandb"
            ) from error

    def write(self, row: Row) -> None:
        """Every number of the row, at the row's step."""
        self._run.log(_numbers(row), step=row["step"])

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()


def check_sinks(run: Run) -> None:
    """Raise UserError if a package is asked for that is not installed."""
    wanted = {"tensorboard": run.tensorboard, "wandb": bool(run.wandb)}
    for package, asked in wanted.items():
        if asked and importlib.util.find_spec(package) is None:
            raise UserError(
                f"--run.{package} needs the package {package}, which is not installed: "
                f"pip install {package}"
            )


def open_sinks(config: TaskConfig, first_step: int, chief: bool) -> list[Sink]:
    """The sinks that a training asks for, on its `chief` rank; `first_step` is the first to come.

    Raises UserError, on all ranks alike, if a package is asked for that is not installed.
    """
    out, run = Path(config.out), config.run
    check_sinks(run)
    sinks: list[Sink] = []
    if chief and run.tensorboard:
        sinks.append(TensorBoardSink(out, first_step))
    if chief and run.wandb:
        sinks.append(WandbSink(out, run.wandb, options.flat(config)))
    return sinks


def _numbers(row: Row) -> dict[str, float | int]:
    """The row without its step, and without what has no value."""
    return {name: value for name, value in row.items() if name != "step" and value is not None}
