"""Fixtures that several test files share: real images for every user, and a shallow network."""

import math
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.flop_counter import register_flop_formula

from ssl_xcit.data.writer import write_beton
from ssl_xcit.models import variants
from ssl_xcit.models.variants import ARCHITECTURES, VARIANTS, Variant

SIDE = 96  # pixels of a tile

# The tests' tensors are tiny: a second thread costs more than it brings, and far more where other
# processes want the cores. One thread also makes sums the same everywhere.
torch.set_num_threads(1)


# Whole files go to the workers. These take longest, so they begin, and no worker ends long after
# the others. The rest follow in the order of their names.
FIRST = """slurm_cluster demo reliability equality train readme wheel verdict guard health
    finetune linear knn supervised convert loader train_step plan xcit""".split()  # noqa: SIM905


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@register_flop_formula(torch.ops.mkldnn._linear_pointwise)
def linear_flops(x_shape, weight_shape, *_, out_shape=None, **__) -> int:
    """For torch's own counter, which does not know the operator of `ssl_xcit.operators.linear`."""
    return 2 * math.prod(x_shape) * weight_shape[0]


def photo_tiles(folder: Path, per_class: int) -> Path:
    """Tiles of scikit-learn's two photographs as JPEGs, a class per photograph."""
    for name, photo in zip(("temple", "flower"), load_sample_images().images, strict=True):
        (folder / name).mkdir(parents=True)
        height, width, _ = photo.shape
        for i in range(per_class):
            top, left = (37 * i) % (height - SIDE), (101 * i) % (width - SIDE)
            tile = Image.fromarray(photo[top : top + SIDE, left : left + SIDE])
            tile.save(folder / name / f"{i:03d}.jpg", quality=90)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A .beton of 48 labelled photographs of 96 x 96 pixels, in two classes."""
    folder = tmp_path_factory.mktemp("photos")
    path = folder / "photos.beton"
    write_beton(photo_tiles(folder / "tiles", 24), path, progress=False)
    return path


@pytest.fixture(params=[4, pytest.param(12, marks=pytest.mark.long)], ids="{} blocks".format)
def nano_blocks(request, monkeypatch) -> int:
    """xcit_nano_12 has so many blocks of its 12: they are alike, and each takes its time."""
    shallow = VARIANTS["xcit_nano_12"]._replace(depth=request.param)
    monkeypatch.setitem(VARIANTS, "xcit_nano_12", shallow)
    return request.param


@pytest.fixture(params=["micro_p16", "micro_p8"])
def micro(request, monkeypatch) -> str:
    """The folder of the tiny models that upstream files exist of, as an architecture of its own."""
    variant = Variant(24, 2, 3, 1.0, tokens_norm=request.param == "micro_p8")
    monkeypatch.setitem(VARIANTS, "micro", variant)
    monkeypatch.setattr(variants, "ARCHITECTURES", (*ARCHITECTURES, request.param))
    return request.param


def heed_interrupts() -> None:
    # A shell's background jobs, such as a test run in a script, ignore Ctrl-C and pass that on
    signal.signal(signal.SIGINT, signal.default_int_handler)
