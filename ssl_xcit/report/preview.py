"""What the model sees: a picture of stored images and of their views (`beton preview`).

A row per image, the first ones that a training with this seed sees in this epoch: the stored image,
then the very bytes that the training's loader makes of it. A pixel of a view is one of the picture,
or a square of them where views are too small to be seen.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from ssl_xcit.data.beton import Beton
from ssl_xcit.data.loader import MultiCropLoader
from ssl_xcit.data.views import Recipe, dino_views
from ssl_xcit.dino.config import Crops, read_crops
from ssl_xcit.runtime.errors import UserError, exit_on_user_error
from ssl_xcit.runtime.files import new_file

MARGIN, GAP, LINE, FONT_SIZE = 16, 6, 16, 12  # pixels
PAPER, INK, FAINT, EMPTY = "#ededed", "#202020", "#6a6a6a", "#d0d0d0"  # white views stand out
SEEN, ROOMY = 64, 256
"""Views are enlarged until the smallest has SEEN pixels a side, the largest at most ROOMY."""


def write_preview(
    path: str | Path,
    out: str | Path,
    *,
    crops: Crops | None = None,
    images: int = 8,
    seed: int = 0,
    epoch: int = 0,
) -> tuple[int, int, int]:
    """Draw the views of a .beton file's images into the PNG `out`, which appears complete or not.

    Args:
        path: the .beton file.
        out: the picture; one that is there is replaced.
        crops: settings of the views, by default DINO's.
        images: rows; a file of fewer images has fewer.
        seed, epoch: of the training whose views are shown.

    Returns:
        images shown, width and height of the picture.

    Raises:
        UserError: bad arguments, an unreadable file, too large a picture, or `out` cannot be
            written.
    """
    out = Path(out)
    if out.suffix.lower() != ".png":
        raise UserError(f"{out}: a preview is a PNG, expected a name that ends in .png")
    for name, value, least in (("images", images, 1), ("seed", seed, 0), ("epoch", epoch, 0)):
        if not least <= value < 2**63:
            raise UserError(f"{name} must be in [{least}, 2^63), got {value}")
    beton = Beton(path)
    recipe = dino_views(**(crops or Crops()).view_arguments())
    images = min(images, len(beton))
    picture = draw_views(beton, recipe, images, seed, epoch)
    with new_file(out, overwrite=True) as file:
        picture.save(file, "PNG")
    return images, *picture.size


def draw_views(beton: Beton, recipe: Recipe, images: int, seed: int, epoch: int) -> Image.Image:
    """The picture: `images` rows of DINO's two groups of views."""
    sides = [view.size for group in recipe for view in group]
    zoom = max(1, min(-(-SEEN // min(sides)), ROOMY // max(sides)))
    box = zoom * max(sides)  # the height of a row
    font = ImageFont.load_default(FONT_SIZE)
    columns = _columns(recipe, zoom, box)
    lefts, right = [], MARGIN
    for column in columns:
        lefts.append(right)
        texts = max(_width(font, column.title), _width(font, column.note))
        right += max(texts, column.width) + 3 * GAP
    title = f"{beton.path.name}: {images:,} of {len(beton):,} images, seed {seed}, epoch {epoch}"
    width = max(right - 3 * GAP, MARGIN + _width(font, title)) + MARGIN
    headings = MARGIN + LINE + GAP
    top = headings + 2 * LINE + GAP
    pitch = LINE + box + 3 * GAP
    height = top + images * pitch - 3 * GAP + MARGIN
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise UserError(
            f"the picture would have {width:,} x {height:,} pixels, more than the "
            f"{Image.MAX_IMAGE_PIXELS:,} that Pillow opens: show fewer --images"
        )

    indices, views, corrupt = first_views(beton, recipe, images, seed, epoch)
    picture = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((MARGIN, MARGIN), title, INK, font)
    for left, column in zip(lefts, columns, strict=True):
        pen.text((left, headings), column.title, INK, font)
        pen.text((left, headings + LINE), column.note, FAINT, font)
    for row, index in enumerate(indices):
        y = top + row * pitch
        caption = f"image {index:,}, {beton.widths[index]} x {beton.heights[index]}"
        if index in corrupt:
            caption = f"image {index:,} is corrupt, views of another"
            stored = Image.new("RGB", (box, box), EMPTY)
        else:
            stored = _fitted(_rgb(beton.decode(index)), zoom, box)
        pen.text((MARGIN, y), caption, FAINT, font)
        cells = iter([stored, *(_enlarged(_rgb(view), zoom) for view in views[row])])
        for left, column in zip(lefts, columns, strict=True):
            for across, down in column.places:
                picture.paste(next(cells), (left + across, y + LINE + down))
    return picture


@dataclass(frozen=True)
class _Column:
    """Images below a heading, stacked as far as a row is high."""

    title: str
    note: str
    places: list[tuple[int, int]]  # the images' corners, within a row of the column
    width: int


def _columns(recipe: Recipe, zoom: int, box: int) -> list[_Column]:
    """The stored image, each global view, all local views."""
    large, small = ([view.size for view in group] for group in recipe)
    enlarged = f", shown x{zoom}" if zoom > 1 else ""
    columns = [_Column("stored image", "thumbnail", [(0, 0)], box)]
    for k, size in enumerate(large):
        note = f"{size} px{enlarged}"
        columns.append(_Column(f"global view {k + 1}", note, [(0, 0)], zoom * size))
    if small:
        step = zoom * small[0] + GAP
        across = -(-len(small) // max(1, (box + GAP) // step))
        places = [(k % across * step, k // across * step) for k in range(len(small))]
        title = f"{len(small)} local view{'s' if small[1:] else ''}"
        note = f"{small[0]} px{enlarged}"
        columns.append(_Column(title, note, places, across * step - GAP))
    return columns


def first_views(
    beton: Beton, recipe: Recipe, images: int, seed: int, epoch: int
) -> tuple[list[int], list[list[UInt8[np.ndarray, "_h _w c"]]], set[int]]:
    """The epoch's first images: their indices, the views of each, and which are corrupt."""
    loader = MultiCropLoader(beton, recipe, images, seed=seed, prefetch=1)
    loader.set_epoch(epoch)
    *groups, indices = next(iter(loader))
    loader.close()
    views = [
        [view.movedim(0, -1).numpy() for group in groups for view in group[:, row]]
        for row in range(images)
    ]
    return indices.tolist(), views, set(loader.corrupt)


def _rgb(pixels: UInt8[np.ndarray, "h w c"]) -> Image.Image:
    """One channel as gray; of more than three, which may be anything, the first three."""
    shown = pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., :1].repeat(3, axis=-1)
    return Image.fromarray(np.ascontiguousarray(shown))


def _enlarged(image: Image.Image, zoom: int) -> Image.Image:
    """Each pixel a square of zoom x zoom."""
    return image.resize((zoom * image.width, zoom * image.height), Image.Resampling.NEAREST)


def _fitted(image: Image.Image, zoom: int, box: int) -> Image.Image:
    """On the scale of the views, or smaller when that would not fit into the box."""
    longer = max(image.size)
    if zoom * longer <= box:
        return _enlarged(image, zoom)
    return image.resize(
        [max(1, round(side * box / longer)) for side in image.size], Image.Resampling.LANCZOS
    )


def _width(font: ImageFont.ImageFont | ImageFont.FreeTypeFont, text: str) -> int:
    """Pixels."""
    return math.ceil(font.getlength(text))


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="ssl-xcit data preview", description="Draw images and the views that training makes."
    )
    parser.add_argument("file")
    parser.add_argument("--out", required=True, metavar="PNG", help="picture to write or replace")
    parser.add_argument("--images", type=int, default=8, metavar="N", help="how many (8)")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="whose views: a recipe of configs/, or a run's config.yaml (DINO's defaults)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the training shown (0)")
    parser.add_argument("--epoch", type=int, default=0, help="of the training shown (0)")
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid Unicode
    with exit_on_user_error():
        crops = read_crops(args.config) if args.config else None
        shown, width, height = write_preview(
            args.file, args.out, crops=crops, images=args.images, seed=args.seed, epoch=args.epoch
        )
        print(f"wrote {args.out}: views of {shown:,} images, {width:,} x {height:,} pixels")
