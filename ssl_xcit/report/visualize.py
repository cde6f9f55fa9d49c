"""Pictures of what a network sees: class attention per head, and patch tokens as colours.

XCiT's own attention is between channels and has no map; where its class token looks is the softmax
of the last class-attention layer, one map per head. The patch tokens' first three principal
components, as red, green and blue, show which parts of an image are alike to the network.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Real, UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from ssl_xcit.data.beton import Beton
from ssl_xcit.data.datasets import check_channels
from ssl_xcit.data.images import open_source
from ssl_xcit.data.pixels import normalise
from ssl_xcit.evaluation.features import evaluating
from ssl_xcit.evaluation.subject import Subject, checkpoint_subject
from ssl_xcit.report.config import VisualizeConfig
from ssl_xcit.report.preview import FAINT, FONT_SIZE, GAP, INK, LINE, MARGIN, PAPER
from ssl_xcit.runtime import distributed
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.runtime.files import new_file
from ssl_xcit.runtime.precision import autocast, settled

AS_STORED = 480  # pixels: the longest side of an image whose size nobody asked for
CELL = 240  # pixels: about the longest side of one map in a picture
HEADS_IN_A_ROW = 8
# From dark to light in even steps of lightness, so that it reads in gray and for the colour-blind
RAMP = ("#0d0b26", "#43146b", "#8f2469", "#d54a4a", "#f5923e", "#fbe7a1")


class Picture(NamedTuple):
    """An image to look at, and what it is called."""

    name: str
    pixels: UInt8[np.ndarray, "h w c"]


class Look(NamedTuple):
    """What a network sees in one image, patch by patch, on the CPU."""

    picture: Picture  # at the size that the network saw
    attention: Float[Tensor, "heads rows columns"]  # of the class token, before any scaling
    tokens: Float[Tensor, "rows columns d"]


def visualize(config: VisualizeConfig) -> list[Path]:
    """Draw what `config` asks for, and return the files that were written.

    Raises UserError for a checkpoint that is no backbone, an image that cannot be read or has other
    channels than the network's, and an `out` that cannot be written.
    """
    ranks = distributed.setup(config.device)
    try:
        config = settled(config, ranks)
        return _visualize(config, ranks.device) if ranks.rank == 0 else []
    finally:
        distributed.teardown()


def _visualize(config: VisualizeConfig, device: torch.device) -> list[Path]:
    subject = checkpoint_subject(config.checkpoint, config.arch, config.role)
    subject.backbone.to(device)
    pictures = read_pictures(config.images, subject.in_chans, config.limit)
    looks: Iterable[Look] = (
        look(subject, picture, config.size, device, config.precision) for picture in pictures
    )
    joint = None
    if config.pca == "joint":
        looks = list(looks)
        joint = PatchColours.fit(looks)
    strips = ((a.picture.name, draw(a, joint or PatchColours.fit([a]), config)) for a in looks)
    out = Path(config.out)
    if out.suffix.lower() == ".png":
        return [_write(stacked([strip for _, strip in strips]), out)]
    written: list[Path] = []
    for name, strip in strips:
        stem = Path(name.replace("/", "_")).stem
        names = (f"{stem}{end}.png" for end in ("", *(f"_{k}" for k in range(2, len(written) + 2))))
        path = next(out / name for name in names if out / name not in written)
        written.append(_write(strip, path))
    return written


def _write(picture: Image.Image, path: Path) -> Path:
    """Store it as a PNG, complete or not at all, and say where."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --out") from error
    with new_file(path, overwrite=True) as file:
        picture.save(file, "PNG")
    print(path)
    return path


# Images


def read_pictures(paths: Sequence[str], channels: int, limit: int) -> Iterator[Picture]:
    """The images at `paths`, for a network of `channels`; of a folder or .beton at most `limit`.

    Raises UserError that names what cannot be read.
    """
    for path in map(Path, paths):
        if path.is_dir():
            source = open_source(path, labels=False)
            for i in spread(source.size, limit).tolist():
                where = path / source.name(i)
                yield Picture(source.name(i), _decode(source.read(i), channels, where))
        elif path.suffix == ".beton":
            beton = Beton(path)
            check_channels(channels, beton)
            for i in spread(len(beton), limit).tolist():
                pixels = beton.decode(i)
                # Pillow gives a gray JPEG three channels
                yield Picture(f"{path.stem}_{i}", pixels[:, :, :channels])
        else:
            try:
                data = path.read_bytes()
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror}") from error
            yield Picture(path.name, _decode(data, channels, path))


