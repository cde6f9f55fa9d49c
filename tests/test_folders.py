"""Folders of images as the data of evaluations.

Oracle: torchvision's transforms of Pillow's images, written out, file by file.
"""

import threading

import numpy as np
import pytest
import torch
from conftest import photo_tiles
from PIL import Image
from torchvision import transforms as T

from ssl_xcit.data.beton import Beton
from ssl_xcit.data.datasets import (
    FolderLoader,
    ImageFolder,
    check_channels,
    evaluation_loader,
    open_images,
)
from ssl_xcit.data.loader import EvalLoader
from ssl_xcit.data.views import EvalView
from ssl_xcit.data.writer import write_beton
from ssl_xcit.runtime.distributed import Distributed
from ssl_xcit.runtime.errors import UserError

BICUBIC, BILINEAR = T.InterpolationMode.BICUBIC, T.InterpolationMode.BILINEAR
VIEWS = {
    EvalView(64, 56): T.Compose([T.Resize(64, BICUBIC), T.CenterCrop(56)]),
    EvalView(80, 80, "bilinear"): T.Compose([T.Resize(80, BILINEAR), T.CenterCrop(80)]),
    EvalView(48): T.Resize((48, 48), BICUBIC),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of JPEGs, one of them not square, and a PNG with transparency and a palette."""
    folder = photo_tiles(tmp_path_factory.mktemp("folder") / "images", 7)
    Image.open(folder / "temple" / "000.jpg").resize((90, 130)).save(folder / "temple" / "tall.jpg")
    Image.open(folder / "flower" / "000.jpg").convert("P").save(folder / "flower" / "palette.png")
    return folder


def alone(rank=0, world_size=1):
    return Distributed(rank, world_size, rank, torch.device("cpu"))


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_batches_of_a_folder_are_torchvisions_transforms_of_its_files_in_order(folder, view):
    batches = list(FolderLoader(ImageFolder(folder), view, 5, num_threads=2))
    assert [len(images) for images, _, _ in batches] == [5, 5, 5, 1]
    images, labels, indices = (torch.cat(part) for part in zip(*batches, strict=True))
    files = sorted(folder.glob("*/*"))
    pixels = [np.asarray(VIEWS[view](Image.open(file).convert("RGB"))) for file in files]
    assert torch.equal(images, torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2))
    assert labels.tolist() == [["flower", "temple"].index(file.parent.name) for file in files]
    assert indices.tolist() == list(range(16))


def test_a_folder_and_a_file_written_from_it_give_the_same_batches_up_to_the_decoders_rounding(
    folder, tmp_path
):
    write_beton(folder, tmp_path / "a.beton", progress=False)
    view = EvalView(64, 56)
    loaders = [
        evaluation_loader(open_images(path), view, 16, alone(), num_threads=1)
        for path in (folder, tmp_path / "a.beton")
    ]
    assert [type(loader) for loader in loaders] == [FolderLoader, EvalLoader]
    ((images, labels, indices),), ((others, *rest),) = (list(loader) for loader in loaders)
    # the palette PNG is stored as a JPEG: another picture
    same = [
        i for i in range(16) if i != sorted(folder.glob("*/*")).index(folder / "flower/palette.png")
    ]
    assert (images[same].int() - others[same].int()).abs().max() <= 1
    assert torch.equal(labels, rest[0])
    assert torch.equal(indices, rest[1])
    assert loaders[0].mean == loaders[1].mean


@pytest.mark.parametrize("world", [1, 2, 3, 20])
def test_over_all_ranks_a_folder_is_seen_once(folder, world):
    images = ImageFolder(folder)
    seen = []
    for rank in range(world):
        loader = evaluation_loader(images, EvalView(16), 3, alone(rank, world), num_threads=1)
        batches = list(loader)
        assert len(batches) == len(loader)
        seen += [index for _, _, indices in batches for index in indices.tolist()]
    assert seen == list(range(16))


def test_gray_images_are_read_for_a_network_of_one_channel(folder):
    images = open_images(folder, channels=1)
    ((batch, _, _),) = FolderLoader(images, EvalView(96, 96), 16, num_threads=1)
    assert batch.shape == (16, 1, 96, 96)
    gray = Image.open(folder / "flower" / "000.jpg").convert("L")
    assert torch.equal(batch[0, 0], torch.from_numpy(np.array(gray)))


def test_a_folder_without_classes_has_no_labels(folder):
    ((_, labels, _),) = FolderLoader(ImageFolder(folder / "temple"), EvalView(16), 16)
    assert labels.tolist() == [-1] * 8


@pytest.mark.parametrize("damage", ["cut", "text"])
def test_a_file_that_pillow_cannot_read_is_named_and_no_thread_is_left(tmp_path, damage):
    folder = photo_tiles(tmp_path / "images", 6)
    file = folder / "flower" / "004.jpg"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] if damage == "cut" else b"no image")
    before = threading.active_count()
    with pytest.raises(UserError, match=r"flower/004\.jpg: .*: mend the image, or remove it"):
        list(FolderLoader(ImageFolder(folder), EvalView(16), 2, num_threads=2))
    assert threading.active_count() == before


def test_leaving_early_leaves_no_thread(folder):
    before = threading.active_count()
    batches = iter(FolderLoader(ImageFolder(folder), EvalView(16), 2, num_threads=2))
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


def test_missing_folders_files_and_channels_are_refused_with_what_to_do(folder, tmp_path):
    with pytest.raises(UserError, match=r"nothing: expected a \.beton file, found none"):
        open_images(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no image"):
        open_images(tmp_path / "empty")
    with pytest.raises(UserError, match=r"takes images of 3 channels, .* has 1: write it again"):
        check_channels(3, ImageFolder(folder), ImageFolder(folder, channels=1))


def test_a_file_keeps_its_own_channels(photos):
    assert isinstance(open_images(photos, channels=1), Beton)
    assert open_images(photos, channels=1).channels == 3
