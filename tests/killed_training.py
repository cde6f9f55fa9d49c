"""main_dino.py for the tests of reliability: it can kill itself inside of a save, and tells what
each rank holds when it leaves.

KILL_AT=n: SIGKILL right after the n-th durable operation of this process's saves (a file written,
an fsync, a rename, a link). LEFT=folder: on leaving, each rank writes the number of finished steps.
"""

import os
import signal
from pathlib import Path

from ssl_xcit import checkpoint, saving
from ssl_xcit.config import TrainConfig, run_command
from ssl_xcit.engine import Engine


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


if __name__ == "__main__":
    if "KILL_AT" in os.environ:
        FailPoints(int(os.environ["KILL_AT"]))
    if "LEFT" in os.environ:
        tell_when_leaving(Path(os.environ["LEFT"]))
    run_command(TrainConfig, "ssl_xcit.train:train")
