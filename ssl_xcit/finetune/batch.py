"""From the loader's bytes to the network's input: a pure function of its arguments.

Views are made in this order: crop, flip (and 3-Augment) by the loader, RandAugment, normalisation,
mixup or CutMix, random erasing. Every random draw is a function of (seed, epoch, image, view);
those of mixing are functions of (seed, step, place of the micro-batch in the global batch). So a
run resumes exactly, and ranks can be traded for accumulation steps. The size of a micro-batch must
stay, because images are mixed within one.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ssl_xcit.data.loader import labels_at
from ssl_xcit.data.pixels import normalise
from ssl_xcit.data.views import Recipe, supervised_views, three_augment_views
from ssl_xcit.finetune.augment import Mixing, RandAugment, random_erase
from ssl_xcit.finetune.config import FinetuneConfig
from ssl_xcit.runtime import draws


class Prepared(NamedTuple):
    """A micro-batch on the device; the views of an image are n images apart."""

    images: Float[Tensor, "b c s s"]
    targets: Float[Tensor, "b classes"]  # rows that sum to 1, not smoothed
    drop_path: Int64[Tensor, "b"] | None  # keys


class Preparation:
    """Makes micro-batches as `config` says.

    Args:
        labels: of all images of the file.
        num_classes: length of a target.
        statistics: mean and standard deviation, per channel.
        device: where the result goes.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        labels: Int64[np.ndarray, "m"],
        num_classes: int,
        statistics: tuple[tuple[float, ...], tuple[float, ...]],
        device: torch.device,
    ) -> None:
        views, targets = config.views, config.targets
        self.config, self.labels, self.device = config, labels, device
        self.statistics = statistics
        self.randaugment = None
        if views.augment == "randaugment":
            operations, magnitude = views.randaugment_ops, views.randaugment_magnitude
            self.randaugment = RandAugment(operations, magnitude, statistics[0])
        probabilities = targets.mix_prob, targets.mix_switch_prob
        self.mixing = Mixing(num_classes, targets.mixup, targets.cutmix, *probabilities)

    @property
    def dtype(self) -> torch.dtype:
        """What the loader makes: floats on the CPU, bytes for a GPU and for RandAugment."""
        floats = self.device.type == "cpu" and self.randaugment is None
        return torch.float32 if floats else torch.uint8

    def __call__(self, batch: tuple[Tensor, ...], epoch: int, step: int, place: int) -> Prepared:
        """`batch`: (views (v, n, c, s, s), indices (n,)); `place`: see `MultiCropLoader.place`."""
        config, device = self.config, self.device
        views, indices = batch
        repeats = len(views)
        images = views.flatten(0, 1).to(device, non_blocking=True)

        def keys(first: int) -> Int64[Tensor, " b"]:
            numbers = range(first, first + repeats)
            return torch.cat([draws.stream(config.seed, epoch, indices, v) for v in numbers])

        if self.randaugment is not None:
            images = self.randaugment(images, keys(draws.RANDAUGMENT))
        if images.dtype == torch.uint8:
            images = normalise(images, *self.statistics)
        labels = labels_at(self.labels, indices.numpy()).repeat(repeats)
        key = draws.stream(config.seed, step, torch.tensor([place]), draws.MIXING).item()
        images, targets = self.mixing(images, labels.to(device, non_blocking=True), key)
        if config.views.random_erasing:
            images = random_erase(images, keys(draws.ERASING), config.views.random_erasing)
        drop_path = None
        if config.model.drop_path_rate:
            drop_path = keys(draws.DROP_PATH).to(device, non_blocking=True)
        return Prepared(images, targets, drop_path)


def view_recipe(config: FinetuneConfig) -> Recipe:
    """The loader's views: `repeated_augment` alike, with random draws of their own."""
    views = config.views
    crop = {
        "size": views.image_size,
        "scale": views.crop_scale,
        "interpolation": views.interpolation,
        "simple_crop": views.simple_crop,
    }
    if views.augment == "3augment":
        [group] = three_augment_views(**crop, jitter=views.color_jitter)
    else:
        [group] = supervised_views(**crop)
    return [group * views.repeated_augment]