def spread(count: int, limit: int) -> Real[np.ndarray, " k"]:
    """Indices of min(count, limit) of `count` things, evenly spread; limit 0: of all."""
    k = min(count, limit or count)
    return (2 * np.arange(k) + 1) * count // (2 * k)


def _decode(data: bytes, channels: int, where: Path) -> UInt8[np.ndarray, "h w c"]:
    """Pixels of an image file, turned as its EXIF says."""
    if channels not in (1, 3):
        raise UserError(
            f"{where}: an image file has 1 or 3 channels, the network takes {channels}: give it a "
            ".beton of such images"
        )
    try:
        with Image.open(io.BytesIO(data)) as image:
            turned = ImageOps.exif_transpose(image).convert("RGB" if channels == 3 else "L")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: expected an image that Pillow can read: {error}") from error
    return np.atleast_3d(np.asarray(turned))


def seen_size(width: int, height: int, size: int, patch_size: int) -> tuple[int, int]:
    """(width, height) at which a network looks at an image: whole patches, its aspect ratio kept.

    The longest side becomes `size`, 0 = what it is, at most AS_STORED; then both sides go to the
    nearest multiple of `patch_size`.
    """
    longest = size or min(max(width, height), AS_STORED)
    patches = (side * longest / max(width, height) / patch_size for side in (width, height))
    width, height = (patch_size * max(1, int(number + 0.5)) for number in patches)
    return width, height


def resized(
    pixels: UInt8[np.ndarray, "h w c"], width: int, height: int
) -> UInt8[np.ndarray, "height width c"]:
    """Pillow's antialiased bicubic resampling, of any number of channels."""
    planes = [
        Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC)
        for plane in np.ascontiguousarray(pixels.transpose(2, 0, 1))
    ]
    return np.stack([np.asarray(plane) for plane in planes], axis=2)


# What the network sees


@torch.inference_mode()
def look(
    subject: Subject, picture: Picture, size: int, device: torch.device, precision: str = "fp32"
) -> Look:
    """Class attention and patch tokens of one image; `size` as in `seen_size`.

    The backbone is on `device`. Raises UserError if it has diverged.
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
            f"{picture.name}: what the network makes of it is not finite: it has diverged; take an "
            "earlier checkpoint"
        )
    grid = (height // backbone.patch_size, width // backbone.patch_size)
    return Look(
        Picture(picture.name, pixels), attention.unflatten(1, grid), tokens.unflatten(0, grid)
    )


class PatchColours(NamedTuple):
    """Patch tokens to colours: their first three principal components as red, green and blue.

    A component has a sign only by convention. Here it is the one by which patches that the class
    token looks at are brighter: the covariance of component and attention is not negative.
    """

    mean: Float64[Tensor, " d"]
    axes: Float64[Tensor, "d 3"]
    low: Float64[Tensor, " 3"]
    high: Float64[Tensor, " 3"]

    @classmethod
    def fit(cls, looks: Sequence[Look]) -> "PatchColours":
        """The components of all patch tokens of `looks`, in float64.

        A colour runs from the component's 1st to its 99th percentile.
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
        """Where the tokens are along the three axes."""
        return (tokens.double() - self.mean) @ self.axes

    def __call__(self, tokens: Float[Tensor, "... d"]) -> Float64[Tensor, "... 3"]:
        """Colours in [0, 1]; middle gray where all tokens are alike."""
        width = self.high - self.low
        flat = width <= 1e-12 * self.mean.abs().max()
        colours = (self.components(tokens) - self.low) / width.where(~flat, 1.0)
        return colours.where(~flat, 0.5).clamp(0, 1)


# Pictures of one pixel per patch


def colour_picture(colours: Float64[Tensor, "rows columns 3"]) -> Image.Image:
    """Colours in [0, 1] as an image."""
    return Image.fromarray((255 * colours.numpy()).round().astype(np.uint8))


