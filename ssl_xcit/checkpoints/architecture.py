"""Recognises the architecture of a state dict, and checks that it is complete."""

import functools
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ssl_xcit.checkpoints.formats import CLASSIFIER, StateDict, listing
from ssl_xcit.models.variants import VARIANTS
from ssl_xcit.models.xcit import build_xcit
from ssl_xcit.runtime.errors import UserError


def infer_arch(state: StateDict, path: object = "the state dict") -> str:
    """The architecture that best fits these official keys; `check_tensors` says whether it fits.

    Raises UserError when no architecture has this width.
    """
    if "cls_token" not in state:
        raise UserError(f"{path} is not an XCiT in the official key names: it has no cls_token")
    shape = state["cls_token"].shape
    depths = {v.depth: name for name, v in VARIANTS.items() if shape == (1, 1, v.embed_dim)}
    if not depths:
        raise UserError(
            f"{path}: no architecture has a cls_token of shape {tuple(shape)}; expected the width "
            f"of one of {', '.join(VARIANTS)}"
        )

    def count(pattern: str) -> int:
        return len({found[1] for key in state if (found := re.match(pattern, key))})

    blocks = count(r"blocks\.(\d+)\.")
    nearest = min(depths, key=lambda depth: abs(depth - blocks))
    # each convolution of the stem halves the image: 4 or 3 of them
    patch_size = 16 if count(r"patch_embed\.proj\.(\d+)\.") > 3 else 8
    return f"{depths[nearest]}_p{patch_size}"


def check_tensors(state: StateDict, arch: str, path: object = "the state dict") -> None:
    """Raise UserError unless `state` has all tensors of `arch` in their shapes, and no others.

    The whole classifier may be missing. The numbers of classes and of image channels are free.
    """
    stem, classifier = state.get("patch_embed.proj.0.0.weight"), state.get("head.weight")
    in_chans = stem.shape[1] if stem is not None and stem.ndim == 4 else 3
    num_classes = 0
    if any(key in state for key in CLASSIFIER):
        num_classes = len(classifier) if classifier is not None and classifier.ndim == 2 else 1
    expected = expected_tensors(arch, num_classes, in_chans)
    wrong = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state and state[key].shape != tensor.shape
    ]
    kinds = [
        f"{key} {state[key].dtype}"
        for key, tensor in expected.items()
        if key in state and state[key].is_floating_point() != tensor.is_floating_point()
    ]
    faults = {
        "missing": [key for key in expected if key not in state],
        "unknown": [key for key in state if key not in expected],
        "of a wrong shape": wrong,
        "of a wrong type": kinds,
    }
    told = [f"{len(keys)} {fault} ({listing(keys)})" for fault, keys in faults.items() if keys]
    if told:
        raise UserError(f"{path} is no {arch}, by its tensors: {', '.join(told)}")


@functools.lru_cache(maxsize=32)
def expected_tensors(arch: str, num_classes: int, in_chans: int) -> Mapping[str, Tensor]:
    """The official state dict of an architecture on the meta device: names, shapes and types."""
    with torch.device("meta"):
        return build_xcit(arch, num_classes=num_classes, in_chans=in_chans).state_dict()
