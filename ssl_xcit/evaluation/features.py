"""Features of a frozen backbone over a whole dataset, each image once, gathered from all ranks."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64, Real
from torch import Tensor, nn

from ssl_xcit.data.pixels import normalise
from ssl_xcit.runtime import distributed
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.runtime.precision import autocast

FEATURES = ("cls", "patch", "cls+patch", "inputs1", "inputs2")


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

    The backbone is in eval mode meanwhile: BatchNorm uses its running statistics and does not
    update them. Afterwards every module is in the mode it was in.
    """
    unknown = set(which) - set(FEATURES)
    if unknown:
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
    """Features of every kind in `which` of a batch on the backbone's device, from one forward.

    Each token is taken after the final LayerNorm, and means are over the patch tokens:

    cls: the class token, (b, d), DINO's choice for XCiT.
    patch: the mean of the patch tokens, (b, d).
    cls+patch: both side by side, (b, 2d), neither scaled first: DINOv2's choice for its probes.
    inputs1: class token and mean patch token that enter the last class-attention layer, (b, 2d).
    inputs2: the mean patch token that enters the first one, then inputs1, (b, 3d). The class token
        that enters the first one is the same for every image and left out.

    The last two stand in for the last n blocks' class tokens of DINO's probes of ViTs: in an XCiT
    only the two class-attention layers have a class token. Precision as in `extract_features`.
    """
    inputs = not {"inputs1", "inputs2"}.isdisjoint(which)
    with autocast(images.device, precision):
        if inputs:
            stages = backbone.class_attention_inputs(images)
        else:
            stages = [backbone.forward_features(images)]
    # Of bf16 tokens, too, the mean is not rounded to bf16.
    *entering, (cls, patch) = [(_wide(cls), _wide(tokens).mean(dim=1)) for cls, tokens in stages]
    parts = {"cls": (cls,), "patch": (patch,), "cls+patch": (cls, patch)}
    if inputs:
        parts |= {"inputs1": entering[1], "inputs2": (entering[0][1], *entering[1])}
    return {kind: torch.cat(parts[kind], dim=1) for kind in which}


def _wide(tokens: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """At least float32."""
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32))


def extract_pixels(loader: Iterable) -> Features:
    """The bytes of each view as its features, (n, c * h * w) uint8: the baseline without a network.

    `loader` yields bytes; they take a quarter of float32's memory. They are copied, because a
    loader reuses a batch's memory only when nobody refers to it.
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

    # From here on outside of inference mode, so that a classifier can be trained on the result.
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
    """Eval mode; afterwards each module's own (parts of a network may be frozen in eval mode)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
