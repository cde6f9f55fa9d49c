"""Checkpoints: folders of safetensors and JSON, published atomically; and reading any format.

    python -m ssl_xcit.checkpoint info FILE
    python -m ssl_xcit.checkpoint convert FILE OUT --to timm

A checkpoint is `checkpoints/step_00001234/`:

    student.safetensors   parameters and BatchNorm buffers, under DINO's names (backbone.*, head.*)
    teacher.safetensors   likewise; the BatchNorm statistics are the teacher's own
    optimizer.safetensors moments, named <parameter>/<moment>
    loss.safetensors      the centre; meters.safetensors: the running means of the log
    state.json            step, architecture, configuration, versions
    manifest.json         bytes and sha256 of every file above, written last

It is written beside its final name, flushed to disk, and renamed: a folder that has its final name
and a matching manifest is complete. Nothing in it can execute code. `checkpoints/last` is a link to
the newest.
"""

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
from ssl_xcit.formats import CLASSIFIER, Contents, StateDict, listing
from ssl_xcit.weights import ROLES, Read, Weights, identify, read_file

FORMAT = 1  # raised when an older reader could misread a newer folder


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
    final = step_folder(folder, step)
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
        _point_to(folder / "last", final.name)
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


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` finished steps is."""
    return folder / f"step_{step:08d}"


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
    files = _manifest(path)
    for name, expected in files.items():
        file = path / name
        if not file.exists():
            raise UserError(f"{path} is incomplete: {name} is missing")
        if file.stat().st_size != expected.get("bytes"):
            raise UserError(
                f"{path} is damaged: {name} has {file.stat().st_size} bytes, "
                f"its manifest says {expected.get('bytes')}"
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


def read_weights(path: Path | str, role: str = "teacher", arch: str = "") -> Weights:
    """The network in any supported file or folder, its tensors checked one by one.

    `path` is a run folder (its newest complete checkpoint), a checkpoint folder, or a file in any
    format of `ssl_xcit.formats`: .safetensors, or .pth in torch's present or former container.
    `role` matters where there are several networks: "teacher" or "student", "model" or
    "model_ema"; a file without teacher and student gives its only or its first network for these
    two. `arch`, if given, must be what the file holds; otherwise its tensors tell.

    info: path, step (None for a file), role, format ("official", "dino", "dino_backbone", "timm",
    "mmpretrain", or "ssl_xcit"), num_classes (0: no classifier), tensors (of this network in the
    file, a projection head included), roles (all there are), ignored (entries of the file that
    belong to its training).

    Raises UserError for whatever is not an XCiT to the last tensor. Runs no code of the file.
    """
    return read_network(path, role, arch).weights


def read_network(path: Path | str, role: str = "teacher", arch: str = "") -> Read:
    """What `read_weights` reads, and the projection head and centre that DINO keeps beside it."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"no checkpoint at {path}: expected a run folder, a checkpoint or a file")
    if path.is_file():
        return identify(read_file(path), path, role, arch)
    path, step, contents = _read_folder(path)
    return identify(contents, path, role, arch, step)


def read_backbone(
    path: Path | str, role: str = "teacher", arch: str = ""
) -> tuple[str, StateDict, dict]:
    """(architecture, state dict without classifier, info) of what `read_weights` reads."""
    arch, state, info = read_weights(path, role, arch)
    return arch, _without_classifier(state), info


def read_dino_model(
    path: Path | str, role: str = "teacher"
) -> tuple[str, StateDict, StateDict | None, Tensor | None, dict]:
    """(architecture, backbone, projection head, centre, info): what DINO training starts from.

    The head has `ssl_xcit.dino.DINOHead`'s names. Head and centre are None where there is none,
    as in a backbone or a supervised model (whose classifier is left out: info's num_classes).
    """
    weights, head, center = read_network(path, role)
    return weights.arch, _without_classifier(weights.state), head or None, center, weights.info


def read_linear_weights(path: Path | str) -> tuple[Tensor, Tensor]:
    """(weight (classes, features), bias (classes)) of a DINO linear probe's file."""
    if not Path(path).is_file():
        raise UserError(f"no file at {path}: expected the linear weights of DINO")
    state = next(iter(read_file(Path(path)).networks.values()))
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


def _read_folder(path: Path) -> tuple[Path, int, Contents]:
    """A checkpoint folder of ours, or a run folder's newest: its path, its step and networks."""
    if (path / "manifest.json").exists():
        checkpoint = load_checkpoint(path)
    else:
        checkpoint, skipped = load_latest(path / "checkpoints")
        if checkpoint is None:
            why = "; ".join(skipped) or f"no {path / 'checkpoints'}/step_* in it"
            raise UserError(f"{path} holds no complete checkpoint: {why}")
    groups = checkpoint.tensors
    networks = {role: groups[role] for role in ROLES if role in groups}
    if not networks:
        raise UserError(f"{checkpoint.path} holds no network but {listing(groups)}")
    contents = Contents(networks, groups.get("loss", {}).get("center"), [], ours=True)
    return checkpoint.path, checkpoint.state["step"], contents


def _without_classifier(state: StateDict) -> StateDict:
    return {key: tensor for key, tensor in state.items() if key not in CLASSIFIER}


def _manifest(path: Path) -> dict[str, dict]:
    """The files of a checkpoint folder with their sizes and sums."""
    content = _read_json(path / "manifest.json")
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise UserError(f"{path} is damaged: manifest.json does not list its files")
    if "state.json" not in files:
        raise UserError(f"{path} is damaged: its manifest does not list state.json")
    return files


def _point_to(link: Path, name: str) -> None:
    """Make `link` a symbolic link to `name`, in one step; for people, nothing here reads it."""
    new = link.with_name(f".{link.name}")
    new.unlink(missing_ok=True)
    new.symlink_to(name)
    new.replace(link)


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


def main() -> None:
    """The command line: convert and info."""
    # lazily: it is built on this module
    from ssl_xcit.convert import main as command

    command()


if __name__ == "__main__":
    main()
