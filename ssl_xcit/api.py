"""The Python API: pretrain, load and knn. docs/api.md shows these, and parts for your own loop."""

from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from ssl_xcit.data.pixels import normalise
from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.dino.train import train
from ssl_xcit.evaluation.config import KnnConfig
from ssl_xcit.evaluation.features import evaluating
from ssl_xcit.evaluation.knn import evaluate_knn
from ssl_xcit.evaluation.subject import Subject, checkpoint_subject
from ssl_xcit.runtime import options, processor
from ssl_xcit.runtime.config import load_config
from ssl_xcit.runtime.distributed import choose_device
from ssl_xcit.runtime.errors import UserError

Setting = options.Value | list | Path


def pretrain(**settings: Setting) -> dict:
    """Pretrain an XCiT as `ssl-xcit pretrain` does, and return the last logged row.

    `settings` are the command's options (docs/settings.md) by their flat names, at least `arch`,
    `data` and `out`. They override the recipe of `arch`. The same call continues the run in `out`.
    Raises UserError for bad settings, data or run folder.
    """
    config = load_config(TrainConfig, ("pretrain/{arch}.yaml",), _flags(settings))
    _prepare()
    return train(config)


def knn(**settings: Setting) -> dict:
    """k-NN accuracy of frozen features, as `ssl-xcit knn` finds, prints and returns it.

    `settings` are the command's options (docs/evaluation.md), such as `checkpoint`, `train` and
    `test`. "accuracy" has a row for each kind of features, temperature and k, with "top1" and
    "top5" in percent. Raises UserError for bad settings, images or checkpoint.
    """
    config = load_config(KnnConfig, argv=_flags(settings))
    _prepare()
    return evaluate_knn(config)


def load(
    checkpoint: str | Path, role: str = "teacher", device: str = "auto", prefix: str = ""
) -> "Model":
    """The backbone of a run folder (its newest checkpoint), or of a file in any known format.

    `role`: "teacher" or "student" of a pretraining, "model" or "model_ema" of a fine-tuning.
    `prefix`: what the names of the network begin with, in a file of several: "model.student.".
    `device`: "cpu", "cuda", or "auto" for a GPU where there is one. Raises UserError for a
    checkpoint that is not an XCiT to the last tensor. Runs no code of the file.
    """
    return Model(checkpoint_subject(checkpoint, role=role, prefix=prefix)).to(
        choose_device(device, 0)
    )


class Embedding(NamedTuple):
    """The tokens of n images after the last LayerNorm, float32."""

    cls: Float[Tensor, "n d"]
    patches: Float[Tensor, "n p d"]
    """Row by row: an image of h x w pixels has h / patch size times w / patch size of them."""


class Model(nn.Module):
    """A pretrained backbone with the statistics that its images were normalised by.

    Attributes: `backbone`, an `ssl_xcit.models.xcit.XCiT`; `mean` and `std`, per channel; `facts`,
    a dict that says where the weights are from.
    """

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.backbone, self.mean, self.std, self.facts = subject
        self.eval()

    @torch.no_grad()
    def embed(self, images: Num[Tensor, "n c height width"]) -> Embedding:
        """Class token and patch tokens of images: bytes (uint8) or floats in [0, 1].

        Resize and crop them yourself: height and width are multiples of the patch size. They are
        moved to the model's device and normalised here. Raises UserError for floats out of range,
        which are perhaps normalised already, and for another number of channels.
        """
        images = images.to(next(self.parameters()).device)
        if images.dtype != torch.uint8:
            if not images.is_floating_point() or images.amin() < 0 or images.amax() > 1:
                raise UserError(
                    "expected uint8 images, or floats in [0, 1] that are not normalised yet, got "
                    f"{images.dtype} in [{images.amin():.3g}, {images.amax():.3g}]"
                )
            images = images.float() * 255
        images = normalise(images, self.mean, self.std)
        with evaluating(self.backbone):
            return Embedding(*self.backbone.forward_features(images))


def _flags(settings: dict[str, Setting]) -> list[str]:
    """The command line of these settings."""
    return [
        f"--{name}={value if isinstance(value, str) else options.as_text(value)}"
        for name, value in settings.items()
    ]


def _prepare() -> None:
    """What a command does before it imports torch, as far as it helps afterwards."""
    processor.prepare()
    torch.set_num_threads(min(torch.get_num_threads(), processor.usable_cores()))
