"""Where images come from: a folder, or a dataset of torchvision's.

A folder's hidden files and those that systems put beside a user's are not there for us. All other
files of no extension of ours are counted.
"""

import errno
import gzip
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ssl_xcit.data.images import BrokenImageError
from ssl_xcit.runtime.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
EXTENSIONS += (".ppm", ".pgm", ".avif", ".jp2", ".npy")
DATASETS = ("FashionMNIST", "CIFAR10", "CIFAR100")
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

SYSTEM = ("@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information")
SYSTEM += ("lost+found", "__macosx", "__pycache__", "thumbs.db", "desktop.ini")
"""What systems put beside a user's files, in lower case."""
SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")
NEARLY_ALL = 0.9
"""If this share of a folder's images is in class folders, the others are probably astray."""


@dataclass(frozen=True)
class Source:
    """Images to store: `read(i)` gives a file's bytes or (h, w[, c]) pixels, `name(i)` its name.

    `unlabelled`: why there are no labels; `left_out`: how many files of which other kinds there are
    (both empty where that is not so). `read` raises OSError or BrokenImageError.
    """

    size: int
    read: Callable[[int], bytes | np.ndarray]
    name: Callable[[int], str]
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    description: str
    unlabelled: str = ""
    left_out: str = ""


def open_source(
    source: str | Path,
    labels: bool = True,
    split: Literal["train", "test"] | None = None,
    root: str | Path | None = None,
) -> Source:
    """A folder of images, or one of `DATASETS` by name; the arguments are those of `write_beton`.

    Raises UserError: no such folder or dataset, nothing in it, a download that failed, or, if
    `labels` are wanted, a folder of splits, or some images astray beside the class folders.
    """
    if str(source) in DATASETS:
        return _open_dataset(str(source), labels, split or "train", root)
    if split is not None or root is not None:
        raise UserError(
            f"split and root are for {', '.join(DATASETS)}; of a folder give the split's own folder"
        )
    if not Path(source).is_dir():
        raise UserError(f"{source}: expected a folder of images or one of {', '.join(DATASETS)}")
    return _open_folder(Path(source), labels)


def is_system(name: str) -> bool:
    """Whether a file or folder is hidden, or put there by a system."""
    return name.startswith(".") or name.lower() in SYSTEM


def class_folders(folder: Path) -> list[str]:
    """The sorted names of the folders in `folder`. Raises OSError."""
    return sorted(e.name for e in os.scandir(folder) if not is_system(e.name) and _is_folder(e))


