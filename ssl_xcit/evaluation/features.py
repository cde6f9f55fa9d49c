"""Features of a frozen backbone: of a batch, of a loader, of the images of an evaluation."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, Real
from torch import Tensor, nn

from ssl_xcit.data.beton import Beton
from ssl_xcit.data.datasets import (
    Images,
    check_channels,
    check_datasets,
    evaluation_loader,
    open_images,
)
from ssl_xcit.data.pixels import normalise
from ssl_xcit.data.views import EvalView
from ssl_xcit.evaluation.config import FrozenConfig
from ssl_xcit.evaluation.results import describe_view
from ssl_xcit.evaluation.subject import NO_FACTS, Subject, checkpoint_subject, untrained_subject
from ssl_xcit.runtime import distributed
from ssl_xcit.runtime.distributed import Distributed
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.runtime.precision import autocast

# Kind of feature, see `embed` -> its length, in multiples of the backbone's embed_dim
FEATURES = {"cls": 1, "patch": 1, "cls+patch": 2, "inputs1": 2, "inputs2": 3}


class Features(NamedTuple):
    """One row per image, in the order of the dataset, on the CPU."""

    features: Real[Tensor, "n d"]  # float32 of a backbone, uint8 of raw pixels; not normalised
    labels: Int64[Tensor, " n"]
    indices: Int64[Tensor, " n"]


def extract_features(
    backbone: nn.Module,
    loader: Iterable,
    which: Sequence[str],
    device: torch.device,
    precision: str,
) -> dict[str, Features]:
    """Features of every kind in `which`, see `embed`, from one pass; the same on every rank.

    `loader` is an `EvalLoader`, or anything that yields (images (b, c, h, w), labels (b,),
    indices (b,)) with each image on one rank; bytes are normalised on the device by the loader's
    `mean` and `std`. `precision`: see `ssl_xcit.runtime.precision`.

    Meanwhile the backbone is in eval mode: BatchNorm uses its running statistics and does not
    update them. Afterwards every module is back in its own mode.
    """
    if unknown := set(which) - FEATURES.keys():
        raise UserError(f"no features {sorted(unknown)}: choose from {', '.join(FEATURES)}")

    @torch.inference_mode()
    def embed_batch(images: Tensor) -> dict[str, Tensor]:
        images = images.to(device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = normalise(images, loader.mean, loader.std)
        return embed(backbone, images, which, precision)

    with evaluating(backbone):
        return _collect(loader, embed_batch)


def embed(
    backbone: nn.Module,
    images: Float[Tensor, "b c height width"],
    which: Sequence[str],
    precision: str,
) -> dict[str, Float[Tensor, "b _"]]:
    """Features of every kind in `which` of a batch on the backbone's device, from one forward pass.

    Tokens are taken after the final LayerNorm, and means run over the patch tokens:

    cls: the class token, (b, d), DINO's choice for XCiT.
    patch: the mean patch token, (b, d).
    cls+patch: both concatenated, (b, 2d), unscaled: DINOv2's choice for its probes.
    inputs1: class token and mean patch token that enter the last class-attention layer, (b, 2d).
    inputs2: the mean patch token that enters the first one, then inputs1, (b, 3d). The class token
        that enters the first one is the same for every image, and left out.

    The last two replace the class tokens of the last n blocks that DINO probes in a ViT: an XCiT
    has class tokens in its two class-attention layers alone. Precision as in `extract_features`.
    """
    inputs = not {"inputs1", "inputs2"}.isdisjoint(which)
    with autocast(images.device, precision):
        if inputs:
            stages = backbone.class_attention_inputs(images)
        else:
            stages = [backbone.forward_features(images)]
    # In float32, so that the mean of bf16 tokens is not rounded to bf16
    *entering, (cls, patch) = [(cls.float(), x.float().mean(dim=1)) for cls, x in stages]
    parts = {"cls": (cls,), "patch": (patch,), "cls+patch": (cls, patch)}
    if inputs:
        parts |= {"inputs1": entering[1], "inputs2": (entering[0][1], *entering[1])}
    return {kind: torch.cat(parts[kind], dim=1) for kind in which}


def extract_pixels(loader: Iterable) -> Features:
    """The bytes of each view as its features, (n, c * h * w) uint8: the baseline without a network.

    `loader` yields bytes, a quarter of float32's memory. They are copied, because a loader reuses
    the memory of a batch only when nothing refers to it.
    """
    return _collect(loader, lambda images: {"pixels": images.flatten(1).clone()})["pixels"]


def _collect(loader: Iterable, embed: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Features]:
    """Embed every batch, gather all ranks' rows once at the end, and sort them by image index."""
    rows: dict[str, list[Tensor]] = {}
    labels, indices = [], []
    for batch_images, batch_labels, batch_indices in loader:
        for kind, features in embed(batch_images).items():
            rows.setdefault(kind, []).append(features.cpu())
        labels.append(batch_labels)
        indices.append(batch_indices)

    # Outside of inference mode, so that a classifier can be trained on the result
    if not indices:
        raise UserError("there are fewer images than ranks: start fewer ranks")
    indices, order = distributed.gather_variable(torch.cat(indices)).sort()
    assert (indices[1:] != indices[:-1]).all(), "an image was read twice"
    labels = distributed.gather_variable(torch.cat(labels))[order]
    return {
        kind: Features(distributed.gather_variable(torch.cat(parts))[order], labels, indices)
        for kind, parts in rows.items()
    }


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards each module's own mode (parts of a network may be frozen in eval)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def require_finite(features: Real[Tensor, "n d"], name: str = "the features") -> None:
    """Raise UserError for NaN or infinity."""
    if not features.isfinite().all():
        raise UserError(
            f"{name} contain NaN or infinity: the network has diverged; take an earlier checkpoint"
        )


