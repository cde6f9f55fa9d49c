"""The pictures of a report: views, class attention and PCA, nearest neighbours of sample images."""

import base64
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image

from ssl_xcit.data.beton import Beton
from ssl_xcit.data.datasets import Images, check_channels, evaluation_loader, open_images
from ssl_xcit.data.views import EvalView, dino_views
from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.evaluation.features import extract_features
from ssl_xcit.evaluation.knn import cosine_top_k
from ssl_xcit.evaluation.subject import Subject, checkpoint_subject
from ssl_xcit.finetune.config import FinetuneConfig
from ssl_xcit.models.flops import count_operations
from ssl_xcit.report.preview import first_views
from ssl_xcit.report.visualize import (
    PatchColours,
    Picture,
    attention_pictures,
    colour_picture,
    look,
    resized,
    shown,
    spread,
)
from ssl_xcit.runtime import distributed
from ssl_xcit.runtime.distributed import Distributed

SAMPLES = 6  # images that are shown
NEAREST = 5  # neighbours of each
VIEWED = 4  # images whose views are shown
LOOKED_AT = 320  # pixels: the longest side at which the network looks at a sample
THUMBNAIL = 160  # pixels: the longest side of a neighbour, or of a stored image
# Neighbours are searched among so many images, or on a CPU among those that cost so many
# multiply-adds, about ten seconds of one core
MOST_SEARCHED, LEAST_SEARCHED, CPU_BUDGET = 2000, 64, 2e11


class Shot(NamedTuple):
    """An image in the page."""

    image: Image.Image
    caption: str
    alt: str
    photo: bool = True  # or a map with a pixel per patch


class Sight(NamedTuple):
    """A sample, the colours of its patches, a map per head."""

    shots: list[Shot]
    note: str


class Query(NamedTuple):
    """A sample, and its nearest neighbours; `same`: whether they have its label, None: unknown."""

    shots: list[Shot]
    same: list[bool | None]


class Views(NamedTuple):
    """A stored image and what training makes of it; `widths` as shares of the largest view's."""

    shots: list[Shot]
    widths: list[float]


class Seen(NamedTuple):
    """What the network of a checkpoint makes of sample images."""

    network: str  # in words
    sights: list[Sight]
    queries: list[Query]
    searched: int  # images among which neighbours were looked for
    where: str  # they lie


def views(config: TrainConfig) -> list[Views]:
    """The first images that this training saw, and the very views that it made of them.

    Raises UserError where the images are gone.
    """
    beton = Beton(config.data)
    recipe = dino_views(**config.crops.view_arguments())
    largest = max(view.size for group in recipe for view in group)
    sizes = [view.size for group in recipe for view in group]
    count = min(VIEWED, len(beton))
    indices, made, corrupt = first_views(beton, recipe, count, config.seed, 0)
    names = ["global 1", "global 2", *(f"local {k + 1}" for k in range(len(sizes) - 2))]
    found = []
    for index, cut in zip(indices, made, strict=True):
        if index in corrupt:
            continue
        stored = thumbnail(beton.decode(index))
        shots = [Shot(stored, "stored", f"stored image {index}")]
        shots += [
            Shot(shown(pixels), name, f"{name} view of image {index}")
            for name, pixels in zip(names, cut, strict=True)
        ]
        found.append(Views(shots, [1.0, *(size / largest for size in sizes)]))
    return found


