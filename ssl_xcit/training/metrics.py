"""metrics.jsonl, running means on the device, and progress lines."""

import json
import math
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from ssl_xcit.runtime.files import read_metrics, write_text
from ssl_xcit.runtime.sealed import seal


class MetricsWriter:
    """Appends rows to `path`, one flat JSON object per line; each step occurs once.

    The last entry of a row, "crc32", is the row's checksum, see `ssl_xcit.runtime.sealed`.

    Rows from `first_step` on were left by an attempt that died after its last checkpoint, perhaps
    with an incomplete last line. They are dropped because these steps are about to be repeated.
    """

    def __init__(self, path: Path, first_step: int = 0) -> None:
        self.path = path
        if path.exists():
            kept = [row for row in read_metrics(path) if row["step"] < first_step]
            write_text(path, "".join(map(_line, kept)))
        self._file = path.open("a")

    def write(self, row: dict) -> None:
        """Append `row` and flush it, so that readers see it at once."""
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(row: dict) -> str:
    # NaN is not JSON: readers in other languages would fail on a diverged run.
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    return json.dumps(seal(clean)) + "\n"


class RunningMeans:
    """Means over the steps since the last log, kept on the device so that adding never waits."""

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self.names = names
        self.sums = torch.zeros(len(names) + 1, device=device)  # last, the number of steps
        self.skipped = torch.zeros(2, device=device)  # steps: consecutive up to now, and in total

    def add(
        self, *values: Float[Tensor, ""], skip: Bool[Tensor, ""], excused: Bool[Tensor, ""]
    ) -> None:
        """Add one step's values, in the order of `names`; if `skip` is true, only count the step.

        If `excused` is true as well, the step counts in the total but leaves the consecutive count
        unchanged.
        """
        row = torch.stack([*(value.detach().float() for value in values), self.sums.new_ones(())])
        self.sums += torch.where(skip, 0.0, row)
        self.skipped += torch.stack([skip & ~excused, skip])
        self.skipped[0] *= skip

    def means(self) -> Float[Tensor, " names"]:
        """The means so far, still on the device."""
        return self.sums[:-1] / self.sums[-1]

    def reset(self) -> None:
        """Start a new interval."""
        self.sums.zero_()


class Progress:
    """Prints one line per logged step, and on a terminal a progress bar below them."""

    def __init__(self, epochs: int, steps_per_epoch: int, first_step: int, quiet: bool) -> None:
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch
        self.total = epochs * steps_per_epoch
        self.quiet = quiet
        self.start, self.first_step = time.monotonic(), first_step
        terminal = sys.stderr.isatty() and not quiet
        self.bar = tqdm(total=self.total, initial=first_step, unit="step", disable=not terminal)

    def advance(self) -> None:
        """Advance the bar by one step."""
        self.bar.update()

    def log(self, row: dict) -> None:
        """Print epoch, step, loss, images per second, data wait and the time left in the run."""
        done = row["step"] + 1
        computed = max(1, done - self.first_step)
        left = (time.monotonic() - self.start) / computed * (self.total - done)
        share = row.get("speed/evaluation_share")
        self.say(
            f"epoch {row['epoch'] + 1}/{self.epochs}  step {done}/{self.total}  "
            f"loss {row['train/loss']:.4f}  lr {row['schedule/lr']:.2e}  "
            f"{row['speed/images_per_sec']:.0f} images/s  "
            f"data wait {100 * row['speed/data_wait']:.0f} %  ETA {timedelta(seconds=round(left))}"
            + "".join(
                f"  {key.partition('/')[2]} {row[key]:.2f}"
                for key in row
                if key.startswith(("probe/", "test/"))
            )
            + (f"  evaluation {100 * share:.1f} % of the time" if share is not None else "")
        )

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if not self.quiet:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """Remove the bar."""
        self.bar.close()