def attention_pictures(
    attention: Float[Tensor, "heads rows columns"], shared: bool = False
) -> list[Image.Image]:
    """Each head's map in the colours of RAMP: over its own range, or all heads' if `shared`."""
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


def shown(pixels: UInt8[np.ndarray, "h w c"]) -> Image.Image:
    """An image to look at: one channel as gray, of more than three the first three."""
    rgb = pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., :1].repeat(3, axis=-1)
    return Image.fromarray(np.ascontiguousarray(rgb))


# The pictures that are written


def draw(a: Look, colours: PatchColours, config: VisualizeConfig) -> Image.Image:
    """One image as a strip: itself, the colours of its patches, a map for each head."""
    attention = a.attention.mean(0, keepdim=True) if config.heads == "mean" else a.attention
    heads, rows, columns = attention.shape
    zoom = max(1, round(CELL / max(rows, columns)))  # whole pixels a patch: all squares alike
    cell = (zoom * columns, zoom * rows)
    filter_ = Image.Resampling[config.upsample.upper()]
    maps = attention_pictures(attention, config.scale == "shared")
    captions = [f"head {k + 1}" for k in range(heads)]
    if config.heads == "mean":
        captions = ["mean of the heads"]
    peaks = [f"up to {100 * peak:.2g} %" for peak in attention.amax((1, 2)).tolist()]
    cells = [
        (shown(a.picture.pixels).resize(cell, _image_filter(a, cell)), "image", ""),
        (colour_picture(colours(a.tokens)).resize(cell, filter_), "patch tokens", "PCA"),
        *((m.resize(cell, filter_), c, p) for m, c, p in zip(maps, captions, peaks, strict=True)),
    ]
    font = ImageFont.load_default(FONT_SIZE)
    texts = max(int(font.getlength(f"{b}  {c}")) + 1 for _, b, c in cells)
    pitch = (max(cell[0], texts) + GAP, LINE + cell[1] + 2 * GAP)
    lines = -(-heads // HEADS_IN_A_ROW)
    height, width = a.picture.pixels.shape[:2]
    title = f"{a.picture.name}: {width} x {height} pixels, {columns} x {rows} patches"
    across = 2 + min(heads, HEADS_IN_A_ROW)
    size = (
        2 * MARGIN + max(across * pitch[0] - GAP, int(font.getlength(title)) + 1),
        2 * MARGIN + LINE + GAP + lines * pitch[1] - 2 * GAP,
    )
    _check_area(size)
    strip = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(strip)
    pen.text((MARGIN, MARGIN), title, INK, font)
    for k, (image, caption, note) in enumerate(cells):
        place, line = (k, 0) if k < 2 else (2 + (k - 2) % HEADS_IN_A_ROW, (k - 2) // HEADS_IN_A_ROW)
        x, y = MARGIN + place * pitch[0], MARGIN + LINE + GAP + line * pitch[1]
        pen.text((x, y), caption, INK, font)
        pen.text((x + font.getlength(f"{caption}  "), y), note, FAINT, font)
        strip.paste(image, (x, y + LINE))
    return strip


def stacked(strips: Sequence[Image.Image]) -> Image.Image:
    """All strips below each other."""
    size = (max(s.width for s in strips), sum(s.height - MARGIN for s in strips) + MARGIN)
    _check_area(size)
    sheet = Image.new("RGB", size, PAPER)
    y = 0
    for strip in strips:
        sheet.paste(strip, (0, y))
        y += strip.height - MARGIN
    return sheet


def _image_filter(a: Look, cell: tuple[int, int]) -> Image.Resampling:
    """Pixels as squares where they are enlarged: what the network sees is no finer."""
    grows = cell[0] > a.picture.pixels.shape[1]
    return Image.Resampling.NEAREST if grows else Image.Resampling.LANCZOS


def _check_area(size: tuple[int, int]) -> None:
    if size[0] * size[1] > Image.MAX_IMAGE_PIXELS:
        raise UserError(
            f"the picture would have {size[0]:,} x {size[1]:,} pixels, more than the "
            f"{Image.MAX_IMAGE_PIXELS:,} that Pillow opens: lower --limit"
        )
