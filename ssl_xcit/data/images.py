"""Sources of images, and how each image becomes the JPEG bytes or pixels that are stored.

`ssl_xcit.data.writer` puts them into a file.
"""

import ctypes
import functools
import gzip
import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ssl_xcit.data.turbojpeg import load_turbojpeg
from ssl_xcit.runtime.errors import UserError

JPG, RAW = 0, 1
"""How an image is stored, as FFCV numbers it: a JPEG's bytes, or its pixels."""

MAX_SIDE = 65535
MAX_BYTES = 1 << 31
"""FFCV's limits: sides are u16, and an image fits one page, whose size is a u32 power of two."""
TINY = 64
"""Mode auto stores images up to this many pixels a side raw: a JPEG's tables take 600 bytes."""

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
EXTENSIONS += (".ppm", ".pgm", ".avif", ".jp2", ".npy")
DATASETS = ("FashionMNIST", "CIFAR10", "CIFAR100")
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

KEPT = "JPEG bytes kept"
ENCODED = "encoded as JPEG"
EXTRANEOUS = "JPEG with extraneous bytes, perhaps damaged"

TJPF_RGB, TJERR_WARNING = 0, 0


@dataclass(frozen=True)
class Source:
    """Images to store: `read(i)` gives a file's bytes or (h, w[, c]) pixels, `name(i)` its name."""

    size: int
    read: Callable[[int], bytes | np.ndarray]
    name: Callable[[int], str]
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    description: str


def open_source(
    source: str | Path,
    labels: bool = True,
    split: Literal["train", "test"] | None = None,
    root: str | Path | None = None,
) -> Source:
    """A folder of images, or one of `DATASETS` by name; the arguments are those of `write_beton`.

    Raises UserError: no such folder or dataset, nothing in it, or a download that failed.
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


def _open_folder(folder: Path, labels: bool) -> Source:
    try:
        files = list(_walk(str(folder), "", ()))
        classes = sorted(e.name for e in os.scandir(folder) if e.is_dir() and e.name[0] != ".")
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error
    if not files:
        raise UserError(f"{folder}: holds no image ({' '.join(EXTENSIONS)})")

    outside = [name for name in files if name.count("/") != 1]
    used = {name.split("/")[0] for name in files}
    if not labels:
        reason, classes = "none, as asked", None
    elif outside:
        reason = f"none, since {outside[0]} is not in a class folder directly under {folder}"
        classes = None
    elif len(used) < 2:
        reason, classes = "none, since all images are in one folder", None
    else:
        empty = [name for name in classes if name not in used]
        reason = f"{len(classes)} folder names" + (f", empty: {', '.join(empty)}" if empty else "")
    numbers = None
    if classes is not None:
        number = {name: i for i, name in enumerate(classes)}
        numbers = np.array([number[name.split("/")[0]] for name in files], np.int64)

    return Source(
        len(files),
        lambda i: (folder / files[i]).read_bytes(),
        files.__getitem__,
        numbers,
        None if classes is None else tuple(classes),
        f"folder {folder}; labels: {reason}",
    )


def _walk(folder: str, prefix: str, ancestors: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Image files below `folder` in sorted order, links followed, relative to the first folder."""
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:  # a link to a folder that contains it
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry.path, f"{prefix}{entry.name}/", (*ancestors, identity))
        elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
            yield prefix + entry.name


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
    )


