"""Checkpoints: folders of safetensors and JSON, published atomically; and reading backbones.

A checkpoint is `checkpoints/step_00001234/`:

    student.safetensors   parameters and BatchNorm buffers, under DINO's names (backbone.*, head.*)
    teacher.safetensors   likewise; the BatchNorm statistics are the teacher's own
    optimizer.safetensors moments, named <parameter>/<moment>
    loss.safetensors      the centre; meters.safetensors: the running means of the log
    state.json            step, architecture, configuration, versions
    manifest.json         bytes and sha256 of every file above, written last

It is written beside its final name, flushed to disk, and renamed: a folder that has its final name
and a matching manifest is complete. Nothing in it can execute code.
"""

import argparse
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssl_xcit.errors import UserError
from ssl_xcit.xcit import VARIANTS

FORMAT = 1  # raised when an older reader could misread a newer folder

StateDict = dict[str, Tensor]


class Saved(NamedTuple):
    """What a save cost."""

    path: Path
    seconds: float
    megabytes: float


class Checkpoint(NamedTuple):
    """A checkpoint in memory: state dicts by name, and the plain data beside them."""

    path: Path
    tensors: dict[str, StateDict]
    state: dict


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, StateDict],
    state: dict,
    *,
    keep_last: int = 2,
    keep: bool = False,
) -> Saved:
    """Publish `folder/step_<step>` atomically, then remove what `keep_last` no longer covers.

    `step` counts the finished optimiser steps. `keep` marks the checkpoint as kept for good.
    Raises UserError when the disk refuses; the checkpoints already there are not touched.
    """
    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step_{step:08d}"
    temporary = folder / f".writing_{step:08d}"
    try:
        for stale in folder.glob(".writing_*"):
            shutil.rmtree(stale)
        temporary.mkdir()
        for name, group in tensors.items():
            # safetensors refuses tensors that share memory
            plain = {
                key: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
                for key, tensor in group.items()
            }
            save_file(plain, temporary / f"{name}.safetensors")
        document = {"format": FORMAT, "step": step, "keep": keep, **state}
        (temporary / "state.json").write_text(json.dumps(document, indent=1))
        files = {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(json.dumps({"files": files}, indent=1))
        for path in temporary.iterdir():
            _flush(path)
        _flush(temporary)
        if final.exists():  # an incomplete or damaged one of the same step
            shutil.rmtree(final)
        temporary.rename(final)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"cannot write the checkpoint {final}: {error}; free some space or choose another "
            "--out, then run the same command again"
        ) from error
    _prune(folder, keep_last)
    size = sum(entry["bytes"] for entry in files.values())
    return Saved(final, time.perf_counter() - start, size / 1e6)


def load_latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint under `folder`, and one line for each one skipped and why."""
    skipped = []
    for path in reversed(_published(folder)):
        try:
            return load_checkpoint(path), skipped
        except UserError as error:
            skipped.append(str(error))
    return None, skipped


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint folder after checking every file against its manifest.

    Raises UserError naming the file that is missing, cut or altered.
    """
    files = _read_json(path / "manifest.json")["files"]
    for name, expected in files.items():
        file = path / name
        if not file.exists():
            raise UserError(f"{path} is incomplete: {name} is missing")
        if file.stat().st_size != expected["bytes"]:
            raise UserError(
                f"{path} is damaged: {name} has {file.stat().st_size} bytes, "
                f"its manifest says {expected['bytes']}"
            )
        if _fingerprint(file) != expected:
            raise UserError(f"{path} is damaged: the sha256 of {name} differs from its manifest")
    state = _read_json(path / "state.json")
    if state["format"] > FORMAT:
        raise UserError(
            f"{path} has checkpoint format {state['format']}, this program reads up to {FORMAT}: "
            "update ssl_xcit"
        )
    tensors = {
        Path(name).stem: load_file(path / name) for name in files if name.endswith(".safetensors")
    }
    return Checkpoint(path, tensors, state)


