"""Weights in files: read without running code, identified, checked to the last tensor."""

import argparse
import functools
import re
from collections.abc import Mapping
from pathlib import Path, PosixPath
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ssl_xcit.checkpoints.formats import (
    CLASSIFIER,
    Contents,
    StateDict,
    choose,
    listing,
    to_official,
    unwrap,
)
from ssl_xcit.models.variants import VARIANTS
from ssl_xcit.models.xcit import XCiT, build_xcit
from ssl_xcit.runtime.errors import UserError

# The networks of our checkpoint folders, by the names of their files; the first one that is there
# is what is read when nothing is asked for.
ROLES = ("teacher", "student", "model_ema", "model")


class Weights(NamedTuple):
    """An XCiT from a file: complete, under the official names, and nothing else."""

    arch: str
    state: StateDict  # as stored; head.weight and head.bias if there is a classifier
    info: dict  # path, step, role, format, num_classes, tensors, roles, ignored


class Read(NamedTuple):
    """Weights, and what DINO keeps beside a backbone."""

    weights: Weights
    dino_head: StateDict  # empty without
    center: Tensor | None


def identify(contents: Contents, path: Path, role: str, arch: str, step: int | None = None) -> Read:
    """The network of `role` in `contents`: its format, its architecture, all its tensors there.

    `path` is named in messages and info. Raises UserError, see `read_weights`.
    """
    found = choose(contents, role, path)
    named = to_official(contents.networks[found], path)
    inferred = infer_arch(named.state, path)
    if arch not in ("", inferred):
        raise UserError(f"{path} is a {inferred}, not a {arch}: name the other one, or none")
    check_tensors(named.state, inferred, path)
    classifier = named.state.get("head.weight")
    info = {
        "path": str(path),
        "step": step,
        "role": found,
        "format": "ssl_xcit" if contents.ours and not named.foreign else named.format,
        "num_classes": 0 if classifier is None else len(classifier),
        "tensors": len(contents.networks[found]),
        "roles": list(contents.networks),
        "ignored": contents.ignored,
    }
    return Read(Weights(inferred, named.state, info), named.dino_head, contents.center)


def build_model(weights: Weights) -> XCiT:
    """The network of these weights, in evaluation mode and float32 on the CPU."""
    in_chans = weights.state["patch_embed.proj.0.0.weight"].shape[1]
    with torch.device("meta"):  # no initial values, which take longer than reading a file
        model = build_xcit(weights.arch, num_classes=weights.info["num_classes"], in_chans=in_chans)
    # Copies: in a file tensors lie anywhere, and sums of unaligned ones are rounded otherwise.
    state = {
        key: tensor.to(
            torch.float32 if tensor.is_floating_point() else tensor.dtype,
            copy=True,
            memory_format=torch.contiguous_format,
        )
        for key, tensor in weights.state.items()
    }
    model.load_state_dict(state, assign=True)
    return model.eval()


def read_file(path: Path) -> Contents:
    """The networks of a .safetensors, or of a .pth in torch's present or former container.

    Raises UserError for a file that is cut or damaged, or holds anything but tensors and plain
    data; argparse.Namespace counts as plain.
    """
    if path.suffix == ".safetensors":
        try:
            state = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is cut, damaged or no .safetensors: {error}") from error
        contents = unwrap(state, path)
        role = path.stem if path.stem in ROLES else next(iter(contents.networks))
        return contents._replace(networks={role: state}, ours=True)
    try:
        # DINO's full checkpoints carry their command line as an argparse.Namespace, with a Path in
        # it if submitit started them: plain data.
        with torch.serialization.safe_globals([argparse.Namespace, PosixPath]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for foreign, cut or unsafe files
        raise UserError(f"{path} cannot be read safely as a checkpoint: {_why(error)}") from error
    return unwrap(content, path)


def _why(error: Exception) -> str:
    """The cause in torch's words; its advice to load the file without safety is left out."""
    text = str(error)
    if found := re.search(r"GLOBAL (\S+)", text):
        return f"it wants to use {found[1]}, which could run code; none of it was run"
    reason = text.strip().split(". ")[0].split("\n")[0] or type(error).__name__
    if "Weights only load failed" in reason:
        reason = "its pickle is broken, or not only of tensors and plain data"
    return f"it is cut, damaged or of another kind ({reason})"


# Architectures


def infer_arch(state: StateDict, path: object = "the state dict") -> str:
    """The architecture whose sizes these official keys have, or nearly have: see `check_tensors`.

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
    """UserError unless `state` has all tensors of `arch` in their shapes, and no other one.

    The classifier may be missing altogether; its classes and the channels of the image are free.
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
    """The official state dict of an architecture, without memory: names, shapes and types."""
    with torch.device("meta"):
        return build_xcit(arch, num_classes=num_classes, in_chans=in_chans).state_dict()
