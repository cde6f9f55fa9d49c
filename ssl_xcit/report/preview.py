"""What the model sees: a picture of stored images and their views, `ssl-xcit data preview`.

A strip for each of the first images that a training with this seed sees in this epoch: the stored
image, then the very bytes that the training's loader makes of it. One pixel of a view is one pixel
of the picture, or a square of them if the views are small.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from ssl_xcit.data.beton import Beton
from ssl_xcit.data.loader import MultiCropLoader
from ssl_xcit.data.views import Recipe, dino_views
from ssl_xcit.dino.config import Crops, read_crops
from ssl_xcit.report.sheet import GAP, LINE, Cell, check_area, stacked, strip, to_image
from ssl_xcit.runtime.errors import UserError, exit_on_user_error
from ssl_xcit.runtime.files import new_file

EMPTY = "#d0d0d0"  # in place of a corrupt image
SMALLEST, LARGEST = 64, 256
"""Views are enlarged until the smallest has SMALLEST pixels a side, the largest at most LARGEST."""


class Sample(NamedTuple):
    """An image and its views by name; `stored` is None if it is corrupt: then another's views."""

    index: int
    stored: UInt8[np.ndarray, "_h _w c"] | None
    views: dict[str, UInt8[np.ndarray, "_side _side c"]]


def write_preview(
    path: str | Path,
    out: str | Path,
    *,
    crops: Crops | None = None,
    images: int = 8,
    seed: int = 0,
    epoch: int = 0,
) -> tuple[int, int, int]:
    """Draw at most `images` of a .beton file with the views of a training into the PNG `out`.

    `crops`: settings of the views, by default DINO's. An existing picture is replaced, whole or not
    at all. Returns the number of images, and the picture's width and height in pixels.

    Raises UserError for a bad argument, an unreadable file, too large a picture, and an `out` that
    cannot be written.
    """
    out, crops = Path(out), crops or Crops()
    if out.suffix.lower() != ".png":
        raise UserError(f"{out}: a preview is a PNG, expected a name that ends in .png")
    for name, value, least in (("images", images, 1), ("seed", seed, 0), ("epoch", epoch, 0)):
        if not least <= value < 2**63:
            raise UserError(f"{name} must be in [{least}, 2^63), got {value}")
    beton = Beton(path)
    images = min(images, len(beton))
    picture = draw_views(beton, dino_views(**crops.view_arguments()), images, seed, epoch)
    with new_file(out) as file:
        picture.save(file, "PNG")
    return images, *picture.size


def draw_views(beton: Beton, recipe: Recipe, images: int, seed: int, epoch: int) -> Image.Image:
    """The picture: a strip for each image, with its global views beside its local ones."""
    sides = [view.size for group in recipe for view in group]
    zoom = max(1, min(-(-SMALLEST // min(sides)), LARGEST // max(sides)))
    box = zoom * max(sides)
    check_area(box, images * box)  # before any view is made
    lines = max(1, (LINE + box + 2 * GAP) // (LINE + zoom * min(sides) + 2 * GAP))  # of local views

    def enlarged(image: Image.Image) -> Image.Image:
        return image.resize([zoom * side for side in image.size], Image.Resampling.NEAREST)

    strips = []
    for index, stored, views in first_samples(beton, recipe, images, seed, epoch):
        size = f"{beton.widths[index]} x {beton.heights[index]} pixels"
        if stored is None:
            image = Image.new("RGB", (box, box), EMPTY)
            size = "corrupt, the views are of another image"
        elif zoom * max(stored.shape[:2]) <= box:
            image = enlarged(to_image(stored))
        else:
            image = ImageOps.contain(to_image(stored), (box, box), Image.Resampling.LANCZOS)
        cells = [Cell(enlarged(to_image(view)), name) for name, view in views.items()]
        first, others = [Cell(image, "stored"), *cells[:2]], cells[2:]
        strips.append(strip(f"image {index:,}: {size}", first, others, -(-len(others) // lines)))
    title = (
        f"{beton.path.name}: {images:,} of {len(beton):,} images, seed {seed}, epoch {epoch}; "
        f"global views of {max(sides)} pixels"
        + (f", local views of {min(sides)}" if recipe[1] else "")
        + (f", enlarged {zoom} times" if zoom > 1 else "")
    )
    return stacked(strips, title)


def first_samples(beton: Beton, recipe: Recipe, images: int, seed: int, epoch: int) -> list[Sample]:
    """The first images of an epoch, with the views that training makes of them."""
    loader = MultiCropLoader(beton, recipe, images, seed=seed)
    loader.set_epoch(epoch)
    *groups, indices = next(iter(loader))
    loader.close()
    samples = []
    for row, index in enumerate(indices.tolist()):
        views = {
            f"{kind} {k}": view[row].movedim(0, -1).numpy()
            for kind, group in zip(("global", "local"), groups, strict=True)
            for k, view in enumerate(group, 1)
        }
        stored = None if index in loader.corrupt else beton.decode(index)
        samples.append(Sample(index, stored, views))
    return samples


def main(argv: Sequence[str] | None = None) -> None:
    """The command `ssl-xcit data preview`."""
    parser = argparse.ArgumentParser(
        prog="ssl-xcit data preview",
        description="Draw images and the views that training makes of them.",
    )
    parser.add_argument("file", help=".beton file")
    parser.add_argument("--out", required=True, metavar="PNG", help="picture to write or replace")
    parser.add_argument("--images", type=int, default=8, metavar="N", help="how many (8)")
    views = "settings of the views: a recipe of configs/ or a run's config.yaml (default: DINO's)"
    parser.add_argument("--config", metavar="FILE", help=views)
    parser.add_argument("--seed", type=int, default=0, help="random seed of the training (0)")
    parser.add_argument("--epoch", type=int, default=0, help="epoch of the training (0)")
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid Unicode
    with exit_on_user_error():
        crops = read_crops(args.config) if args.config else None
        shown, width, height = write_preview(
            args.file, args.out, crops=crops, images=args.images, seed=args.seed, epoch=args.epoch
        )
        print(f"wrote {args.out}: views of {shown:,} images, {width:,} x {height:,} pixels")
