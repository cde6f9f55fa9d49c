"""Augmentations of finished views, image by image, from counter-based keys (`draws`).

What they do to an image depends on its key alone: not on the batch, rank or history.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor
from torchvision.transforms import v2

from ssl_xcit.runtime import draws

TRIES = 10
# Counters of `random_erase`'s draws; a rectangle takes two per try, from 1 on
APPLY, TOP, LEFT, NOISE = 0, 1 + 2 * TRIES, 2 + 2 * TRIES, 64


class RandAugment:
    """RandAugment (Cubuk et al., 2020) by torchvision, on bytes.

    XCiT's is timm's "rand-m9-mstd0.5-inc1". This one has torchvision's operations and ranges of
    strength, always `magnitude` (of 30) instead of a normal draw around it, bilinear rotations and
    shears, and the mean colour where nothing of the image is left.
    """

    def __init__(self, operations: int, magnitude: int, mean: Sequence[float]) -> None:
        self._transform = v2.RandAugment(
            operations,
            magnitude,
            interpolation=v2.InterpolationMode.BILINEAR,
            fill=[round(255 * value) for value in mean],
        )

    def __call__(
        self, images: UInt8[Tensor, "b c h w"], keys: Int64[Tensor, "b"]
    ) -> UInt8[Tensor, "b c h w"]:
        """Each image with the operations that its key draws; `keys` on the CPU."""
        with torch.random.fork_rng(devices=[]):
            augmented = []
            for image, key in zip(images, keys.tolist(), strict=True):
                torch.default_generator.manual_seed(key)
                augmented.append(self._transform(image))
        return torch.stack(augmented)


def random_erase(
    images: Float32[Tensor, "b c h w"], keys: Int64[Tensor, "b"], probability: float
) -> Float32[Tensor, "b c h w"]:
    """Random erasing (Zhong et al., 2020), in place: a rectangle becomes normal noise per pixel.

    As timm's "pixel" mode: an area of 2 % to 1/3 of the image, a ratio of height to width whose
    logarithm is uniform between those of 0.3 and 1 / 0.3, the first of ten tries that fits (none:
    the image stays). `images` are normalised, `keys` on the CPU: all decisions are taken there,
    and only the rectangles' noise on the images' device.
    """
    height, width = images.shape[2:]
    drawn = draws.uniform(keys, torch.arange(NOISE)[:, None]).T.tolist()  # b x counters
    for image, key, uniform in zip(images, keys.to(images.device), drawn, strict=True):
        box = _rectangle(uniform, height, width) if uniform[APPLY] < probability else None
        if box is not None:
            top, left, h, w = box
            noise = normal(key, len(image) * h * w).view(len(image), h, w)
            image[:, top : top + h, left : left + w] = noise
    return images


def normal(key: Int64[Tensor, ""], count: int) -> Float32[Tensor, " count"]:
    """`count` standard normal draws of a key (Box and Muller, 1958), from counter NOISE on."""
    counters = NOISE + torch.arange(2 * count, device=key.device)
    radius, angle = draws.uniform(key[None], counters).view(2, count)
    return (-2 * torch.log1p(-radius)).sqrt() * torch.cos(2 * math.pi * angle)


def _rectangle(uniform: list[float], height: int, width: int) -> tuple[int, int, int, int] | None:
    """(top, left, height, width) from an image's draws."""
    for attempt in range(TRIES):
        area = height * width * (0.02 + (1 / 3 - 0.02) * uniform[1 + 2 * attempt])
        ratio = math.exp(math.log(0.3) * (1 - 2 * uniform[2 + 2 * attempt]))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < height and w < width:
            return int(uniform[TOP] * (height - h + 1)), int(uniform[LEFT] * (width - w + 1)), h, w
    return None
