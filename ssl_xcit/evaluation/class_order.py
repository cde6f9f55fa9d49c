"""Checks that the labels of images and the outputs of a classifier mean the same classes.

A classifier's file says how many classes it has, but not which. Its training data had one folder
per class, numbered in the order of the sorted names, so a dataset matches if its sorted class names
are the same. For ImageNet's 1,000 classes a digest of the names is known, so they are checked. For
any other classifier only the number of classes can be checked, and for a .beton without class names
only that its labels are below that number.
"""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from ssl_xcit.data.datasets import Images, require_labels
from ssl_xcit.data.sources import class_folders
from ssl_xcit.runtime.errors import UserError

# sha256 of ImageNet-1k's 1,000 WordNet numbers, sorted, joined by newlines
IMAGENET_WNIDS = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"


class ClassOrder(NamedTuple):
    """Which output of the classifier belongs to which label of the dataset."""

    outputs: Int64[Tensor, " labels"]  # the output of each label
    checked: str  # "names" or "number"
    warning: str  # one line, or empty


def class_order(images: Images, num_classes: int, classes: str | Path = "") -> ClassOrder:
    """The classifier's output for each label of `images`.

    `classes` names all classes, for images of only some of them: a folder of class folders, or a
    text file with one name at the start of each line, in any order.

    Raises UserError when labels and outputs cannot match; the message says what to do.
    """
    require_labels(images)
    names = images.class_names
    if classes:
        return _by_names(images, num_classes, Path(classes))
    if names is None:
        return _by_numbers(images, num_classes)
    if num_classes == 1000:
        _expect_imagenet(names, str(images.path))
    elif len(names) != num_classes:
        raise UserError(
            f"{images.path} has {len(names)} classes, the classifier {num_classes}: name all of "
            "them by --classes if these are some of them"
        )
    if list(names) != sorted(names):
        raise UserError(
            f"the classes of {images.path} are not in the order of their sorted names, which "
            "classifiers are trained with: write the file again from a folder of class folders"
        )
    return ClassOrder(torch.arange(len(names)), "names" if num_classes == 1000 else "number", "")


def _by_names(images: Images, num_classes: int, source: Path) -> ClassOrder:
    names, known = images.class_names, _read_names(source)
    if names is None:
        raise UserError(
            f"{images.path} does not know its classes' names, so --classes cannot number them: "
            "write the file again from a folder of class folders"
        )
    if len(known) != num_classes:
        raise UserError(f"{source} names {len(known)} classes, the classifier has {num_classes}")
    if num_classes == 1000:
        _expect_imagenet(known, str(source))
    if strange := [name for name in names if name not in known]:
        raise UserError(
            f"{len(strange)} classes of {images.path} are not in {source}: {', '.join(strange[:3])}"
        )
    return ClassOrder(torch.tensor([known.index(name) for name in names]), "names", "")


def _by_numbers(images: Images, num_classes: int) -> ClassOrder:
    used = np.unique(images.labels)
    if used[0] < 0 or used[-1] >= num_classes:
        raise UserError(
            f"{images.path} has labels from {used[0]} to {used[-1]}, the classifier outputs 0 to "
            f"{num_classes - 1}: take images of its classes"
        )
    warning = (
        f"{images.path} does not know its classes' names ({len(used)} of {num_classes} labels "
        "occur): that its labels follow the sorted names is taken on trust"
    )
    return ClassOrder(torch.arange(num_classes), "number", warning)


def _expect_imagenet(names: tuple[str, ...], source: str) -> None:
    """Raise UserError unless `names` are ImageNet-1k's 1,000 WordNet numbers, in any order."""
    advice = (
        "ImageNet's 1,000 (n01440764 ... n15075141) are expected: sort the validation images into "
        "a folder for each of them; for images of some classes add --classes TRAIN_FOLDER"
    )
    if strange := [name for name in names if not re.fullmatch(r"n\d{8}", name)]:
        raise UserError(
            f"{len(strange)} classes of {source} are not named by WordNet numbers "
            f"({', '.join(strange[:3])}); {advice}"
        )
    if len(names) != 1000:
        raise UserError(f"{source} has {len(names)} classes; {advice}")
    if hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest() != IMAGENET_WNIDS:
        raise UserError(f"{source} has 1,000 classes, but not those of ImageNet-1k; {advice}")


def _read_names(source: Path) -> tuple[str, ...]:
    """All class names of a folder of class folders or of a text file, sorted."""
    try:
        if source.is_dir():
            names = class_folders(source)
        else:
            lines = source.read_text(encoding="utf-8").splitlines()
            names = [line.split()[0] for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"cannot read the class names in {source}: {reason}") from error
    if len(set(names)) < len(names):
        raise UserError(f"{source} names a class twice")
    return tuple(sorted(names))
