"""How often a classifier is right, and how far that can be trusted."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from ssl_xcit.data.pixels import normalise
from ssl_xcit.runtime import distributed
from ssl_xcit.runtime.distributed import Distributed
from ssl_xcit.runtime.precision import autocast

Z95 = 1.959963984540054  # 97.5 % of the normal distribution lie below


def accuracy(ranked: Int64[Tensor, "m top"], labels: Int64[Tensor, " m"]) -> tuple[float, float]:
    """(top-1, top-5) in percent of classes ranked best first."""
    hits = (ranked == labels[:, None]).sum(dim=0)
    return 100 * hits[0].item() / len(labels), 100 * hits.sum().item() / len(labels)


class Hits(NamedTuple):
    """How many images a classifier names right, over all ranks."""

    images: int
    first: int  # the most likely class is the image's
    within_five: int  # one of the five most likely classes is
    not_finite: int  # a logit is NaN or infinite

    def percent(self) -> dict[str, float]:
        """{"top1", "top5"}"""
        hits = {"top1": self.first, "top5": self.within_five}
        return {name: 100 * count / self.images for name, count in hits.items()}


@torch.inference_mode()
def count_hits(
    network: nn.Module,
    batches: Iterable,
    statistics: tuple[Sequence[float], Sequence[float]],
    ranks: Distributed,
    precision: str,
    outputs: Int64[Tensor, " labels"] | None = None,
) -> Hits:
    """Hits of `network`, which is in eval mode and returns logits (b, k).

    `batches` yields (images (b, c, h, w) as bytes, labels (b,), indices), each image on one rank;
    `statistics` are the mean and standard deviation of each channel that bytes are normalised by.
    `outputs` says which output of the classifier is which label; without it they are the same.
    """
    counts = torch.zeros(4, dtype=torch.int64)
    for images, labels, _ in batches:
        images = normalise(images.to(ranks.device, non_blocking=True), *statistics)
        with autocast(ranks.device, precision):
            logits = network(images)
        ranked = logits.float().topk(min(5, logits.shape[1]), dim=1).indices.cpu()
        expected = labels if outputs is None else outputs[labels]
        hits = (ranked == expected[:, None]).sum(dim=0)
        broken = (~logits.isfinite()).any(dim=1).sum().cpu()
        counts += torch.stack([torch.tensor(len(labels)), hits[0], hits.sum(), broken])
    return Hits(*distributed.gather_variable(counts[None]).sum(dim=0).tolist())


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion, in percent (Wilson, 1927).

    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)   with z = 1.96
    """
    share, spread = hits / count, Z95**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = Z95 * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)
