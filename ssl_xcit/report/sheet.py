"""Sheets for PNG files: captioned images in strips, and strips below each other."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from ssl_xcit.runtime.errors import UserError

MARGIN, GAP, LINE, FONT_SIZE = 16, 6, 16, 12  # pixels
PAPER, INK, FAINT = "#ededed", "#202020", "#6a6a6a"  # on gray paper, white images stand out


class Cell(NamedTuple):
    """An image, the caption above it, and a fainter note behind the caption."""

    image: Image.Image
    caption: str
    note: str = ""


def to_image(pixels: UInt8[np.ndarray, "h w c"]) -> Image.Image:
    """Pixels as RGB: a single channel as gray, of more than three the first three."""
    rgb = pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., :1].repeat(3, axis=-1)
    return Image.fromarray(np.ascontiguousarray(rgb))


def strip(title: str, first: Sequence[Cell], others: Sequence[Cell], columns: int) -> Image.Image:
    """A titled row of the `first` cells, and to their right lines of `columns` other cells.

    Raises UserError if it is too large.
    """
    font = ImageFont.load_default(FONT_SIZE)
    top = MARGIN + LINE + GAP
    right, bottom, places = MARGIN, top, []
    for cells, across in ((first, len(first)), (others, min(columns, len(others)))):
        if not cells:
            continue
        texts = (math.ceil(font.getlength(f"{cell.caption}  {cell.note}")) for cell in cells)
        width = max(*texts, *(cell.image.width for cell in cells)) + GAP
        height = LINE + max(cell.image.height for cell in cells) + 2 * GAP
        for k, cell in enumerate(cells):
            places.append((cell, right + k % across * width, top + k // across * height))
        right += across * width
        bottom = max(bottom, top + math.ceil(len(cells) / across) * height)
    right = max(right - GAP, MARGIN + math.ceil(font.getlength(title)))
    picture = _paper(right + MARGIN, bottom - 2 * GAP + MARGIN)
    pen = ImageDraw.Draw(picture)
    pen.text((MARGIN, MARGIN), title, INK, font)
    for cell, x, y in places:
        pen.text((x, y), cell.caption, INK, font)
        pen.text((x + font.getlength(f"{cell.caption}  "), y), cell.note, FAINT, font)
        picture.paste(cell.image, (x, y + LINE))
    return picture


def stacked(strips: Sequence[Image.Image], title: str = "") -> Image.Image:
    """All strips below each other, and below a title. Raises UserError if it is too large."""
    font = ImageFont.load_default(FONT_SIZE)
    y = LINE + GAP if title else 0
    widths = [2 * MARGIN + math.ceil(font.getlength(title)), *(strip.width for strip in strips)]
    picture = _paper(max(widths), y + sum(strip.height - MARGIN for strip in strips) + MARGIN)
    for strip in strips:
        picture.paste(strip, (0, y))
        y += strip.height - MARGIN
    ImageDraw.Draw(picture).text((MARGIN, MARGIN), title, INK, font)
    return picture


def check_area(width: int, height: int) -> None:
    """Raise UserError if Pillow would refuse to open a picture of this size."""
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise UserError(
            f"the picture would have more than the {Image.MAX_IMAGE_PIXELS:,} pixels that Pillow "
            "opens: show fewer images"
        )


def _paper(width: int, height: int) -> Image.Image:
    check_area(width, height)
    return Image.new("RGB", (width, height), PAPER)