def seen(run: Path, config: TrainConfig | FinetuneConfig, device: str = "auto") -> Seen:
    """What the newest checkpoint of `run` makes of samples of its held-out images.

    Raises UserError where there is no checkpoint yet, or the images are gone.
    """
    subject = checkpoint_subject(run)
    train_path, test_path, view = _sources(config)
    pool = open_images(train_path, subject.in_chans)
    samples = pool if test_path == train_path else open_images(test_path, subject.in_chans)
    check_channels(subject.in_chans, pool, samples)
    ranks = distributed.setup(device)
    try:
        subject.backbone.to(ranks.device)
        chosen = spread(len(samples), min(SAMPLES, -(-len(samples) // 2)))
        sights = [_sight(subject, samples, i, ranks) for i in chosen.tolist()]
        among = spread(len(pool), _searched(subject, view.size, ranks))
        if samples is pool:  # an image is no neighbour of its own
            among = np.setdiff1d(among, chosen)
        queries = _queries(subject, (samples, chosen), (pool, among), view, ranks)
    finally:
        distributed.teardown()
    network = f"the {subject.facts['role']} after step {subject.facts['step']:,}"
    return Seen(network, sights, queries, len(among), Path(train_path).name)


def _sources(config: TrainConfig | FinetuneConfig) -> tuple[str, str, EvalView]:
    """Where neighbours come from, where samples come from, and how the network sees them.

    Those of the probe, or of the fine-tuning's test, as far as there are any.
    """
    if isinstance(config, FinetuneConfig):
        side = config.evaluation.eval_size or config.views.image_size
        view = EvalView(config.evaluation.eval_resize or side, side)
        return config.data, config.test, view
    probe, side = config.probe, config.crops.global_crops_size
    if probe.probe_train and probe.probe_test:
        view = EvalView(probe.probe_resize, probe.probe_crop)
        return probe.probe_train, probe.probe_test, view
    return config.data, config.data, EvalView(round(side * 256 / 224), side)


def _searched(subject: Subject, side: int, ranks: Distributed) -> int:
    """How many images to search: fewer of them where each costs more and there is no GPU."""
    if ranks.device.type != "cpu":
        return MOST_SEARCHED
    cost = count_operations(subject.backbone, side, side, conventional=False).multiply_adds
    return int(np.clip(CPU_BUDGET / cost, LEAST_SEARCHED, MOST_SEARCHED))


def _sight(subject: Subject, images: Images, index: int, ranks: Distributed) -> Sight:
    pixels = _pixels(images, index)
    longest = max(pixels.shape[:2])
    size = LOOKED_AT if longest > LOOKED_AT else 0
    a = look(subject, Picture(f"image {index}", pixels), size, ranks.device)
    height, width = a.picture.pixels.shape[:2]
    rows, columns, _ = a.tokens.shape
    label = _label(images, index)
    shots = [
        Shot(shown(a.picture.pixels), label or "image", f"sample image {index}"),
        Shot(
            colour_picture(PatchColours.fit([a])(a.tokens)),
            "patches",
            "its patch tokens: the first three principal components as red, green and blue",
            photo=False,
        ),
    ]
    shots += [
        Shot(picture, f"head {k + 1}", f"where head {k + 1} looks in it", photo=False)
        for k, picture in enumerate(attention_pictures(a.attention))
    ]
    return Sight(shots, f"{width} x {height} pixels, {columns} x {rows} patches")


def _queries(
    subject: Subject,
    samples: tuple[Images, Int64[np.ndarray, " q"]],
    pool: tuple[Images, Int64[np.ndarray, " n"]],
    view: EvalView,
    ranks: Distributed,
) -> list[Query]:
    """Each sample and its nearest images in the pool by the cosine of their cls tokens."""
    features = []
    for images, subset in (samples, pool):
        loader = evaluation_loader(
            images,
            view,
            64,
            ranks,
            mean=subject.mean,
            std=subject.std,
            dtype=torch.float32 if ranks.device.type == "cpu" else torch.uint8,
            subset=subset,
        )
        found = extract_features(subject.backbone, loader, ("cls",), ranks.device, "fp32")
        features.append(found["cls"])
    asked, known = features
    cosines, nearest = cosine_top_k(known.features, asked.features, NEAREST)
    queries = []
    for row, index in enumerate(asked.indices.tolist()):
        label = _label(samples[0], index)
        shots = [
            Shot(thumbnail(_pixels(samples[0], index)), label or "sample", f"sample image {index}")
        ]
        same: list[bool | None] = [None]
        for cosine, place in zip(cosines[row].tolist(), nearest[row].tolist(), strict=True):
            other = int(known.indices[place])
            name = _label(pool[0], other)
            caption = f"{name} {cosine:.3f}".strip()
            picture = thumbnail(_pixels(pool[0], other))
            shots.append(Shot(picture, caption, f"{name or 'image'} {other}, cosine {cosine:.3f}"))
            same.append(name == label if name and label else None)
        queries.append(Query(shots, same))
    return queries


def _pixels(images: Images, index: int) -> UInt8[np.ndarray, "h w c"]:
    """An image as it is stored, with the channels of its dataset."""
    pixels = np.atleast_3d(np.asarray(images.decode(index)))
    return pixels[:, :, : images.channels]


def _label(images: Images, index: int) -> str:
    """The name of its class; "" if it has none."""
    if images.labels is None:
        return ""
    label = int(images.labels[index])
    return images.class_names[label] if images.class_names else f"class {label}"


def thumbnail(pixels: UInt8[np.ndarray, "h w c"]) -> Image.Image:
    """The image, or a smaller one where its longest side exceeds THUMBNAIL."""
    height, width, _ = pixels.shape
    longest = max(height, width)
    if longest > THUMBNAIL:
        sides = (max(1, round(side * THUMBNAIL / longest)) for side in (width, height))
        pixels = resized(pixels, *sides)
    return shown(pixels)


def data_uri(image: Image.Image, photo: bool) -> str:
    """The image itself as an address: JPEG for what is large, PNG for what is small or a map."""
    jpeg = photo and image.width * image.height > 64 * 64
    buffer = io.BytesIO()
    if jpeg:
        image.save(buffer, "JPEG", quality=85)
    else:
        image.save(buffer, "PNG", optimize=True)
    kind = "jpeg" if jpeg else "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
