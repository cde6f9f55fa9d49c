"""Pictures of what a network sees: class attention per head, and patch tokens as colours.

XCA attends between channels and has no map. The maps are those of the last class-attention layer:
the softmax weights of the cls token over the patch tokens, one map per head. The first three
principal components of the patch tokens, as red, green and blue, show which parts of an image look
alike to the network.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Real, UInt8
from PIL import Image
from torch import Tensor

from ssl_xcit.data.beton import Beton
from ssl_xcit.data.datasets import check_channels
from ssl_xcit.data.images import BrokenImageError, decode, guarded
from ssl_xcit.data.pixels import normalise
from ssl_xcit.data.sources import open_source, read_file
from ssl_xcit.evaluation.features import evaluating
from ssl_xcit.evaluation.subject import Subject, checkpoint_subject
from ssl_xcit.report.config import VisualizeConfig
from ssl_xcit.report.sheet import Cell, stacked, strip, to_image
from ssl_xcit.runtime import distributed
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.runtime.files import make_folder, new_file
from ssl_xcit.runtime.precision import autocast, settled

AS_STORED = 480  # pixels: the longest side of an image if --size does not say
CELL = 240  # pixels: about the longest side of a map in a picture
HEADS_IN_A_ROW = 8
# From dark to light in even steps of lightness: legible in gray and to the colour-blind
RAMP = ("#0d0b26", "#43146b", "#8f2469", "#d54a4a", "#f5923e", "#fbe7a1")


class Picture(NamedTuple):
    """An image and its name."""

    name: str
    pixels: UInt8[np.ndarray, "h w c"]


class Look(NamedTuple):
    """What a network sees in one image, patch by patch, on the CPU."""

    picture: Picture  # at the size that the network saw
    attention: Float[Tensor, "heads rows columns"]  # of the cls token, not scaled
    tokens: Float[Tensor, "rows columns d"]


def visualize(config: VisualizeConfig) -> list[Path]:
    """Draw the pictures and return the files.

    Raises UserError for a checkpoint without a backbone, an image that cannot be read or has other
    channels than the network takes, and an `out` that cannot be written.
    """
    ranks = distributed.setup(config.device)
    try:
        config = settled(config, ranks)
        return _visualize(config, ranks.device) if ranks.rank == 0 else []
    finally:
        distributed.teardown()


def _visualize(config: VisualizeConfig, device: torch.device) -> list[Path]:
    subject = checkpoint_subject(config.checkpoint, config.arch, config.role, config.prefix)
    subject.backbone.to(device)
    pictures = read_pictures(config.images, subject.in_chans, config.limit)
    looks: Iterable[Look] = (
        look(subject, picture, config.size, device, config.precision) for picture in pictures
    )
    joint = None
    if config.pca == "joint":
        looks = list(looks)
        joint = PatchColours.fit(looks)
    drawn = ((a.picture.name, draw(a, joint or PatchColours.fit([a]), config)) for a in looks)
    out = Path(config.out)
    if out.suffix.lower() == ".png":
        return [_write(stacked([picture for _, picture in drawn]), out)]
    written: list[Path] = []
    for name, picture in drawn:
        stem = Path(name.replace("/", "_")).stem
        path, number = out / f"{stem}.png", 1
        while path in written:
            number += 1
            path = out / f"{stem}_{number}.png"
        written.append(_write(picture, path))
    return written


def _write(picture: Image.Image, path: Path) -> Path:
    """Store a PNG, complete or not at all, and print its path."""
    make_folder(path.parent)
    with new_file(path) as file:
        picture.save(file, "PNG")
    print(path)
    return path


# Images


def read_pictures(paths: Sequence[str], channels: int, limit: int) -> Iterator[Picture]:
    """The images at `paths` with `channels` channels; at most `limit` of a folder or .beton.

    Raises UserError that names an image which cannot be read.
    """
    for path in map(Path, paths):
        if path.suffix == ".beton" and not path.is_dir():
            beton = Beton(path)
            check_channels(channels, beton)
            for i in spread(len(beton), limit).tolist():
                # Pillow gives a gray JPEG three channels
                yield Picture(f"{path.stem}_{i}", beton.decode(i)[:, :, :channels])
            continue
        folder, names = path.parent, [path.name]
        if path.is_dir():
            source = open_source(path, labels=False)
            folder, names = path, map(source.name, spread(source.size, limit).tolist())
        for name in names:
            yield Picture(name, _decode(folder / name, channels))


def spread(count: int, limit: int) -> Real[np.ndarray, " k"]:
    """Indices of min(count, limit) out of `count` things, evenly spread; limit 0: all."""
    k = min(count, limit or count)
    return (2 * np.arange(k) + 1) * count // (2 * k)


def _decode(path: Path, channels: int) -> UInt8[np.ndarray, "h w c"]:
    """Pixels of an image file, in its EXIF orientation."""
    try:
        with guarded():
            return decode(read_file(path), channels, exif="rotate")
    except BrokenImageError as error:
        raise UserError(f"{path}: cannot be read as an image: {error}") from error


def seen_size(width: int, height: int, size: int, patch_size: int) -> tuple[int, int]:
    """(width, height) of the network's input: whole patches, about the image's aspect ratio.

    The longest side becomes `size` (0: as stored, at most AS_STORED), then both sides are rounded
    to the nearest multiple of `patch_size`.
    """
    longest = size or min(max(width, height), AS_STORED)
    patches = (side * longest / max(width, height) / patch_size for side in (width, height))
    width, height = (patch_size * max(1, int(number + 0.5)) for number in patches)
    return width, height


def resized(
    pixels: UInt8[np.ndarray, "h w c"], width: int, height: int
) -> UInt8[np.ndarray, "height width c"]:
    """Pillow's antialiased bicubic resampling, for any number of channels."""
    planes = (Image.fromarray(plane) for plane in np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    size = width, height
    return np.dstack([plane.resize(size, Image.Resampling.BICUBIC) for plane in planes])


# What the network sees


@torch.inference_mode()
def look(
    subject: Subject, picture: Picture, size: int, device: torch.device, precision: str = "fp32"
) -> Look:
    """Class attention and patch tokens of one image; `size` as in `seen_size`.

    The backbone must be on `device`. Raises UserError if its outputs are not finite.
    """
    backbone = subject.backbone
    height, width, _ = picture.pixels.shape
    width, height = seen_size(width, height, size, backbone.patch_size)
    pixels = resized(picture.pixels, width, height)
    batch = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None].to(device)
    batch = normalise(batch, subject.mean, subject.std)
    with evaluating(backbone), autocast(device, precision):
        attention = backbone.class_attention(batch)[0].float().cpu()
        tokens = backbone.forward_features(batch)[1][0].float().cpu()
    if not (attention.isfinite().all() and tokens.isfinite().all()):
        raise UserError(
            f"{picture.name}: the network's outputs are not finite, so it has diverged: take an "
            "earlier checkpoint"
        )
    grid = (height // backbone.patch_size, width // backbone.patch_size)
    shown = Picture(picture.name, pixels)
    return Look(shown, attention.unflatten(1, grid), tokens.unflatten(0, grid))


class PatchColours(NamedTuple):
    """Maps patch tokens to colours: their first three principal components as red, green, blue.

    The sign of a component is arbitrary. Here patches that the cls token attends to are brighter:
    the covariance of component and attention is not negative.
    """

    mean: Float64[Tensor, " d"]
    axes: Float64[Tensor, "d 3"]
    low: Float64[Tensor, " 3"]
    high: Float64[Tensor, " 3"]

    @classmethod
    def fit(cls, looks: Sequence[Look]) -> "PatchColours":
        """Fit the components of all patch tokens of `looks`, in float64.

        A colour spans the 1st to the 99th percentile of its component.
        """
        tokens = torch.cat([a.tokens.flatten(0, 1) for a in looks]).double()
        attention = torch.cat([a.attention.mean(0).flatten() for a in looks]).double()
        mean = tokens.mean(0)
        tokens = tokens - mean
        axes = torch.linalg.eigh(tokens.mT @ tokens).eigenvectors[:, -3:].flip(1)
        components = tokens @ axes
        negative = (attention - attention.mean()) @ components < 0
        signs = torch.where(negative, -1.0, 1.0).double()
        low, high = np.percentile((components * signs).numpy(), (1, 99), axis=0)
        return cls(mean, axes * signs, torch.from_numpy(low), torch.from_numpy(high))

    def components(self, tokens: Float[Tensor, "... d"]) -> Float64[Tensor, "... 3"]:
        """The tokens' coordinates along the three axes."""
        return (tokens.double() - self.mean) @ self.axes

    def __call__(self, tokens: Float[Tensor, "... d"]) -> Float64[Tensor, "... 3"]:
        """Colours in [0, 1]; middle gray if all tokens are equal."""
        width = self.high - self.low
        flat = width <= 1e-12 * self.mean.abs().max()
        colours = (self.components(tokens) - self.low) / width.where(~flat, 1.0)
        return colours.where(~flat, 0.5).clamp(0, 1)


# Pictures with one pixel per patch


def colour_picture(colours: Float64[Tensor, "rows columns 3"]) -> Image.Image:
    """Colours in [0, 1] as an image."""
    return Image.fromarray((255 * colours.numpy()).round().astype(np.uint8))


def attention_pictures(
    attention: Float[Tensor, "heads rows columns"], shared: bool = False
) -> list[Image.Image]:
    """Each head's map in the colours of RAMP, over its own range or, if `shared`, all heads'."""
    stops = [tuple(bytes.fromhex(colour[1:])) for colour in RAMP]
    ramp = np.array(stops, np.float64)  # (stops, 3)
    places = np.linspace(0, 1, len(ramp))
    pictures = []
    for head in attention:
        of = attention if shared else head
        low, high = of.min().item(), of.max().item()
        level = (head.double().numpy() - low) / ((high - low) or 1.0)
        channels = [np.interp(level, places, ramp[:, c]) for c in range(3)]
        pictures.append(Image.fromarray(np.stack(channels, axis=2).round().astype(np.uint8)))
    return pictures


# The pictures that are written


def draw(a: Look, colours: PatchColours, config: VisualizeConfig) -> Image.Image:
    """A strip for one image: the image, its patches as colours, a map per head."""
    attention, captions = a.attention, [f"head {k + 1}" for k in range(len(a.attention))]
    if config.heads == "mean":
        attention, captions = attention.mean(0, keepdim=True), ["mean of the heads"]
    rows, columns = attention.shape[1:]
    zoom = max(1, round(CELL / max(rows, columns)))  # whole pixels per patch: equal squares
    size = (zoom * columns, zoom * rows)
    height, width = a.picture.pixels.shape[:2]
    # Enlarged pixels are drawn as squares: the network sees nothing finer
    sharp = Image.Resampling.NEAREST if size[0] > width else Image.Resampling.LANCZOS
    smooth = Image.Resampling[config.upsample.upper()]
    first = [
        Cell(to_image(a.picture.pixels).resize(size, sharp), "image"),
        Cell(colour_picture(colours(a.tokens)).resize(size, smooth), "patch tokens", "PCA"),
    ]
    maps = attention_pictures(attention, config.scale == "shared")
    peaks = [f"up to {100 * peak:.2g} %" for peak in attention.amax((1, 2)).tolist()]
    heads = [
        Cell(image.resize(size, smooth), caption, peak)
        for image, caption, peak in zip(maps, captions, peaks, strict=True)
    ]
    title = f"{a.picture.name}: {width} x {height} pixels, {columns} x {rows} patches"
    return strip(title, first, heads, HEADS_IN_A_ROW)
