"""Stored linear classifiers: ours, which say what they belong to, and DINO's, which do not.

Ours is a folder of two files:

    linear.safetensors    weight (c, d) and bias (c,), for features as they come from the network
    linear.json           its sha256; kind of features, architecture, sha256 of the backbone's
                          tensors, classes, and the view and statistics of the images
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ssl_xcit.runtime.errors import UserError
from ssl_xcit.runtime.files import make_folder, new_file, write_text

FORMAT = 1  # raised when an older reader could misread a newer folder
KEYS = {"weight", "bias"}
FACTS = {"features", "trained_on", "backbone", "class_names", "transform"}  # what readers rely on


class Classifier(NamedTuple):
    """A linear classifier, and what it says about itself (nothing: DINO's file)."""

    weight: Float[Tensor, "c d"]
    bias: Float[Tensor, " c"]
    facts: dict


def save_classifier(folder: Path, classifier: Classifier) -> None:
    """Store in `folder`, each file complete or not at all. Raises UserError if the disk refuses."""
    tensors = {
        name: getattr(classifier, name).detach().float().cpu().contiguous() for name in sorted(KEYS)
    }
    content = save(tensors)
    own = {"format": FORMAT, "sha256": hashlib.sha256(content).hexdigest()}
    facts = classifier.facts | own
    make_folder(folder)
    with new_file(folder / "linear.safetensors") as file:
        file.write(content)
    write_text(folder / "linear.json", json.dumps(facts, indent=1) + "\n")


def load_classifier(path: Path) -> Classifier:
    """The classifier in a folder of ours, or in a file of DINO's eval_linear.py.

    Raises UserError for anything else, anything damaged, and weights that are not finite: what is
    returned has been read, all of it.
    """
    if path.is_file() and path.suffix != ".safetensors" and path.name != "linear.json":
        tensors, facts = _read_dino(path), {}
    else:
        tensors, facts = _read_ours(path if path.is_dir() else path.parent)
    if tensors.keys() != KEYS:
        raise UserError(f"{path}: expected weight and bias, got {', '.join(sorted(tensors))}")
    weight, bias = tensors["weight"].float(), tensors["bias"].float()
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise UserError(
            f"{path}: expected a weight (classes, features) and a bias (classes), got "
            f"{tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise UserError(f"{path}: the classifier contains NaN or infinity: its training diverged")
    return Classifier(weight, bias, facts)


def _read_ours(folder: Path) -> tuple[dict[str, Tensor], dict]:
    if not (folder / "linear.json").exists():
        found = sorted(path.parent for path in folder.glob("*/linear.json"))
        advice = " or ".join(map(str, found)) or "DINO's linear file, or a folder of eval/linear.py"
        raise UserError(f"no linear.json in {folder}: give {advice}")
    try:
        facts = json.loads((folder / "linear.json").read_text())
        content = (folder / "linear.safetensors").read_bytes()
        if facts["format"] > FORMAT:
            raise UserError(
                f"{folder} has classifier format {facts['format']}, this program reads up to "
                f"{FORMAT}: update ssl_xcit"
            )
        if hashlib.sha256(content).hexdigest() != facts["sha256"]:
            raise UserError(
                f"{folder} is damaged: the sha256 of linear.safetensors differs from linear.json"
            )
        if missing := FACTS - facts.keys():
            raise UserError(f"{folder / 'linear.json'} does not say {', '.join(sorted(missing))}")
        return load(content), facts
    except (OSError, KeyError, TypeError, json.JSONDecodeError, SafetensorError) as error:
        raise UserError(f"{folder} is damaged: {error}: train the classifier again") from error


def _read_dino(path: Path) -> dict[str, Tensor]:
    """The tensors of {"state_dict": {"module.linear.weight": ..., "module.linear.bias": ...}}."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state = content["state_dict"]
        return {
            key.removeprefix("module.").removeprefix("linear."): tensor
            for key, tensor in state.items()
        }
    except Exception as error:  # torch raises many kinds for foreign, cut or unsafe files
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{path} is no linear classifier of DINO's, a dict with state_dict: {reason}"
        ) from error
