"""main_dino.py for the tests of reliability: it can fail at a chosen place, and tells where it is.

KILL_AT=n: SIGKILL right after the n-th durable operation of this process's saves (a file written,
an fsync, a rename, a link). LEFT=folder: on leaving, each rank writes the number of finished steps.
RAISE_AT_STEP=n: rank 1 raises in step n. HOLD_EVALUATION=1: half-way through an evaluation it says
so, and waits for a signal.

There is one more architecture, xcit_shallow_p16: kills and signals are the same to it, and a step
takes a quarter of the smallest real one's time.
"""

import itertools
import os
import signal
import time
from pathlib import Path

from ssl_xcit.checkpoints import folder as checkpoint
from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.dino.train import Pretraining
from ssl_xcit.models import variants
from ssl_xcit.runtime.config import run_command
from ssl_xcit.training import saving
from ssl_xcit.training.engine import Engine


class FailPoints:
    """Counts the durable operations inside of `save_checkpoint`, and dies after the n-th."""

    def __init__(self, kill_at: int) -> None:
        self.left, self.saving = kill_at, False
        save = checkpoint.save_checkpoint

        def save_checkpoint(*arguments, **options):
            self.saving = True
            try:
                return save(*arguments, **options)
            finally:
                self.saving = False

        saving.checkpoint.save_checkpoint = save_checkpoint
        checkpoint.save_file = self.counted(checkpoint.save_file)
        for owner, names in (
            (os, ("fsync", "rename", "replace", "symlink")),
            (Path, ("write_text",)),
        ):
            for name in names:
                setattr(owner, name, self.counted(getattr(owner, name)))

    def counted(self, operation):
        def wrapped(*arguments, **options):
            result = operation(*arguments, **options)
            if self.saving:
                self.left -= 1
                if self.left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped


def tell_when_leaving(folder: Path) -> None:
    leave = Engine._leave

    def told(engine: Engine, done: int) -> None:
        (folder / f"left_{engine.task.ranks.rank}").write_text(str(done))
        leave(engine, done)

    Engine._leave = told


def raise_at(failing: int) -> None:
    loss = Pretraining.loss

    def raising(task: Pretraining, batch, step: int, micro: int, now: dict):
        if step == failing and task.ranks.rank == 1:
            raise RuntimeError("the cause of it")
        return loss(task, batch, step, micro, now)

    Pretraining.loss = raising


def hold_evaluation() -> None:
    evaluate = Pretraining.evaluate

    def held(task: Pretraining, check):
        calls = itertools.count()

        def checked() -> None:
            check()
            if next(calls) == 1:  # the first set is done, the second is not begun
                print("half-way through an evaluation", flush=True)
                for _ in range(6000):  # a minute
                    check()  # raises when a signal has arrived
                    time.sleep(0.01)

        return evaluate(task, checked)

    Pretraining.evaluate = held


def add_shallow_architecture() -> None:
    variants.VARIANTS["xcit_shallow"] = variants.Variant(64, 2, 2, 1.0, False)
    variants.ARCHITECTURES = (*variants.ARCHITECTURES, "xcit_shallow_p16")


if __name__ == "__main__":
    add_shallow_architecture()
    if "KILL_AT" in os.environ:
        FailPoints(int(os.environ["KILL_AT"]))
    if "LEFT" in os.environ:
        tell_when_leaving(Path(os.environ["LEFT"]))
    if "RAISE_AT_STEP" in os.environ:
        raise_at(int(os.environ["RAISE_AT_STEP"]))
    if "HOLD_EVALUATION" in os.environ:
        hold_evaluation()
    run_command(TrainConfig, "ssl_xcit.dino.train:train")
