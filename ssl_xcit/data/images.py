"""How one image becomes pixels, and the JPEG bytes or pixels that are stored.

Folders (`ssl_xcit.data.datasets`) show the pixels that `ssl_xcit.data.writer` stores.
"""

import ctypes
import functools
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ssl_xcit.data.turbojpeg import load_turbojpeg
from ssl_xcit.runtime.errors import UserError

JPG, RAW = 0, 1
"""How an image is stored, as FFCV numbers it: a JPEG's bytes, or its pixels."""

MAX_SIDE = 65535
MAX_BYTES = 1 << 31
"""FFCV's limits: sides are u16, and an image fits one page, whose size is a u32 power of two."""
TINY = 64
"""Mode auto stores images up to this many pixels a side raw: a JPEG's tables take 600 bytes."""

KEPT = "JPEG bytes kept"
ENCODED = "encoded as JPEG"
EXTRANEOUS = "JPEG with extraneous bytes, perhaps damaged"

TJPF_RGB, TJERR_WARNING = 0, 0


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
    """An input that is no image; the message is the reason."""


@contextmanager
def guarded() -> Iterator[None]:
    """A context of reading or decoding one image: whatever it raises becomes BrokenImageError.

    A file may trigger any bug of any decoder, and must be reported by its name. UserError stays.
    """
    try:
        yield
    except (UserError, BrokenImageError):
        raise
    except UnidentifiedImageError as error:  # its own message holds an address of memory
        raise BrokenImageError("no format that Pillow knows") from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise BrokenImageError(reason) from error


def decode(
    item: bytes | np.ndarray, channels: int = 3, exif: Literal["ignore", "rotate"] = "ignore"
) -> UInt8[np.ndarray, "h w c"]:
    """Pixels of one image file's bytes, or of (h, w[, c]) pixels: those that `encode` stores.

    Gray and RGB JPEGs and PNGs of 8 bits are as Pillow converts them. `channels` and `exif` are
    those of `Encoding`. Raises as `encode` does.
    """
    opened = _opened(item)
    rotate = exif == "rotate" and isinstance(opened, Image.Image) and _is_turned(opened)
    return _pixels_of(opened, channels, rotate, [])


def encode(item: bytes | np.ndarray, encoding: Encoding) -> Stored:
    """One image file's bytes, or (h, w[, c]) pixels, in the form that is stored.

    Raises BrokenImageError, or whatever Pillow raises, for an `item` that cannot be read; UserError
    when libjpeg-turbo is missing.
    """
    notes: list[str] = []
    opened = _opened(item)
    is_jpeg, rotate = False, False
    if isinstance(opened, Image.Image):
        is_jpeg = opened.format in ("JPEG", "MPO")
        turned = _is_turned(opened)
        rotate = turned and encoding.exif == "rotate"
        if turned:
            notes.append(f"EXIF orientation {'applied' if rotate else 'ignored'}")
        size = opened.height, opened.width
        if is_jpeg and _is_plain_jpeg(item):
            if encoding.check == "full" and (problem := jpeg_problem(item, *size)):
                if not is_harmless(problem):
                    raise BrokenImageError(problem)
                notes.append(EXTRANEOUS)
            same_pixels = encoding.stored_size(*size) == size and not rotate
            if same_pixels and encoding.channels == 3 and encoding.mode != "raw":
                return Stored(item, *size, JPG, (*notes, KEPT))

    pixels = _pixels_of(opened, encoding.channels, rotate, notes)
    height, width = encoding.stored_size(*pixels.shape[:2])
    if (height, width) != pixels.shape[:2]:
        notes.append("shrunk")
        pixels = by_pillow(
            pixels, lambda image: image.resize((width, height), Image.Resampling.BICUBIC)
        )
    if not (height <= MAX_SIDE and width <= MAX_SIDE and pixels.nbytes <= MAX_BYTES):
        raise BrokenImageError(f"{width} x {height} pixels are too many")
    tiny = max(height, width) <= TINY and not is_jpeg
    if encoding.mode == "raw" or encoding.channels != 3 or (encoding.mode == "auto" and tiny):
        return Stored(pixels.tobytes(), height, width, RAW, tuple(notes))
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", quality=encoding.quality)
    return Stored(encoded.getvalue(), height, width, JPG, (*notes, ENCODED))


def _opened(item: bytes | np.ndarray) -> Image.Image | np.ndarray:
    """The image in a file's bytes, not yet decoded, or the array in them."""
    if isinstance(item, np.ndarray):
        return item
    if not item:
        raise BrokenImageError("the file is empty")
    if item.startswith(b"\x93NUMPY"):
        return np.load(io.BytesIO(item), allow_pickle=False)
    return Image.open(io.BytesIO(item))


def _is_turned(image: Image.Image) -> bool:
    """Whether an EXIF tag asks to rotate or mirror the pixels."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data raises anything, but leaves the pixels intact
        return False
    # A TIFF's pixels are turned by Pillow itself
    return image.format != "TIFF" and orientation in range(2, 9)


def _pixels_of(
    opened: Image.Image | np.ndarray, channels: int, rotate: bool, notes: list[str]
) -> UInt8[np.ndarray, "h w c"]:
    """8-bit pixels of an image or array; what had to change goes to `notes`."""
    if isinstance(opened, Image.Image):
        opened = _converted(opened, rotate, "L" if channels == 1 else "RGB", notes)
    pixels = opened[:, :, None] if opened.ndim == 2 else opened
    if pixels.dtype != np.uint8 or pixels.ndim != 3:
        raise BrokenImageError(f"expected uint8 (h, w, c), got {pixels.dtype} {pixels.shape}")
    if pixels.shape[2] == 1 and channels == 3:
        pixels = np.repeat(pixels, 3, axis=2)
    if pixels.shape[2] != channels:
        raise BrokenImageError(f"expected {channels} channels, got {pixels.shape[2]}")
    if pixels.size == 0:
        raise BrokenImageError(f"{pixels.shape[1]} x {pixels.shape[0]} pixels are too few")
    return pixels


def _converted(image: Image.Image, rotate: bool, mode: str, notes: list[str]) -> np.ndarray:
    """8-bit pixels of the first frame, of mode L or RGB."""
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


def by_pillow(
    pixels: UInt8[np.ndarray, "h w c"], transform: Callable[[Image.Image], Image.Image]
) -> UInt8[np.ndarray, "h2 w2 c"]:
    """A transform of Pillow images, channel by channel unless it is RGB."""
    if pixels.shape[2] == 3:
        return np.array(transform(Image.fromarray(pixels)))
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return np.stack([np.array(transform(Image.fromarray(plane))) for plane in planes], axis=2)


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
