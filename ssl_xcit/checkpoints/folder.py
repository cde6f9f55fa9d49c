"""Checkpoints: folders of safetensors and JSON, published atomically.

A checkpoint is `checkpoints/step_00001234/`:

    student.safetensors   parameters and BatchNorm buffers, under DINO's names (backbone.*, head.*)
    teacher.safetensors   likewise; the BatchNorm statistics are the teacher's own
    optimizer.safetensors moments, named <parameter>/<moment>
    loss.safetensors      the centre
    meters.safetensors    the running means of the log
    state.json            step, architecture, configuration, versions
    manifest.json         bytes and sha256 of every file above, written last

It is written under another name, flushed to disk, and renamed: a folder with its final name and a
matching manifest is complete. Nothing in it can execute code. `checkpoints/last` is a link to the
newest.
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

from ssl_xcit.checkpoints.formats import StateDict
from ssl_xcit.checkpoints.tensor_file import sealed_metadata
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.runtime.sealed import read_sealed, seal

FORMAT = 1  # raised when an older reader could misread a newer folder


class Saved(NamedTuple):
    """Where a checkpoint was saved, and what it cost."""

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

    `step` counts the finished optimiser steps. `keep` marks a checkpoint that is never removed.
    Raises UserError when the disk refuses; earlier checkpoints are not touched.
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
            # Of its own, for whoever copies one file out of the folder
            save_file(plain, temporary / f"{name}.safetensors", sealed_metadata(plain, {}))
        document = {"format": FORMAT, "step": step, "keep": keep, **state}
        (temporary / "state.json").write_text(json.dumps(seal(document), indent=1))
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
    """The path of the checkpoint after `step` finished steps."""
    return folder / f"step_{step:08d}"


def load_latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint under `folder`, and a line for each one skipped: why."""
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
    files = verify(path)
    state = read_json(path / "state.json")
    if state["format"] > FORMAT:
        raise UserError(
            f"{path} has checkpoint format {state['format']}, this program reads up to {FORMAT}: "
            "update ssl_xcit"
        )
    tensors = {
        Path(name).stem: load_file(path / name) for name in files if name.endswith(".safetensors")
    }
    return Checkpoint(path, tensors, state)


def verify(path: Path, *names: str) -> dict[str, dict]:
    """Check all files, or those of `names`, of a checkpoint folder against its manifest.

    Returns the manifest. Raises UserError naming the file that is missing, cut or altered.
    """
    files = _manifest(path)
    for name, expected in files.items():
        if names and name not in names:
            continue
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
    return files


def _manifest(path: Path) -> dict[str, dict]:
    """The files of a checkpoint folder with their sizes and sums."""
    content = read_json(path / "manifest.json")
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise UserError(f"{path} is damaged: manifest.json does not list its files")
    if "state.json" not in files:
        raise UserError(f"{path} is damaged: its manifest does not list state.json")
    return files


def _point_to(link: Path, name: str) -> None:
    """Make `link` a symbolic link to `name`, atomically. It is for people: no code reads it."""
    new = link.with_name(f".{link.name}")
    new.unlink(missing_ok=True)
    new.symlink_to(name)
    new.replace(link)


def _published(folder: Path) -> list[Path]:
    """Checkpoint folders under their final names, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def _prune(folder: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints and those marked to be kept."""
    for path in _published(folder)[:-keep_last]:
        try:
            kept = read_json(path / "state.json").get("keep")
        except UserError:
            kept = False  # unreadable, so useless
        if not kept:
            # a failed removal must not end a healthy training
            shutil.rmtree(path, ignore_errors=True)


def read_json(path: Path) -> dict:
    try:
        return read_sealed(path)
    except OSError as error:
        raise UserError(f"{path.parent} is incomplete: {path.name} cannot be read") from error
    except ValueError as error:
        why = "is not JSON" if isinstance(error, json.JSONDecodeError) else f"is damaged ({error})"
        raise UserError(f"{path.parent} is damaged: {path.name} {why}") from error


def _fingerprint(path: Path) -> dict:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _flush(path: Path) -> None:
    """Force the content of a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
