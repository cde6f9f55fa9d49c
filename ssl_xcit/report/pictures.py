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
        row = [Shot(thumbnail(sample.stored), "stored", f"stored image {sample.index}")]
        for name, pixels in sample.views.items():
            alt = f"{name} view of image {sample.index}"
            row.append(Shot(to_image(pixels), name, alt, width=len(pixels) / largest))
        rows.append(row)
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
        searched = MOST_SEARCHED
        if ranks.device.type == "cpu":  # fewer, the more each costs
            backbone = subject.backbone
            image = torch.empty(1, subject.in_chans, view.size, view.size, device="meta")
            multiply_adds = forward_flops(backbone, image)["Global"] / 2
            searched = int(np.clip(CPU_BUDGET / multiply_adds, LEAST_SEARCHED, MOST_SEARCHED))
        among = spread(len(pool), searched)
        if samples is pool:  # an image is not its own neighbour
            among = np.setdiff1d(among, chosen)
        queries = _queries(subject, (samples, chosen), (pool, among), view, ranks)
    finally:
        distributed.teardown()
    network = "the {role} after step {step:,}; its patches are {0} x {0} pixels"
    network = network.format(subject.backbone.patch_size, **subject.facts)
    return Seen(network, sights, queries, len(among), Path(train_path).name)


def _sources(config: TrainConfig | FinetuneConfig) -> tuple[str, str, EvalView]:
    """Paths of the neighbours and of the samples, and the view of them that the network gets.

    Those of the probe, or of a fine-tuning's test, if there are any.
    """
    if isinstance(config, FinetuneConfig):
        side = config.evaluation.eval_size or config.views.image_size
        return config.data, config.test, EvalView(config.evaluation.eval_resize or side, side)
    probe, side = config.probe, config.crops.global_crops_size
    if probe.probe_train and probe.probe_test:
        view = EvalView(probe.probe_resize, probe.probe_crop)
        return probe.probe_train, probe.probe_test, view
    return config.data, config.data, EvalView(round(side * 256 / 224), side)


def _sight(subject: Subject, images: Images, index: int, ranks: Distributed) -> list[Shot]:
    pixels = _pixels(images, index)
    size = LOOKED_AT if max(pixels.shape[:2]) > LOOKED_AT else 0
    a = look(subject, Picture(f"image {index}", pixels), size, ranks.device)
    rows, columns, _ = a.tokens.shape
    colours = colour_picture(PatchColours.fit([a])(a.tokens))
    described = "its patch tokens: the first three principal components as red, green and blue"
    return [
        Shot(to_image(a.picture.pixels), _label(images, index) or "image", f"sample image {index}"),
        Shot(colours, f"{columns} x {rows} patches", described, photo=False),
        *(
            Shot(picture, f"head {k}", f"where head {k} looks in it", photo=False)
            for k, picture in enumerate(attention_pictures(a.attention), 1)
        ),
    ]


def _queries(
    subject: Subject,
    samples: tuple[Images, Int64[np.ndarray, " q"]],
    pool: tuple[Images, Int64[np.ndarray, " n"]],
    view: EvalView,
    ranks: Distributed,
) -> list[list[Shot]]:
    """Each sample and its nearest images of the pool by the cosine of their cls tokens."""
    how = {"mean": subject.mean, "std": subject.std}
    how["dtype"] = torch.float32 if ranks.device.type == "cpu" else torch.uint8
    features = []
    for images, subset in (samples, pool):
        loader = evaluation_loader(images, view, 64, ranks, subset=subset, **how)
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
            name, image = _label(pool[0], other), thumbnail(_pixels(pool[0], other))
            alt = f"{name or 'image'} {other}, cosine {cosine:.3f}"
            same = name == label if name and label else None
            shots.append(Shot(image, f"{name} {cosine:.3f}".strip(), alt, same=same))
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
    kind = "jpeg" if photo and image.width * image.height > 64 * 64 else "png"
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=85, optimize=kind == "png")
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
