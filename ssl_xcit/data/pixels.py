"""Normalisation of images, and its statistics."""

from collections.abc import Sequence

import torch
from jaxtyping import Float32, Real
from torch import Tensor

from ssl_xcit.runtime.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def imagenet_statistics(in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """ImageNet's mean and standard deviation; averaged over the channels where there are not 3."""
    if in_chans == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    return tuple((sum(values) / 3,) * in_chans for values in (IMAGENET_MEAN, IMAGENET_STD))


def normalise(
    images: Real[Tensor, "*batch c h w"], mean: Sequence[float], std: Sequence[float]
) -> Float32[Tensor, "*batch c h w"]:
    """(x / 255 - mean) / std per channel of x in 0 to 255, on the images' device."""
    if not images.size(-3) == len(mean) == len(std):
        raise UserError(
            f"the images have {images.size(-3)} channels but mean has {len(mean)} values and std "
            f"{len(std)}: give one of each per channel"
        )
    # Non-blocking: otherwise each call would wait for all work that is queued on the GPU.
    mean, std = (
        torch.tensor(values).view(-1, 1, 1).to(images.device, non_blocking=True)
        for values in (mean, std)
    )
    return images.float().div_(255).sub_(mean).div_(std)