def read_file(path: Path) -> bytes:
    """A file's bytes. Raises OSError or BrokenImageError.

    Opening a pipe would wait for its writer for ever.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        if path.is_symlink():
            raise BrokenImageError("a link to a file that is not there") from error
        raise
    if not stat.S_ISREG(mode):
        raise BrokenImageError("no regular file")
    return path.read_bytes()


def _open_folder(folder: Path, labels: bool) -> Source:
    others: Counter[str] = Counter()
    try:
        files = list(_walk(str(folder), "", (), others))
        classes = class_folders(folder)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error
    left_out = _counted(others)
    if not files:
        only = f", only {left_out}" if left_out else ""
        raise UserError(f"{folder}: holds no image ({' '.join(EXTENSIONS)}){only}")

    unlabelled = _why_unlabelled(folder, files) if labels else "as asked"
    numbers, said = None, f"none, {unlabelled}"
    if not unlabelled:
        owners = [name.split("/")[0] for name in files]
        used = set(owners)
        number = {name: i for i, name in enumerate(classes)}
        numbers = np.array([number[name] for name in owners], np.int64)
        empty = [name for name in classes if name not in used]
        said = f"{len(classes)} folder names" + (f", empty: {', '.join(empty)}" if empty else "")
    return Source(
        len(files),
        lambda i: read_file(folder / files[i]),
        files.__getitem__,
        numbers,
        None if unlabelled else tuple(classes),
        f"folder {folder}; labels: {said}",
        unlabelled,
        left_out,
    )


def _why_unlabelled(folder: Path, files: Sequence[str]) -> str:
    """Why the folders of these images name no classes; "" if they do.

    Raises UserError where they were meant to: for images astray, and for folders of splits.
    """
    parts = [name.split("/") for name in files]
    used = {part[0] for part in parts if len(part) > 1}
    astray = ["/".join(part) for part in parts if len(part) != 2]
    advice = "or go on without labels (data write: --no-labels)"
    if used and all(name.lower() in SPLITS for name in used):
        deep = {(part[0], part[1]) for part in parts if len(part) == 3}
        if any(count > 1 for count in Counter(split for split, _ in deep).values()):
            raise UserError(
                f"{folder} holds splits ({', '.join(sorted(used))}), which hold the class folders: "
                f"give the folder of one split, such as {folder / min(used)}, {advice}"
            )
        if len(used) > 1:
            return f"since its folders are splits ({', '.join(sorted(used))}), not classes"
    if not astray:
        return "since all images are in one folder" if len(used) < 2 else ""
    inside = {part[0] for part in parts if len(part) == 2}
    if len(inside) > 1 and len(files) - len(astray) >= NEARLY_ALL * len(files):
        listed = ", ".join(astray[:10]) + (", ..." if astray[10:] else "")
        raise UserError(
            f"{folder}: {len(astray):,} of {len(files):,} images are not in a class folder "
            f"directly under it, unlike all others: {listed}: move or remove them, {advice}"
        )
    more = f", nor are {len(astray) - 1:,} others" if astray[1:] else ""
    return f"since {astray[0]} is not in a class folder directly under {folder}{more}"


def _walk(
    folder: str, prefix: str, ancestors: tuple[tuple[int, int], ...], others: Counter[str]
) -> Iterator[str]:
    """Image files below `folder` in sorted order, links followed, relative to the first folder.

    Other files are counted in `others` by their kind.
    """
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:  # a link to a folder that contains it
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if is_system(entry.name):
            continue
        extension = os.path.splitext(entry.name)[1].lower()
        if _is_folder(entry):
            yield from _walk(entry.path, f"{prefix}{entry.name}/", (*ancestors, identity), others)
        elif extension in EXTENSIONS:
            yield prefix + entry.name
        elif entry.is_symlink() and not os.path.exists(entry.path):  # of a folder, perhaps
            others["linked to nowhere"] += 1
        else:
            others[extension or "without extension"] += 1


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False  # a link to itself, which is named when it is read


def _counted(others: Counter[str]) -> str:
    """How many files of which kinds, the most frequent first; "" for none."""
    if not others:
        return ""
    kinds = sorted(others.items(), key=lambda kind: (-kind[1], kind[0]))
    words = [f"{count:,} {kind}" for kind, count in kinds[:8]]
    words += [f"{sum(count for _, count in kinds[8:]):,} of other kinds"] if kinds[8:] else []
    total = others.total()
    return f"{total:,} file{'s' * (total > 1)}: {', '.join(words)}"


def _open_dataset(name: str, labels: bool, split: str, root: str | Path | None) -> Source:
    import torchvision  # seconds to import, so only when it is needed

    dataset = getattr(torchvision.datasets, name)
    if name == "FashionMNIST" and root is None and DEBIAN_FASHION_MNIST.is_dir():
        stem = {"train": "train", "test": "t10k"}[split]
        pixels = _read_idx(DEBIAN_FASHION_MNIST / f"{stem}-images-idx3-ubyte.gz")
        numbers = _read_idx(DEBIAN_FASHION_MNIST / f"{stem}-labels-idx1-ubyte.gz")
        class_names = dataset.classes
    else:
        folder = "data" if root is None else root
        try:
            opened = dataset(folder, train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{name}: could not be read from or downloaded to {folder} "
                f"({' '.join(str(error).split())}); give the folder that holds it with --root"
            ) from error
        pixels, numbers, class_names = opened.data, opened.targets, opened.classes
    pixels = np.asarray(pixels)
    return Source(
        len(pixels),
        pixels.__getitem__,
        lambda i: f"{name} {split} {i}",
        np.asarray(numbers, np.int64) if labels else None,
        tuple(class_names) if labels else None,
        f"{name} {split}; labels: {len(class_names) if labels else 'none, as asked'}",
        "" if labels else "as asked",
    )


def _read_idx(path: Path) -> np.ndarray:
    """A gzipped array of bytes in MNIST's IDX format: 0, 0, type 8, rank, sizes (u32), values."""
    data = gzip.decompress(path.read_bytes())
    assert data[:3] == b"\x00\x00\x08", path
    shape = np.frombuffer(data, ">u4", data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
