"""The log of a training run: rows of metrics.jsonl, progress lines, and speed."""

import resource
import time
from pathlib import Path

import torch

from ssl_xcit.runtime import distributed
from ssl_xcit.training.metrics import MetricsWriter, Progress, read_metrics
from ssl_xcit.training.sinks import open_sinks
from ssl_xcit.training.task import Task


class Log:
    """Writes metrics.jsonl and the progress lines, on rank 0."""

    def __init__(self, task: Task, out: Path, first_step: int) -> None:
        self.task, self.chief = task, task.ranks.rank == 0
        self.sinks = open_sinks(task.config, first_step, self.chief)
        self.rows: list[dict] = []  # recent rows, for the verdict
        self.said = ""  # the last verdict's name
        if self.chief:
            self.metrics = MetricsWriter(out / "metrics.jsonl", first_step)
            self.rows = task.recent(read_metrics(self.metrics.path))
        epochs = task.config.optim.epochs
        self.progress = Progress(epochs, task.steps_per_epoch, first_step, quiet=not self.chief)
        self.restart(first_step)

    def row(self, step: int) -> dict:
        """Return the row of `step`; the only place where the host waits for the device."""
        task = self.task
        means = distributed.all_reduce_mean(task.meters.means()).tolist()
        task.meters.reset()
        seconds = time.monotonic() - self.start
        images = (step + 1 - self.done) * task.global_batch
        waited = task.loader.wait_seconds - self.waited
        scheduled = task.hyperparameters(step).items()
        return {
            "step": step,
            "epoch": step // task.steps_per_epoch,
            "progress": round((step + 1) / task.total_steps, 6),
            **dict(zip(task.meters.names, means, strict=True)),
            "train/bad_steps": int(task.meters.skipped[1]),
            **({"train/loss_scale": task.scaler.get_scale()} if task.scaler.is_enabled() else {}),
            **{f"health/{name}": value for name, value in task.health().items()},
            **{f"schedule/{name}": value for name, value in scheduled},
            "speed/images_per_sec": round(images / seconds, 2),
            "speed/data_wait": round(waited / seconds, 4),
            "memory/peak_gib": round(_peak_memory(task.ranks.device), 3),
        }

    def restart(self, done: int) -> None:
        """Measure the speed anew, after `done` steps."""
        self.done, self.start = done, time.monotonic()
        self.waited = self.task.loader.wait_seconds

    def skip(self, seconds: float) -> None:
        """Exclude `seconds` that were not spent training (a save or an evaluation)."""
        self.start += seconds

    def write(self, row: dict) -> None:
        """Store and print a row, and print the verdict if it has changed."""
        if self.chief:
            self.metrics.write(row)
            for sink in self.sinks:
                sink.write(row)
            self.progress.log(row)
            self.rows = self.task.recent([*self.rows, row])
            found = self.task.verdict(self.rows)
            if found is not None and found.name != self.said and row["progress"] < 1:
                self.say(found.text)
                self.said = found.name

    def conclude(self) -> None:
        """Print the last verdict."""
        found = self.task.verdict(self.rows) if self.chief else None
        if found is not None:
            self.say(found.text)

    def say(self, text: str) -> None:
        """Print a line."""
        self.progress.say(text)

    def close(self) -> None:
        """Close files, sinks and the progress bar."""
        self.progress.close()
        if self.chief:
            self.metrics.close()
        for sink in self.sinks:
            sink.close()


def _peak_memory(device: torch.device) -> float:
    """Peak memory in GiB: the GPU allocator's, or the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