class Extraction:
    """How an evaluation makes features: of which network, from which view, on which ranks.

    `config`, whose precision is settled, names the network (`subject`); without one the bytes of
    the view are the features, called "pixels". `batch_size`: images per forward pass and rank. An
    untrained network has the channels of the images at the path `images`.

    Raises UserError for a checkpoint that is no backbone, or another one than `config.arch`.
    """

    def __init__(
        self, config: FrozenConfig, ranks: Distributed, batch_size: int, images: str
    ) -> None:
        self.config, self.ranks, self.batch_size = config, ranks, batch_size
        self.view = EvalView(config.resize, config.crop, config.interpolation)
        self.subject: Subject | None = None
        if config.checkpoint:
            how = (config.arch, config.role, config.prefix)
            self.subject = checkpoint_subject(config.checkpoint, *how)
        elif config.random_init:
            in_chans = 3 if Path(images).is_dir() else Beton(images).channels
            self.subject = untrained_subject(config.arch, config.seed, in_chans)

    def open(self, path: str, train: Images | None = None) -> Images:
        """The labelled images at `path`, whose labels mean the same classes as those of `train`.

        Raises UserError for images without labels, of other classes or for another network.
        """
        images = open_images(path, 3 if self.subject is None else self.subject.in_chans)
        check_datasets(images if train is None else train, images)
        if self.subject is not None:
            check_channels(self.subject.in_chans, images)
        return images

    def features(
        self, images: Images, kinds: Sequence[str], subset: Int64[np.ndarray, " n"] | None = None
    ) -> dict[str, Features]:
        """Features of every kind, the same on every rank; without a network {"pixels": bytes}."""
        subject = self.subject
        how = {"num_threads": self.config.num_workers, "subset": subset}
        if subject is not None:
            how |= {"mean": subject.mean, "std": subject.std}
        loader = evaluation_loader(images, self.view, self.batch_size, self.ranks, **how)
        if subject is None:
            return {"pixels": extract_pixels(loader)}
        backbone = subject.backbone.to(self.ranks.device)
        return extract_features(backbone, loader, kinds, self.ranks.device, self.config.precision)

    def facts(self) -> dict:
        """What decides the features, for a result."""
        if self.subject is None:
            origin, transform = NO_FACTS | {"source": "pixels"}, describe_view(self.view)
        else:
            origin = self.subject.facts
            transform = describe_view(self.view, self.subject.mean, self.subject.std)
        return {**origin, "precision": self.config.precision, "transform": transform}
