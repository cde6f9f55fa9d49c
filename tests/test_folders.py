"""Folders of images as the data of evaluations.

Oracle: torchvision's transforms of Pillow's images, written out, file by file.
"""

import dataclasses
import errno
import os
import sys
import threading

import forked
import numpy as np
import pytest
import torch
from conftest import photo_tiles
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision import transforms as T

from ssl_xcit.data.beton import Beton
from ssl_xcit.data.datasets import (
    FolderLoader,
    ImageFolder,
    check_channels,
    check_datasets,
    evaluation_loader,
    open_images,
)
from ssl_xcit.data.loader import EvalLoader
from ssl_xcit.data.views import EvalView
from ssl_xcit.data.writer import write_beton
from ssl_xcit.evaluation.class_order import class_order
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


KINDS = {
    "rgb.png": lambda rgb: Image.fromarray(rgb),
    "gray.png": lambda rgb: Image.fromarray(rgb[:, :, 0]),
    "palette.gif": lambda rgb: Image.fromarray(rgb).convert("P"),
    "bilevel.png": lambda rgb: Image.fromarray(rgb).convert("1"),
    "photo.jpg": lambda rgb: Image.fromarray(rgb),
    "gray.jpg": lambda rgb: Image.fromarray(rgb[:, :, 1]),
    "cmyk.jpg": lambda rgb: Image.fromarray(rgb).convert("CMYK"),
    "cmyk.tif": lambda rgb: Image.fromarray(rgb).convert("CMYK"),
    "sixteen.png": lambda rgb: Image.fromarray(257 * rgb[:, :, 0].astype(np.uint16) + 90),
    "sixteen.tif": lambda rgb: Image.fromarray(257 * rgb[:, :, 0].astype(np.uint16) + 90),
    "alpha.png": lambda rgb: Image.fromarray(np.dstack([rgb, rgb[:, ::-1, 0]])),
    "alpha.webp": lambda rgb: Image.fromarray(np.dstack([rgb, rgb[:, ::-1, 0]])),
    "gray_alpha.png": lambda rgb: Image.fromarray(rgb[:, :, :2]),
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """A folder of one file of each kind, 70 x 60 pixels, and three .npy files."""
    folder = tmp_path_factory.mktemp("kinds")
    rgb = np.array(Image.fromarray(load_sample_images().images[0]).resize((70, 60)))
    for name, make in KINDS.items():
        make(rgb).save(folder / name)
    frames = [Image.fromarray(part) for part in (rgb, rgb[::-1])]
    frames[0].save(folder / "two_frames.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("jpg", "png", "tif"):
        Image.fromarray(rgb).save(folder / f"turned.{kind}", exif=exif)
    np.save(folder / "three.npy", rgb)
    np.save(folder / "one.npy", rgb[:, :, :1])
    np.save(folder / "plane.npy", rgb[:, :, 1])
    return folder


def test_a_folder_shows_the_pixels_of_the_raw_file_written_from_it(kinds, tmp_path):
    write_beton(kinds, tmp_path / "raw.beton", mode="raw", progress=False)
    both = ImageFolder(kinds), Beton(tmp_path / "raw.beton")
    assert len(both[0]) == len(both[1]) == len(KINDS) + 7
    for i, file in enumerate(sorted(kinds.iterdir())):
        np.testing.assert_array_equal(both[0].decode(i), both[1].decode(i), file.name)
    view = EvalView(40, 32)
    (shown,), (stored,) = (
        list(evaluation_loader(images, view, 30, alone(), num_threads=1)) for images in both
    )
    assert torch.equal(shown[0], stored[0])


def test_opaque_images_of_8_bits_are_what_pillow_and_torchvision_make_of_them(kinds):
    view, transform = EvalView(40, 32), T.Compose([T.Resize(40, BICUBIC), T.CenterCrop(32)])
    images = ImageFolder(kinds)
    ((batch, _, _),) = FolderLoader(images, view, 30, num_threads=1)
    plain = ["rgb.png", "gray.png", "palette.gif", "bilevel.png", "photo.jpg", "gray.jpg"]
    plain += ["cmyk.jpg", "cmyk.tif", "two_frames.gif", "turned.jpg", "turned.png"]
    files = sorted(file.name for file in kinds.iterdir())
    for name in plain:
        with Image.open(kinds / name) as opened:
            image = opened.convert("RGB")
        i = files.index(name)
        np.testing.assert_array_equal(images.decode(i), np.asarray(image), name)
        expected = np.asarray(transform(image)).transpose(2, 0, 1)
        np.testing.assert_array_equal(batch[i].numpy(), expected, name)


def test_16_bits_are_scaled_and_transparent_pixels_white(tmp_path):
    values = np.linspace(0, 65535, 6400).astype(np.uint16).reshape(80, 80)
    Image.fromarray(values).save(tmp_path / "a.png")
    rgba = np.zeros((80, 80, 4), np.uint8)
    rgba[:40] = (9, 8, 7, 255)
    Image.fromarray(rgba).save(tmp_path / "b.png")
    images = open_images(tmp_path)
    assert np.array_equal(images.decode(0)[:, :, 1], np.round(values / 257))
    assert images.decode(1)[[0, 79], 0].tolist() == [[9, 8, 7], [255, 255, 255]]


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_arrays_of_any_number_of_channels_are_read_as_from_a_file(tmp_path, channels):
    rng = np.random.default_rng(channels)
    (tmp_path / "in").mkdir()
    arrays = [rng.integers(0, 256, (40 + i, 50, channels), np.uint8) for i in range(3)]
    for i, array in enumerate(arrays):
        np.save(tmp_path / "in" / f"{i}.npy", array)
    write_beton(tmp_path / "in", tmp_path / "n.beton", channels=channels, progress=False)
    folder = open_images(tmp_path / "in", channels)
    assert all(np.array_equal(folder.decode(i), arrays[i]) for i in range(3))
    (shown,), (stored,) = (
        list(evaluation_loader(images, EvalView(32, 28), 3, alone(), num_threads=1))
        for images in (folder, Beton(tmp_path / "n.beton"))
    )
    assert shown[0].shape == (3, channels, 28, 28)
    assert torch.equal(shown[0], stored[0])


def test_pixels_without_a_defined_range_are_refused_by_name(tmp_path):
    Image.fromarray(np.zeros((70, 70), np.float32)).save(tmp_path / "f.tif")
    np.save(tmp_path / "g.npy", np.zeros((70, 70, 4), np.uint8))
    images = open_images(tmp_path)
    with pytest.raises(UserError, match=r"f\.tif: floating-point pixels, expected 8 or 16 bits: m"):
        images.decode(0)
    with pytest.raises(UserError, match=r"g\.npy: expected 3 channels, got 4: mend the image"):
        images.decode(1)


def test_files_that_are_gone_or_no_files_are_named(tmp_path):
    folder = photo_tiles(tmp_path / "images", 3)
    images = ImageFolder(folder)
    (folder / "flower" / "001.jpg").unlink()
    (folder / "temple" / "000.jpg").unlink()
    os.mkfifo(folder / "temple" / "000.jpg")
    (folder / "temple" / "002.jpg").unlink()
    (folder / "temple" / "002.jpg").symlink_to("nowhere")
    for index, name in ((1, "flower/001.jpg: No such file"), (3, "temple/000.jpg: no regular f")):
        with pytest.raises(UserError, match=name):
            images.decode(index)
    with pytest.raises(UserError, match=r"temple/002\.jpg: a link to a file that is not there"):
        images.decode(5)
    with pytest.raises(UserError, match=r"flower/001\.jpg: No such file or directory: mend"):
        images.fingerprint()

    def stale(index):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    images._source = dataclasses.replace(images._source, read=stale)
    with pytest.raises(UserError, match=r"flower/000\.jpg: Stale file handle: mend"):
        images.decode(0)


def test_an_evaluation_says_why_there_are_no_labels(tmp_path):
    folder = photo_tiles(tmp_path / "images", 3)
    for i in range(5):
        os.link(folder / "flower" / "000.jpg", folder / f"{i}.jpg")
    write_beton(folder, tmp_path / "a.beton", progress=False)
    write_beton(folder, tmp_path / "b.beton", labels=False, progress=False)
    reason = r"since 0\.jpg is not in a class folder directly under .*, nor are 4 others"
    for name, why in (("images", reason), ("a.beton", reason), ("b.beton", "as asked")):
        images = open_images(tmp_path / name)
        with pytest.raises(UserError, match=rf"{name} has no labels \({why}\), which this"):
            check_datasets(images, images)
        with pytest.raises(UserError, match=rf"{name} has no labels \({why}\), which this"):
            class_order(images, 2)


OPEN = """
import sys
from ssl_xcit.data.datasets import open_images
from ssl_xcit.runtime import distributed
distributed.setup("cpu")
sys.stderr = sys.stdout
open_images(sys.argv[1])
"""


def test_what_is_left_out_of_a_folder_is_said_once_over_all_ranks(tmp_path):
    folder = photo_tiles(tmp_path / "images", 2)
    for i in range(3):
        (folder / "flower" / f"{i}.heic").touch()
    printed = forked.run_ranks(2, [sys.executable, "-c", OPEN, folder])
    told = [line for text in printed for line in text.splitlines() if "left out" in line]
    assert told == [f"{folder}: left out 3 files: 3 .heic"]


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
