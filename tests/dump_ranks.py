"""main_dino.py whose ranks tell what they do: `images_RANK`, a line for each micro-batch (step,
place and the images), and `rank_RANK.pt`, every tensor that they hold at the end."""

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor

from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.dino.train import Pretraining
from ssl_xcit.runtime.config import run_command
from ssl_xcit.training.log import Log

close, loss = Log.close, Pretraining.loss


def note_and_lose(task: Pretraining, batch: tuple[Tensor, ...], step: int, micro: int, now: dict):
    """The loss of a micro-batch whose images have been noted."""
    with open(Path(task.config.out) / f"images_{task.ranks.rank}", "a") as file:
        print(step, task.loader.place(micro), *batch[2].tolist(), file=file)
    return loss(task, batch, step, micro, now)


def dump_and_close(log: Log) -> None:
    """Write every tensor of the student, the teacher and the centre of this rank."""
    tensors = {
        f"{name}/{key}": tensor
        for name, state in log.task.tensors().items()
        for key, tensor in state.items()
    }
    torch.save(tensors, Path(log.task.config.out) / f"rank_{os.environ['RANK']}.pt")
    close(log)


def digest(tensor: Tensor) -> str:
    """For a comparison to the bit."""
    return hashlib.sha256(tensor.contiguous().numpy()).hexdigest()


if __name__ == "__main__":
    Log.close, Pretraining.loss = dump_and_close, note_and_lose
    run_command(TrainConfig, "ssl_xcit.dino.train:train")
