"""Stored linear classifiers: ours, which name their network, and DINO's, which do not.

Ours is a folder of two files:

    linear.safetensors    weight (c, d) and bias (c,), for features as the network gives them
    linear.json           its sha256; kind of features, architecture, sha256 of the backbone's
                          tensors, classes, and the view and normalisation of the images
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ssl_xcit.checkpoints.read import read_linear_weights
from ssl_xcit.evaluation.results import write_result
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.runtime.files import make_folder, new_file
from ssl_xcit.runtime.sealed import read_sealed

FORMAT = 1  # raised when an older reader could misread a newer folder
FACTS = {"features", "trained_on", "backbone", "class_names", "transform"}  # what readers rely on


class Classifier(NamedTuple):
    """A linear classifier, and what linear.json says of it (DINO's file: nothing)."""

    weight: Float[Tensor, "c d"]
    bias: Float[Tensor, " c"]
    facts: dict


def save_classifier(folder: Path, classifier: Classifier) -> None:
    """Store in `folder`, each file complete or not at all. Raises UserError if the disk refuses."""
    parts = {"weight": classifier.weight, "bias": classifier.bias}
    content = save({name: t.detach().float().cpu().contiguous() for name, t in parts.items()})
    own = {"format": FORMAT, "sha256": hashlib.sha256(content).hexdigest()}
    make_folder(folder)
    with new_file(folder / "linear.safetensors") as file:
        file.write(content)
    write_result(classifier.facts | own, folder / "linear.json")


def load_classifier(path: Path) -> Classifier:
    """The classifier in a folder of ours, or in a file of DINO's eval_linear.py.

    Raises UserError for anything else, for damaged files, and for weights that are not finite.
    """
    if path.is_file() and path.suffix != ".safetensors" and path.name != "linear.json":
        weight, bias = read_linear_weights(path)
        facts = {}
    else:
        weight, bias, facts = _read_ours(path if path.is_dir() else path.parent)
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise UserError(
            f"{path}: expected a weight (classes, features) and a bias (classes), got "
            f"{tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise UserError(f"{path}: the classifier contains NaN or infinity: its training diverged")
    return Classifier(weight.float(), bias.float(), facts)


def _read_ours(folder: Path) -> tuple[Tensor, Tensor, dict]:
    if not (folder / "linear.json").exists():
        found = sorted(path.parent for path in folder.glob("*/linear.json"))
        advice = " or ".join(map(str, found)) or "DINO's linear file, or a folder of eval/linear.py"
        raise UserError(f"no linear.json in {folder}: give {advice}")
    try:
        facts = read_sealed(folder / "linear.json")
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
        tensors = load(content)
        return tensors["weight"], tensors["bias"], facts
    except UserError:
        raise
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} is damaged: {error}: train the classifier again") from error
