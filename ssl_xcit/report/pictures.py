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
from ssl_xcit.models.flops import forward_flops
from ssl_xcit.report.preview import first_samples
from ssl_xcit.report.sheet import to_image
from ssl_xcit.report.visualize import (
    PatchColours,
    Picture,
    attention_pictures,
    colour_picture,
    look,
    spread,
)
from ssl_xcit.runtime import distributed
from ssl_xcit.runtime.distributed import Distributed

SAMPLES = 6  # images that are shown
NEAREST = 5  # neighbours of each
VIEWED = 4  # images whose views are shown
LOOKED_AT = 320  # pixels: the longest side of a sample as the network's input
THUMBNAIL = 160  # pixels: the longest side of a neighbour, or of a stored image
# Images searched for neighbours; on a CPU no more than this many multiply-adds can embed, which
# takes one core about ten seconds
MOST_SEARCHED, LEAST_SEARCHED, CPU_BUDGET = 2000, 64, 2e11


class Shot(NamedTuple):
    """An image of the page."""

    image: Image.Image
    caption: str
    alt: str
    photo: bool = True  # or a map with one pixel per patch
    same: bool | None = None  # of a neighbour: whether it has the sample's label, if both have one
    width: float = 1.0  # of a view: share of the largest view's width


class Seen(NamedTuple):
    """What the network of a checkpoint sees in sample images."""

    network: str  # in words
    sights: list[list[Shot]]  # for each sample: the image, its patches as colours, a map per head
    queries: list[list[Shot]]  # for each sample: the image, its nearest neighbours
    searched: int  # images among which neighbours were searched
    where: str  # name of their file or folder


def views(config: TrainConfig) -> list[list[Shot]]:
    """For each of the first images of a training: the stored image, the views it was made into.

    Raises UserError if the images are gone.
    """
    beton = Beton(config.data)
    recipe = dino_views(**config.crops.view_arguments())
    largest = max(view.size for group in recipe for view in group)
    rows = []
    for sample in first_samples(beton, recipe, min(VIEWED, len(beton)), config.seed, 0):
        if sample.stored is None:
            continue
        stored = Shot(thumbnail(sample.stored), "stored", f"stored image {sample.index}")
        made = [
            Shot(
                to_image(pixels),
                name,
                f"{name} view of image {sample.index}",
                width=len(pixels) / largest,
            )
            for name, pixels in sample.views.items()
        ]
        rows.append([stored, *made])
    return rows


def seen(run: Path, config: TrainConfig | FinetuneConfig, device: str = "auto") -> Seen:
    """What the newest checkpoint of `run` sees in some of its held-out images.

    Raises UserError if there is no checkpoint yet, or the images are gone.
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
        if samples is pool:  # an image is not its own neighbour
            among = np.setdiff1d(among, chosen)
        queries = _queries(subject, (samples, chosen), (pool, among), view, ranks)
    finally:
        distributed.teardown()
    side = subject.backbone.patch_size
    network = f"the {subject.facts['role']} after step {subject.facts['step']:,}"
    network += f"; its patches are {side} x {side} pixels"
    return Seen(network, sights, queries, len(among), Path(train_path).name)


def _sources(config: TrainConfig | FinetuneConfig) -> tuple[str, str, EvalView]:
    """Paths of the neighbours and of the samples, and the view of them that the network gets.

    Those of the probe, or of a fine-tuning's test, if there are any.
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
    """How many images to search: on a CPU fewer, the more each costs."""
    if ranks.device.type != "cpu":
        return MOST_SEARCHED
    image = torch.empty(1, subject.in_chans, side, side, device="meta")
    multiply_adds = forward_flops(subject.backbone, image)["Global"] / 2
    return int(np.clip(CPU_BUDGET / multiply_adds, LEAST_SEARCHED, MOST_SEARCHED))


def _sight(subject: Subject, images: Images, index: int, ranks: Distributed) -> list[Shot]:
    pixels = _pixels(images, index)
    size = LOOKED_AT if max(pixels.shape[:2]) > LOOKED_AT else 0
    a = look(subject, Picture(f"image {index}", pixels), size, ranks.device)
    rows, columns, _ = a.tokens.shape
    colours = colour_picture(PatchColours.fit([a])(a.tokens))
    described = "its patch tokens: the first three principal components as red, green and blue"
    heads = [
        Shot(picture, f"head {k + 1}", f"where head {k + 1} looks in it", photo=False)
        for k, picture in enumerate(attention_pictures(a.attention))
    ]
    return [
        Shot(to_image(a.picture.pixels), _label(images, index) or "image", f"sample image {index}"),
        Shot(colours, f"{columns} x {rows} patches", described, photo=False),
        *heads,
    ]


def _queries(
    subject: Subject,
    samples: tuple[Images, Int64[np.ndarray, " q"]],
    pool: tuple[Images, Int64[np.ndarray, " n"]],
    view: EvalView,
    ranks: Distributed,
) -> list[list[Shot]]:
    """Each sample and its nearest images of the pool by the cosine of their cls tokens."""
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
        sample = thumbnail(_pixels(samples[0], index))
        shots = [Shot(sample, label or "sample", f"sample image {index}")]
        for cosine, place in zip(cosines[row].tolist(), nearest[row].tolist(), strict=True):
            other = int(known.indices[place])
            name = _label(pool[0], other)
            shots.append(
                Shot(
                    thumbnail(_pixels(pool[0], other)),
                    f"{name} {cosine:.3f}".strip(),
                    f"{name or 'image'} {other}, cosine {cosine:.3f}",
                    same=name == label if name and label else None,
                )
            )
        queries.append(shots)
    return queries


def _pixels(images: Images, index: int) -> UInt8[np.ndarray, "h w c"]:
    """An image as stored, with the channels of its dataset."""
    pixels = np.atleast_3d(np.asarray(images.decode(index)))
    return pixels[:, :, : images.channels]


def _label(images: Images, index: int) -> str:
    """The name of the image's class; "" without labels."""
    if images.labels is None:
        return ""
    label = int(images.labels[index])
    return images.class_names[label] if images.class_names else f"class {label}"


def thumbnail(pixels: UInt8[np.ndarray, "h w c"]) -> Image.Image:
    """The image, reduced until its longest side is at most THUMBNAIL."""
    image = to_image(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


def data_uri(image: Image.Image, photo: bool) -> str:
    """The image as a data URI: large photos as JPEG, small ones and maps as PNG."""
    jpeg = photo and image.width * image.height > 64 * 64
    buffer = io.BytesIO()
    if jpeg:
        image.save(buffer, "JPEG", quality=85)
    else:
        image.save(buffer, "PNG", optimize=True)
    kind = "jpeg" if jpeg else "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
