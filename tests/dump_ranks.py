"""main_dino.py that also writes what each rank holds at the end: test_train runs it by torchrun."""

import os
from pathlib import Path

import torch

from ssl_xcit import train
from ssl_xcit.config import TrainConfig, run_command
from ssl_xcit.train import Log

close = Log.close


def dump_and_close(log: Log) -> None:
    """Write every tensor of the student, the teacher and the centre of this rank."""
    run = log.run
    modules = {"student": run.bare_student, "teacher": run.teacher, "loss": run.dino_loss}
    tensors = {
        f"{name}/{key}": tensor
        for name, module in modules.items()
        for key, tensor in module.state_dict().items()
    }
    torch.save(tensors, Path(run.config.out) / f"rank{os.environ['RANK']}.pt")
    close(log)


if __name__ == "__main__":
    train.Log.close = dump_and_close
    run_command(TrainConfig, "ssl_xcit.train:train")