def _read_idx(path: Path) -> np.ndarray:
    """A gzipped array of bytes in MNIST's IDX format: 0, 0, type 8, rank, sizes (u32), values."""
    data = gzip.decompress(path.read_bytes())
    assert data[:3] == b"\x00\x00\x08", path
    shape = np.frombuffer(data, ">u4", data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


# Encoding: from one source item to the bytes that are stored


@dataclass(frozen=True)
class Encoding:
    """How images are stored; the fields are those of `write_beton`."""

    mode: Literal["auto", "jpg", "raw"] = "auto"
    max_side: int | None = None
    short_side: int | None = None
    quality: int = 90
    exif: Literal["ignore", "rotate"] = "ignore"
    channels: int = 3
    check: Literal["full", "header"] = "full"

    def __post_init__(self) -> None:
        if self.max_side is not None and self.short_side is not None:
            raise UserError("max_side and short_side exclude each other; give one of them")
        for name, top in (("max_side", MAX_SIDE), ("short_side", MAX_SIDE), ("quality", 100)):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= top:
                raise UserError(f"{name} must be 1 to {top}, got {value}")
        if self.channels < 1:
            raise UserError(f"channels must be at least 1, got {self.channels}")
        if self.mode == "jpg" and self.channels != 3:
            raise UserError(f"mode jpg is for 3 channels, got {self.channels}; use mode raw")

    def stored_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after shrinking; images are never enlarged."""
        side, bound = 0, 0
        if self.max_side is not None:
            side, bound = max(height, width), self.max_side
        elif self.short_side is not None:
            side, bound = min(height, width), self.short_side
        if side <= bound:
            return height, width
        return max(1, round(height * bound / side)), max(1, round(width * bound / side))


@dataclass(frozen=True)
class Stored:
    """One image as it is stored; `notes` say what was special about it."""

    data: bytes
    height: int
    width: int
    mode: int
    notes: tuple[str, ...]


class BrokenImageError(Exception):
    """An input that cannot be stored; the message is the reason."""


def encode(item: bytes | np.ndarray, encoding: Encoding) -> Stored:
    """One image file's bytes, or (h, w[, c]) pixels, in the form that is stored.

    Raises BrokenImageError, or whatever Pillow raises, for an `item` that cannot be read; UserError
    when libjpeg-turbo is missing.
    """
    notes: list[str] = []
    if isinstance(item, bytes) and not item:
        raise BrokenImageError("the file is empty")
    if isinstance(item, bytes) and item.startswith(b"\x93NUMPY"):
        item = np.load(io.BytesIO(item), allow_pickle=False)
    is_jpeg = False
    if isinstance(item, bytes):
        image = Image.open(io.BytesIO(item))
        is_jpeg = image.format in ("JPEG", "MPO")
        turned = _is_turned(image)
        rotate = turned and encoding.exif == "rotate"
        if turned:
            notes.append(f"EXIF orientation {'applied' if rotate else 'ignored'}")
        size = image.height, image.width
        if is_jpeg and _is_plain_jpeg(item):
            if encoding.check == "full" and (problem := jpeg_problem(item, *size)):
                if not is_harmless(problem):
                    raise BrokenImageError(problem)
                notes.append(EXTRANEOUS)
            same_pixels = encoding.stored_size(*size) == size and not rotate
            if same_pixels and encoding.channels == 3 and encoding.mode != "raw":
                return Stored(item, *size, JPG, (*notes, KEPT))
        item = _pixels_of(image, rotate, "L" if encoding.channels == 1 else "RGB", notes)

    pixels = item[:, :, None] if item.ndim == 2 else item
    if pixels.dtype != np.uint8 or pixels.ndim != 3:
        raise BrokenImageError(f"expected uint8 (h, w, c), got {pixels.dtype} {pixels.shape}")
    if pixels.shape[2] == 1 and encoding.channels == 3:
        pixels = np.repeat(pixels, 3, axis=2)
    if pixels.shape[2] != encoding.channels:
        raise BrokenImageError(f"expected {encoding.channels} channels, got {pixels.shape[2]}")
    height, width = encoding.stored_size(*pixels.shape[:2])
    if (height, width) != pixels.shape[:2]:
        notes.append("shrunk")
        pixels = _shrink(pixels, height, width)
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE and pixels.nbytes <= MAX_BYTES):
        raise BrokenImageError(f"{width} x {height} pixels are too few or too many")
    tiny = max(height, width) <= TINY and not is_jpeg
    if encoding.mode == "raw" or encoding.channels != 3 or (encoding.mode == "auto" and tiny):
        return Stored(pixels.tobytes(), height, width, RAW, tuple(notes))
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", quality=encoding.quality)
    return Stored(encoded.getvalue(), height, width, JPG, (*notes, ENCODED))


def _is_turned(image: Image.Image) -> bool:
    """Whether an EXIF tag asks to rotate or mirror the pixels."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data raises anything, but leaves the pixels intact
        return False
    # A TIFF's pixels are turned by Pillow itself
    return image.format != "TIFF" and orientation in range(2, 9)


def _pixels_of(image: Image.Image, rotate: bool, mode: str, notes: list[str]) -> np.ndarray:
    """8-bit pixels of the first frame, of mode L or RGB; what had to change goes to `notes`."""
    if image.format != "MPO" and getattr(image, "is_animated", False):
        notes.append("several frames, first one taken")
    if rotate:
        image = ImageOps.exif_transpose(image)
    if image.mode == "CMYK":
        notes.append("CMYK converted to RGB")
    if image.mode == "F":
        raise BrokenImageError("floating-point pixels, expected 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise BrokenImageError("32-bit pixels, expected 8 or 16 bits")
        notes.append("16 bits reduced to 8")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        # The colour of transparent pixels is arbitrary, and convert("RGB") would show it
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            notes.append("transparency laid over white")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert(mode))


def _shrink(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pillow's antialiased bicubic resampling, channel by channel unless it is RGB."""
    if pixels.shape[2] == 3:
        return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
    planes = [
        Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC)
        for plane in np.ascontiguousarray(pixels.transpose(2, 0, 1))
    ]
    return np.stack(planes, axis=2)


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether every libjpeg decodes it to RGB: Huffman-coded, lossy, 8 bits, gray or 3 channels."""
    position = 2
    while position + 9 < len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # the frame header
            return marker <= 0xC2 and data[position + 4] == 8 and data[position + 9] in (1, 3)
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return False


def jpeg_problem(jpeg: bytes, height: int, width: int) -> str | None:
    """What libjpeg-turbo, the loader's decoder, reports of an RGB or gray JPEG; None: nothing.

    Pillow cannot tell: it ignores libjpeg's warnings, and shows gray where the data is corrupt.
    """
    turbo = _turbojpeg()
    pixels, sizes = np.empty(height * width * 3, np.uint8), np.empty(4, np.int32)
    address, handle = sizes.ctypes.data, turbo.tjInitDecompress()
    try:
        at = (address, address + 4, address + 8, address + 12)
        failed = turbo.tjDecompressHeader3(handle, jpeg, len(jpeg), *at)
        if not failed or turbo.tjGetErrorCode(handle) == TJERR_WARNING:
            if tuple(sizes[:2]) != (width, height):
                return f"{sizes[0]} x {sizes[1]} pixels, expected {width} x {height}"
            failed = turbo.tjDecompress2(
                handle, jpeg, len(jpeg), pixels.ctypes.data, width, 0, height, TJPF_RGB, 0
            )
        return turbo.tjGetErrorStr2(handle).decode() if failed else None
    finally:
        turbo.tjDestroy(handle)


def is_harmless(problem: str) -> bool:
    """Whether the loader shows such an image, as Pillow does; otherwise it refuses it."""
    return re.match(r"Corrupt JPEG data: \d+ extraneous bytes", problem) is not None


@functools.cache
def _turbojpeg() -> ctypes.CDLL:
    """The loader's decoder as in `kernels`, but without numba's start-up time."""
    turbo = load_turbojpeg(ctypes.CDLL)
    address, size, number = ctypes.c_void_p, ctypes.c_ulong, ctypes.c_int
    turbo.tjInitDecompress.restype = address
    turbo.tjDestroy.argtypes = [address]
    turbo.tjGetErrorCode.argtypes = [address]
    turbo.tjGetErrorStr2.argtypes = [address]
    turbo.tjGetErrorStr2.restype = ctypes.c_char_p
    turbo.tjDecompressHeader3.argtypes = [address, ctypes.c_char_p, size, *[address] * 4]
    turbo.tjDecompress2.argtypes = [address, ctypes.c_char_p, size, address, *[number] * 5]
    return turbo
