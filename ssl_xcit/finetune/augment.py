"""Augmentations of finished views: RandAugment, mixup and CutMix, random erasing.

Each is a pure function of its arguments and of counter-based keys (`draws`): what it does does not
depend on rank or history, and what is done to a single image not on the rest of the batch.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor
from torchvision.transforms import v2

from ssl_xcit.runtime import draws

TRIES = 10
# Counters of `random_erase`'s draws; a rectangle takes two per try, from 1 on, the noise all others
APPLY, TOP, LEFT, NOISE = 0, 1 + 2 * TRIES, 2 + 2 * TRIES, 64


class RandAugment:
    """RandAugment (Cubuk et al., 2020) by torchvision, on bytes.

    XCiT uses timm's "rand-m9-mstd0.5-inc1". This one has torchvision's operations and ranges, the
    fixed `magnitude` (of 30) where timm draws around it, bilinear rotations and shears, and fills
    what they uncover with the mean colour.
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
        """Apply to each image the operations drawn by its key; `keys` are on the CPU."""
        with torch.random.fork_rng(devices=[]):
            augmented = []
            for image, key in zip(images, keys.tolist(), strict=True):
                torch.default_generator.manual_seed(key)
                augmented.append(self._transform(image))
        return torch.stack(augmented)


class Mixing:
    """torchvision's mixup and CutMix: mix each image and its target with the one before it.

    mixup (Zhang et al., 2018): lambda x_i + (1 - lambda) x_{i-1}, lambda ~ Beta(a, a).
    CutMix (Yun et al., 2019): a rectangle of about 1 - lambda of the area from x_{i-1}; the target
    has its exact share. The first image is mixed with the last.

    The kind, lambda and the rectangle are drawn once for the whole batch, as in timm's "batch"
    mode, by torch's CPU generator, which is seeded by the batch's key and restored afterwards: a
    CPU and a GPU mix alike. `mixup` and `cutmix` are the a of either, 0 = never; `prob` is the
    probability of mixing, `switch_prob` that of CutMix if both are on.
    """

    def __init__(
        self, num_classes: int, mixup: float, cutmix: float, prob: float, switch_prob: float
    ) -> None:
        self.num_classes = num_classes
        self.mixup = v2.MixUp(alpha=mixup, num_classes=num_classes) if mixup else None
        self.cutmix = v2.CutMix(alpha=cutmix, num_classes=num_classes) if cutmix else None
        self.prob = prob if mixup or cutmix else 0.0
        self.switch_prob = switch_prob if mixup and cutmix else float(cutmix > 0)

    def __call__(
        self, images: Float[Tensor, "b c h w"], labels: Int64[Tensor, "b"], key: int
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b classes"]]:
        """The mixed images and their targets, rows that sum to 1."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key)  # torch.manual_seed would touch the GPU's too
            mixes, cuts = torch.rand(2).tolist()
            if mixes >= self.prob:
                return images, torch.nn.functional.one_hot(labels, self.num_classes).float()
            return (self.cutmix if cuts < self.switch_prob else self.mixup)(images, labels)


def random_erase(
    images: Float32[Tensor, "b c h w"], keys: Int64[Tensor, "b"], probability: float
) -> Float32[Tensor, "b c h w"]:
    """Random erasing (Zhong et al., 2020), in place: a rectangle becomes normal noise per pixel.

    As in timm's "pixel" mode, the rectangle has an area of 2 % to 1/3 of the image and a ratio of
    height to width that is log-uniform in [0.3, 1 / 0.3]. The first of ten tries that fits is
    taken; if none fits, the image stays. `images` are normalised. `keys` are on the CPU, where all
    is decided; only the noise is drawn on the device of the images.
    """
    height, width = images.shape[2:]
    drawn = draws.uniform(keys, torch.arange(NOISE)[:, None]).T.tolist()  # b x counters
    for image, key, uniform in zip(images, keys.to(images.device), drawn, strict=True):
        box = _rectangle(uniform, height, width) if uniform[APPLY] < probability else None
        if box is not None:
            top, left, h, w = box
            counters = NOISE + torch.arange(2 * len(image) * h * w, device=key.device)
            radius, angle = draws.uniform(key[None], counters).view(2, len(image), h, w)
            # Standard normal (Box and Muller, 1958)
            noise = (-2 * torch.log1p(-radius)).sqrt() * torch.cos(2 * math.pi * angle)
            image[:, top : top + h, left : left + w] = noise
    return images


def _rectangle(uniform: list[float], height: int, width: int) -> tuple[int, int, int, int] | None:
    """(top, left, height, width) from an image's draws."""
    for attempt in range(TRIES):
        area = height * width * (0.02 + (1 / 3 - 0.02) * uniform[1 + 2 * attempt])
        ratio = math.exp(math.log(0.3) * (1 - 2 * uniform[2 + 2 * attempt]))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < height and w < width:
            return int(uniform[TOP] * (height - h + 1)), int(uniform[LEFT] * (width - w + 1)), h, w
    return None