def read_backbone(path: Path | str, role: str = "teacher") -> tuple[str, StateDict, dict]:
    """`read_state_dict`, and the name of the architecture it belongs to."""
    state, info = read_state_dict(path, role)
    return infer_arch(state, path), state, info


def read_state_dict(path: Path | str, role: str = "teacher") -> tuple[StateDict, dict]:
    """A backbone's official state dict (no head), and its provenance: path, step, role.

    `path` is a run folder (its newest complete checkpoint), a checkpoint folder, a .safetensors
    file, or a .pth in the official layouts: DINO full (`student` / `teacher`), DINO backbone only,
    supervised (`model`). `role` is "teacher" or "student" where the file holds both.
    Raises UserError when nothing there is a backbone.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"no checkpoint at {path}: expected a run folder, a checkpoint or a file")
    if path.is_file():
        state, found = _read_file(path, role)
        return _backbone_only(state), {"path": str(path), "step": None, "role": found}
    if (path / "manifest.json").exists():
        checkpoint = load_checkpoint(path)
    else:
        checkpoint, skipped = load_latest(path / "checkpoints")
        if checkpoint is None:
            why = "; ".join(skipped) or f"no {path / 'checkpoints'}/step_* in it"
            raise UserError(f"{path} holds no complete checkpoint: {why}")
    info = {"path": str(checkpoint.path), "step": checkpoint.state["step"], "role": role}
    return _backbone_only(checkpoint.tensors[role]), info


def infer_arch(backbone: StateDict, path: Path | str = "the state dict") -> str:
    """The architecture name whose sizes these official keys have; UserError when there is none."""
    if "cls_token" not in backbone:
        raise UserError(f"{path} is not an XCiT in the official key names: it has no cls_token")
    embed_dim = backbone["cls_token"].shape[-1]
    depth = 1 + max(int(key.split(".")[1]) for key in backbone if key.startswith("blocks."))
    convolutions = sum(
        key.startswith("patch_embed.proj.") and key.endswith(".0.weight") for key in backbone
    )
    patch_size = 2**convolutions  # each convolution of the stem halves the image
    for name, variant in VARIANTS.items():
        if (variant.embed_dim, variant.depth) == (embed_dim, depth):
            return f"{name}_p{patch_size}"
    raise UserError(
        f"{path}: no architecture has width {embed_dim} and depth {depth}; "
        f"expected one of {', '.join(VARIANTS)}"
    )


def _read_file(path: Path, role: str) -> tuple[StateDict, str]:
    """The state dict of a single file, and the role it holds."""
    if path.suffix == ".safetensors":
        return load_file(path), path.stem
    try:
        # DINO's full checkpoints carry their command line as an argparse.Namespace: plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for foreign, cut or unsafe files
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} cannot be read safely as a checkpoint: {reason}") from error
    if role in content:
        return content[role], role
    for key in ("model", "state_dict"):
        if key in content:
            return content[key], key
    return content, "backbone"


def _backbone_only(state: StateDict) -> StateDict:
    """Official backbone keys: `module.` and `backbone.` stripped at the start, heads left out."""
    backbone = {}
    for key, tensor in state.items():
        key = key.removeprefix("module.").removeprefix("backbone.")
        if not key.startswith("head."):
            backbone[key] = tensor
    return backbone


def _published(folder: Path) -> list[Path]:
    """Checkpoint folders under their final names, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def _prune(folder: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints and those marked as kept for good."""
    for path in _published(folder)[:-keep_last]:
        try:
            kept = _read_json(path / "state.json").get("keep")
        except UserError:
            kept = False  # unreadable: of no use to anyone
        if not kept:
            # a failed removal must not end a training that is otherwise healthy
            shutil.rmtree(path, ignore_errors=True)


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path.parent} is incomplete: {path.name} cannot be read") from error
    except ValueError as error:
        raise UserError(f"{path.parent} is damaged: {path.name} is not JSON") from error


def _fingerprint(path: Path) -> dict:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _flush(path: Path) -> None:
    """Force a file's or folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
