"""The one door for weights: `read` gives the network in any file or folder, checked in full.

Nothing that is read can run code.
"""

import argparse
import functools
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PosixPath

import torch
from torch import Tensor

from ssl_xcit.checkpoints.folder import (
    Checkpoint,
    load_checkpoint,
    load_latest,
    read_json,
    verify,
)
from ssl_xcit.checkpoints.formats import (
    CLASSIFIER,
    Contents,
    StateDict,
    Statistics,
    choose,
    listing,
    to_official,
    unwrap,
)
from ssl_xcit.checkpoints.tensor_file import read_tensors
from ssl_xcit.data.pixels import imagenet_statistics
from ssl_xcit.models.variants import VARIANTS
from ssl_xcit.models.xcit import XCiT, build_xcit
from ssl_xcit.runtime.errors import UserError

# The networks of our checkpoint folders, by the names of their files. The first one that is there
# is read when nothing is asked for.
ROLES = ("teacher", "student", "model_ema", "model")

# What other programs keep beside tensors: numbers of numpy's, mmengine's log.
INERT = (
    *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")),
    *(f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")),
    *("numpy.ndarray", "numpy.dtype", "_codecs.encode"),
    *(f"numpy.dtypes.{kind}DType" for kind in ("Float64", "Float32", "Int64", "Int32", "Bool")),
    "mmengine.logging.history_buffer.HistoryBuffer",
)


@dataclass(frozen=True)
class Weights:
    """An XCiT from a file: all its tensors, and what else the file says of it."""

    arch: str
    state: StateDict  # under the official names, as stored; with the classifier if there is one
    dino_head: StateDict  # under the names of `ssl_xcit.dino.head.DINOHead`; empty without one
    center: Tensor | None  # DINO's
    statistics: Statistics  # mean and std of its images, per channel
    statistics_assumed: bool  # ImageNet's, because the file states none
    path: str  # the file, or the checkpoint folder within a run
    step: int | None  # optimiser steps of a checkpoint; None for a file
    role: str  # teacher, student, model, model_ema, or backbone (without classifier)
    roles: list[str]  # all that there are
    prefix: str  # what was asked for; "" where the names alone say where the network is
    format: str  # official, dino, dino_backbone, timm, mmpretrain, or ssl_xcit
    tensors: int  # of this network in the file, a projection head included
    ignored: list[str]  # entries of the file that only its training needs

    @property
    def num_classes(self) -> int:
        """Of the classifier; 0 without one."""
        return len(self.state.get("head.weight", ()))

    @property
    def in_chans(self) -> int:
        """Channels of its images."""
        return self.state["patch_embed.proj.0.0.weight"].shape[1]

    @property
    def backbone(self) -> StateDict:
        """`state` without the classifier."""
        return {key: tensor for key, tensor in self.state.items() if key not in CLASSIFIER}

    def build(self, *, classifier: bool = True, drop_path_rate: float = 0.0) -> XCiT:
        """The network, in evaluation mode and float32 on the CPU."""
        state = self.state if classifier else self.backbone
        num_classes = self.num_classes if classifier else 0
        options = {"in_chans": self.in_chans, "drop_path_rate": drop_path_rate}
        with torch.device("meta"):  # initial values would take longer than reading a file
            model = build_xcit(self.arch, num_classes=num_classes, **options)
        # Copies: in a file tensors lie anywhere, and sums of unaligned ones are rounded otherwise.
        state = {
            key: tensor.to(
                torch.float32 if tensor.is_floating_point() else tensor.dtype,
                copy=True,
                memory_format=torch.contiguous_format,
            )
            for key, tensor in state.items()
        }
        model.load_state_dict(state, assign=True)
        return model.eval()


def read(path: Path | str, role: str = "", arch: str = "", prefix: str = "") -> Weights:
    """The network in any supported file or folder, its tensors checked one by one.

    `path` is a run folder (its newest complete checkpoint), a checkpoint folder, or a file in any
    format of `ssl_xcit.checkpoints.formats`: .safetensors, or .pth in torch's present or former
    container.

    `role` chooses among several networks: "teacher" or "student", "model" or "model_ema"; "" takes
    the first. A file without teacher and student gives its first network for these two. `arch`, if
    given, must be what the file holds. `prefix`, such as "model.student.", is what the names of the
    network's tensors begin with, where a file has several networks and no names that tell roles.

    Raises UserError for whatever is not an XCiT to the last tensor.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"no checkpoint at {path}: expected a run folder, a checkpoint or a file")
    if path.is_dir() and not (path / "manifest.json").exists():
        # A folder of a Hugging Face hub; one of ours holds its files in checkpoints/
        files = (path / name for name in ("model.safetensors", "pytorch_model.bin"))
        path = next((file for file in files if file.exists()), path)
    if path.is_file():
        return identify(_read_file(path, prefix), path, role, arch, prefix)
    checkpoint = _read_folder(path)
    return identify(_contents(checkpoint, prefix), checkpoint.path, role, arch, prefix)


def identify(
    contents: Contents, path: Path, role: str = "", arch: str = "", prefix: str = ""
) -> Weights:
    """The network of `role` in `contents`, as `read` returns it; messages name `path`."""
    role = choose(contents, role, path)
    named = to_official(contents.networks[role], path)
    inferred = infer_arch(named.state, path)
    if arch not in ("", inferred):
        raise UserError(f"{path} is a {inferred}, not a {arch}: name the other one, or none")
    # Other programs leave the counts of batches out, or cast them with all else
    counts = [key.replace("running_var", "num_batches_tracked") for key in named.state]
    for key in filter(lambda key: key.endswith("num_batches_tracked"), counts):
        named.state[key] = named.state.get(key, torch.tensor(0)).long()
    check_tensors(named.state, inferred, path)
    in_chans = named.state["patch_embed.proj.0.0.weight"].shape[1]
    # timm's and mmpretrain's names, under which this project never trains, are theirs even here
    ours = contents.ours and named.format not in ("timm", "mmpretrain")
    return Weights(
        arch=inferred,
        state=named.state,
        dino_head=named.dino_head,
        center=contents.center,
        statistics=contents.statistics or imagenet_statistics(in_chans),
        statistics_assumed=contents.statistics is None,
        path=str(path),
        step=contents.step,
        role=role,
        roles=list(contents.networks),
        prefix=prefix,
        format="ssl_xcit" if ours else named.format,
        tensors=len(contents.networks[role]),
        ignored=contents.ignored,
    )


def read_linear_weights(path: Path | str) -> tuple[Tensor, Tensor]:
    """(weight (classes, features), bias (classes)) of a DINO linear probe's file."""
    if not Path(path).is_file():
        raise UserError(f"no file at {path}: expected the linear weights of DINO")
    state = next(iter(_read_file(Path(path)).networks.values()))
    state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    if state.keys() != {"linear.weight", "linear.bias"}:
        raise UserError(
            f"{path} holds no linear probe: expected linear.weight and linear.bias, got "
            f"{listing(state)}"
        )
    weight, bias = state["linear.weight"], state["linear.bias"]
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise UserError(
            f"{path} holds no linear probe: weight {tuple(weight.shape)}, bias {tuple(bias.shape)}"
        )
    return weight, bias


# The architecture


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
    shared = [(key, state[key], tensor) for key, tensor in expected.items() if key in state]
    faults = {
        "missing": [key for key in expected if key not in state],
        "unknown": [key for key in state if key not in expected],
        "of a wrong shape": [
            f"{key} {tuple(found.shape)} instead of {tuple(wanted.shape)}"
            for key, found, wanted in shared
            if found.shape != wanted.shape
        ],
        "of a wrong type": [
            f"{key} {found.dtype}"
            for key, found, wanted in shared
            if found.is_floating_point() != wanted.is_floating_point()
        ],
    }
    told = [f"{len(keys)} {fault} ({listing(keys)})" for fault, keys in faults.items() if keys]
    if told:
        raise UserError(f"{path} is no {arch}, by its tensors: {', '.join(told)}")


@functools.lru_cache(maxsize=32)
def expected_tensors(arch: str, num_classes: int, in_chans: int) -> Mapping[str, Tensor]:
    """The official state dict of an architecture on the meta device: names, shapes and types."""
    with torch.device("meta"):
        return build_xcit(arch, num_classes=num_classes, in_chans=in_chans).state_dict()


# Folders


def _read_folder(path: Path) -> Checkpoint:
    """A checkpoint folder, or the newest one of a run folder."""
    if (path / "manifest.json").exists():
        return load_checkpoint(path)
    checkpoint, skipped = load_latest(path / "checkpoints")
    if checkpoint is None:
        why = "; ".join(skipped) or f"no {path / 'checkpoints'}/step_* in it"
        raise UserError(f"{path} holds no complete checkpoint: {why}")
    return checkpoint


def _contents(checkpoint: Checkpoint, prefix: str) -> Contents:
    groups, state = checkpoint.tensors, checkpoint.state
    networks = {role: groups[role] for role in ROLES if role in groups}
    if not networks:
        raise UserError(f"{checkpoint.path} holds no network but {listing(groups)}")
    center = groups.get("loss", {}).get("center")
    statistics = _statistics(checkpoint.path, state)
    if prefix:
        networks = unwrap(networks, checkpoint.path, prefix).networks
    return Contents(networks, center, [], True, state["step"], statistics)


def _statistics(folder: Path, state: dict) -> Statistics | None:
    """Those of a checkpoint: in its state.json, or of an older one in its run's config.yaml."""
    described = folder.resolve().parent.parent / "config.yaml"
    if "mean" not in state and described.exists():
        from ssl_xcit.runtime.options import read_tree  # torch.hub need not have PyYAML

        state = read_tree(described).get("crops", {})
    return (tuple(state["mean"]), tuple(state["std"])) if "mean" in state else None


# Files


def _read_file(path: Path, prefix: str = "") -> Contents:
    """The networks of a .safetensors, or of a .pth in torch's present or former container.

    Raises UserError for a file that is cut or damaged, or holds anything but tensors and plain
    data; argparse.Namespace counts as plain.
    """
    if ".safetensors" in path.suffixes:  # .safetensors.tmp is one that is being written
        beside = path.resolve().parent
        ours = (beside / "state.json").exists()  # a checkpoint's own file
        if ours and (beside / "manifest.json").exists():
            verify(beside, path.resolve().name)
        try:
            state, facts = read_tensors(path)
            statistics = None
            if "mean" in facts:  # written by `convert`
                statistics = tuple(tuple(json.loads(facts[name])) for name in ("mean", "std"))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is cut, damaged or no .safetensors: {error}") from error
        contents = unwrap(state, path, prefix)
        networks = contents.networks
        if len(networks) == 1 and path.stem in ROLES:
            networks = {path.stem: next(iter(networks.values()))}
        if statistics is None and ours:
            statistics = _statistics(beside, read_json(beside / "state.json"))
        return contents._replace(networks=networks, ours=True, statistics=statistics)
    try:
        # DINO's full checkpoints carry their command line as an argparse.Namespace, with a Path in
        # it if submitit started them: plain data.
        inert = [(_Inert, name) for name in INERT]
        with torch.serialization.safe_globals([argparse.Namespace, PosixPath, *inert]):
            _check_zip(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for foreign, cut or unsafe files
        raise UserError(f"{path} cannot be read safely as a checkpoint: {_why(error)}") from error
    return unwrap(content, path, prefix)


def _check_zip(path: Path) -> None:
    """Raise ValueError if a torch zip differs from its own checksums, which torch never looks at.

    A file saved without them (`torch.serialization.set_crc32_options`) has zeros there.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as file:
        if any(entry.CRC for entry in file.infolist()) and (bad := file.testzip()):
            raise ValueError(f"the checksum of {bad} differs from its content")


class _Inert:
    """Stands for an object in a file that is not needed: takes anything, keeps and does nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def _why(error: Exception) -> str:
    """The cause in torch's words, without its advice to load the file unsafely."""
    text = str(error)
    if found := re.search(r"GLOBAL (\S+)", text):
        return f"it wants to use {found[1]}, which could run code; none of it was run"
    reason = text.strip().split(". ")[0].split("\n")[0] or type(error).__name__
    if "Weights only load failed" in reason:
        reason = "its pickle is broken, or not only of tensors and plain data"
    return f"it is cut, damaged or of another kind ({reason})"
