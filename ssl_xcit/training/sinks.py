"""Optional copies of the log: TensorBoard and Weights & Biases.

metrics.jsonl is the record; these are copies of its rows. After a run is resumed they still hold
each step once: TensorBoard drops the steps from the resumed one on, and Weights & Biases recognises
the run by its id and refuses steps that it already has. Neither package is in requirements.txt, and
neither is imported unless it is requested.
"""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

from ssl_xcit.runtime import options
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.training.config import TaskConfig

Row = Mapping[str, float | int | None]


class TensorBoardSink:
    """Writes scalars to `out`/tensorboard."""

    def __init__(self, out: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Drops later steps of an earlier attempt, also if the run starts over in an old folder.
        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=first_step)

    def write(self, row: Row) -> None:
        """Write all numbers of the row at its step."""
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()  # else a kill could lose two minutes of rows

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandbSink:
    """Logs to a Weights & Biases run whose id is stored in `out`/wandb.json."""

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
        """Write all numbers of the row at its step."""
        self._run.log(_numbers(row), step=row["step"])

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()


def open_sinks(
    config: TaskConfig, first_step: int, chief: bool
) -> list[TensorBoardSink | WandbSink]:
    """Open the sinks that the configuration requests, on the `chief` rank only.

    `first_step` is the first step that will be written. Raises UserError on all ranks if a
    requested package is not installed.
    """
    out, run = Path(config.out), config.run
    for package, asked in (("tensorboard", run.tensorboard), ("wandb", run.wandb)):
        if asked and importlib.util.find_spec(package) is None:
            raise UserError(
                f"--run.{package} needs the package {package}, which is not installed: "
                f"pip install {package}"
            )
    sinks = []
    if chief and run.tensorboard:
        sinks.append(TensorBoardSink(out, first_step))
    if chief and run.wandb:
        sinks.append(WandbSink(out, run.wandb, options.flat(config)))
    return sinks


def _numbers(row: Row) -> dict[str, float | int]:
    """The row without its step and without missing values."""
    return {name: value for name, value in row.items() if name != "step" and value is not None}
