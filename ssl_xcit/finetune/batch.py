"""From the loader's bytes to the network's input: a pure function of its arguments.

Views are made in this order: crop, flip (and 3-Augment) by the loader, RandAugment, normalisation,
mixup or CutMix, random erasing. Every random draw is a function of (seed, epoch, image, view);
those of mixing are functions of (seed, step, place of the micro-batch in the global batch). So a
run resumes exactly, and ranks can be traded for accumulation steps. The size of a micro-batch must
stay, because images are mixed within one.
"""

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ssl_xcit.checkpoints.formats import Statistics
from ssl_xcit.data.loader import labels_at
from ssl_xcit.data.pixels import normalise
from ssl_xcit.data.views import Recipe, supervised_views, three_augment_views
from ssl_xcit.finetune.augment import Mixing, RandAugment, random_erase
from ssl_xcit.finetune.config import FinetuneConfig
from ssl_xcit.runtime import draws


class Preparation:
    """Makes micro-batches on `device` as `config` says; `labels` are those of the whole file."""

    def __init__(
        self,
        config: FinetuneConfig,
        labels: Int64[np.ndarray, "m"],
        num_classes: int,
        statistics: Statistics,
        device: torch.device,
    ) -> None:
        views, targets = config.views, config.targets
        self.config, self.labels, self.statistics = config, labels, statistics
        self.device, self.randaugment = device, None
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

    def __call__(
        self, batch: tuple[Tensor, ...], epoch: int, step: int, place: int
    ) -> tuple[Float[Tensor, "b c s s"], Float[Tensor, "b k"], Int64[Tensor, " b"] | None]:
        """Images; targets, rows that sum to 1, not smoothed; keys of stochastic depth if it is on.

        `batch`: (views (v, n, c, s, s), indices (n,)); `place`: see `MultiCropLoader.place`. In the
        result the views of an image are n images apart.
        """
        config, device = self.config, self.device
        views, indices = batch
        images = views.flatten(0, 1).to(device, non_blocking=True)

        def keys(first: int) -> Int64[Tensor, " b"]:
            numbers = range(first, first + len(views))
            return torch.cat([draws.stream(config.seed, epoch, indices, v) for v in numbers])

        if self.randaugment is not None:
            images = self.randaugment(images, keys(draws.RANDAUGMENT))
        if images.dtype == torch.uint8:
            images = normalise(images, *self.statistics)
        labels = labels_at(self.labels, indices.numpy()).repeat(len(views))
        key = draws.stream(config.seed, step, torch.tensor([place]), draws.MIXING).item()
        images, targets = self.mixing(images, labels.to(device, non_blocking=True), key)
        if config.views.random_erasing:
            images = random_erase(images, keys(draws.ERASING), config.views.random_erasing)
        if not config.model.drop_path_rate:
            return images, targets, None
        return images, targets, keys(draws.DROP_PATH).to(device, non_blocking=True)


def view_recipe(config: FinetuneConfig) -> Recipe:
    """The loader's views: `repeated_augment` alike, with random draws of their own."""
    views = config.views
    size, scale = views.image_size, views.crop_scale
    how = {"interpolation": views.interpolation, "simple_crop": views.simple_crop}
    if views.augment == "3augment":
        [group] = three_augment_views(size, scale, **how, jitter=views.color_jitter)
    else:
        [group] = supervised_views(size, scale, **how)
    return [group * views.repeated_augment]
