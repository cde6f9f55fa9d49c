"""main_dino.py that also writes what each rank holds at the end: test_train runs it by torchrun."""

import os
from pathlib import Path

import torch

from ssl_xcit.config import TrainConfig, run_command
from ssl_xcit.run_log import Log

close = Log.close


def dump_and_close(log: Log) -> None:
    """Write every tensor of the student, the teacher and the centre of this rank."""
    tensors = {
        f"{name}/{key}": tensor
        for name, state in log.task.tensors().items()
        for key, tensor in state.items()
    }
    torch.save(tensors, Path(log.task.config.out) / f"rank{os.environ['RANK']}.pt")
    close(log)


if __name__ == "__main__":
    Log.close = dump_and_close
    run_command(TrainConfig, "ssl_xcit.train:train")
