"""Mixup and CutMix of a batch (torchvision's), as a pure function of a key."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torchvision.transforms import v2


class Mixing:
    """Mixes each image of a batch, and its target, with the one before it (the first: the last).

    mixup (Zhang et al., 2018): lambda x_i + (1 - lambda) x_{i-1}, lambda ~ Beta(a, a).
    CutMix (Yun et al., 2019): a rectangle of about 1 - lambda of the area from x_{i-1}; the target
    has its exact share.

    One draw of what to do, of lambda and of the rectangle holds for the whole batch, as in timm's
    "batch" mode. They come from torch's generator, seeded by the batch's own key and put back
    afterwards, so they are the same on a CPU and a GPU and leave no history behind.

    Args:
        num_classes: length of a target.
        mixup, cutmix: the a of either; 0 = never.
        prob: of mixing at all.
        switch_prob: of CutMix where both are on.
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
