"""Where images come from and how they are stored, against Pillow, numpy and libjpeg."""

import gzip
import io
import os
import re
import socket
import struct
import sys
import warnings
from pathlib import Path

import forked
import numpy as np
import pytest
import sklearn.datasets
import torchvision
from PIL import Image, ImageOps

from ssl_xcit.data import images, sources
from ssl_xcit.data.images import (
    ENCODED,
    EXTRANEOUS,
    JPG,
    KEPT,
    RAW,
    BrokenImageError,
    Encoding,
    encode,
    guarded,
    is_harmless,
    jpeg_problem,
)
from ssl_xcit.data.sources import Source, open_source
from ssl_xcit.runtime.errors import UserError

PHOTOS = Path(sklearn.datasets.__file__).parent / "images"
OK, DAMAGED, CORRUPT, TRUNCATED = range(4)  # as in ssl_xcit.data.kernels
CHINA = (PHOTOS / "china.jpg").read_bytes()  # 640 x 427, baseline, 4:2:0
RNG = np.random.default_rng(0)


def photo() -> Image.Image:
    return Image.open(io.BytesIO(CHINA))


def saved(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def smooth(*shape: int) -> np.ndarray:
    """Random pixels that survive JPEG: low frequencies only."""
    small = Image.fromarray(RNG.integers(0, 256, (4, 5, 3), np.uint8))
    return np.array(small.resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


def pixels(stored: images.Stored, channels: int = 3) -> np.ndarray:
    if stored.mode == RAW:
        return np.frombuffer(stored.data, np.uint8).reshape(stored.height, stored.width, channels)
    image = Image.open(io.BytesIO(stored.data))
    assert (image.format, image.size) == ("JPEG", (stored.width, stored.height))
    return np.array(image.convert("RGB"))


def with_orientation(image: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(image, "JPEG", exif=exif, quality=95)


# JPEGs that pass through


@pytest.mark.parametrize(
    "data",
    [
        CHINA,
        saved(photo().convert("L"), "JPEG"),
        saved(photo(), "JPEG", progressive=True),
        saved(photo(), "JPEG", subsampling="4:4:4", quality=100),
        saved(photo(), "JPEG", keep_rgb=True),
        with_orientation(photo(), 6),
        CHINA + b"trailing bytes that no decoder reads",
        saved(photo(), "MPO", save_all=True, append_images=[photo()]),
        saved(Image.new("RGB", (1, 1)), "JPEG"),
    ],
    ids=["baseline", "gray", "progressive", "444", "rgb", "exif", "trailing", "mpo", "1x1"],
)
@pytest.mark.parametrize("mode", ["auto", "jpg"])
def test_a_plain_jpeg_is_stored_byte_for_byte(data, mode):
    stored = encode(data, Encoding(mode=mode))
    assert stored.data == data
    assert stored.mode == JPG
    assert (stored.width, stored.height) == Image.open(io.BytesIO(data)).size
    assert KEPT in stored.notes


def test_a_bound_that_the_image_keeps_leaves_its_bytes_alone():
    assert encode(CHINA, Encoding(max_side=640)).data == CHINA
    assert encode(CHINA, Encoding(short_side=427)).data == CHINA


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_data_does_not_make_an_image_broken(kind):
    for garbage in (b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0MM\0*\0!"):
        image = Image.fromarray(smooth(70, 80))
        data = saved(image, kind, exif=garbage, quality=100)
        with warnings.catch_warnings(action="ignore"):  # Pillow's, about the garbage
            for exif in ("ignore", "rotate"):
                stored = encode(data, Encoding(exif=exif))
        assert np.abs(pixels(stored).astype(int) - np.array(image)).mean() < 9
        assert (stored.data == data) == (kind == "JPEG")


def test_libjpeg_turbo_has_no_objection_to_what_passes_through():
    for data in (CHINA, saved(photo().convert("L"), "JPEG"), saved(photo(), "JPEG", keep_rgb=True)):
        assert jpeg_problem(data, 427, 640) is None
    cmyk = saved(photo().convert("CMYK"), "JPEG")
    assert "color conversion" in jpeg_problem(cmyk, 427, 640)


# What is encoded anew


def test_a_cmyk_jpeg_becomes_rgb():
    original = smooth(120, 160)
    data = saved(Image.fromarray(original).convert("CMYK"), "JPEG", quality=95)
    stored = encode(data, Encoding())
    assert jpeg_problem(stored.data, 120, 160) is None
    assert np.abs(pixels(stored).astype(int) - original).mean() < 3
    assert set(stored.notes) == {"CMYK converted to RGB", ENCODED}


@pytest.mark.parametrize("marker", [0xC3, 0xC9, 0xCA, 0xCB])
def test_jpegs_of_lossless_or_arithmetic_coding_do_not_pass_through(marker):
    start = CHINA.index(b"\xff\xc0")
    changed = CHINA[: start + 1] + bytes([marker]) + CHINA[start + 2 :]
    assert images._is_plain_jpeg(CHINA)
    assert not images._is_plain_jpeg(changed)


def test_a_12_bit_jpeg_does_not_pass_through():
    start = CHINA.index(b"\xff\xc0")
    assert CHINA[start + 4] == 8
    assert not images._is_plain_jpeg(CHINA[: start + 4] + b"\x0c" + CHINA[start + 5 :])


def test_16_bit_gray_keeps_its_range():
    values = np.linspace(0, 65535, 100 * 80).astype(np.uint16).reshape(80, 100)
    expected = np.round(values / 257).astype(int)
    for kind in ("PNG", "TIFF"):
        stored = encode(saved(Image.fromarray(values), kind), Encoding(mode="raw"))
        assert np.array_equal(pixels(stored), np.repeat(expected[:, :, None], 3, axis=2))
        assert "16 bits reduced to 8" in stored.notes


def test_pixels_without_a_defined_range_are_broken_not_black():
    floats = Image.fromarray(RNG.random((70, 70), np.float32))
    large = Image.fromarray(RNG.integers(0, 1 << 20, (70, 70), np.int32))
    with pytest.raises(BrokenImageError, match="floating-point"):
        encode(saved(floats, "TIFF"), Encoding())
    with pytest.raises(BrokenImageError, match="32-bit"):
        encode(saved(large, "TIFF"), Encoding())


def test_opaque_palette_bilevel_and_gray_images_are_as_pillow_shows_them():
    for image in (photo().convert("P"), photo().convert("1"), photo().convert("L")):
        stored = encode(saved(image, "PNG"), Encoding(mode="raw"))
        assert np.array_equal(pixels(stored), np.array(image.convert("RGB")))
        assert stored.notes == ()


def test_transparent_pixels_are_laid_over_white_and_opaque_ones_are_unchanged():
    rgba = np.dstack([smooth(90, 80), np.full((90, 80), 255, np.uint8)])
    opaque = encode(saved(Image.fromarray(rgba), "PNG"), Encoding(mode="raw"))
    assert np.array_equal(pixels(opaque), rgba[:, :, :3])
    assert opaque.notes == ()
    rgba[:45, :, 3] = 0
    rgba[45:50, :, 3] = 51
    stored = encode(saved(Image.fromarray(rgba), "PNG"), Encoding(mode="raw"))
    alpha = rgba[:, :, 3:] / 255
    expected = rgba[:, :, :3] * alpha + 255 * (1 - alpha)
    assert np.abs(pixels(stored) - expected).max() <= 1
    assert stored.notes == ("transparency laid over white",)


def test_a_palette_with_a_transparent_entry_is_laid_over_white():
    image = Image.new("P", (70, 70), 1)
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.paste(0, (0, 0, 70, 35))
    data = saved(image, "PNG", transparency=bytes([0, 255]))
    shown = pixels(encode(data, Encoding(mode="raw")))
    assert shown[0, 0].tolist() == [255, 255, 255]
    assert shown[-1, -1].tolist() == [0, 0, 200]


def test_the_first_frame_of_an_animation_is_taken_and_noted():
    frames = [Image.new("RGB", (80, 70), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        stored = encode(data, Encoding(mode="raw"))
        assert np.abs(pixels(stored).astype(int) - [255, 0, 0]).max() < 8, kind  # WebP is lossy
        assert stored.notes == ("several frames, first one taken",), kind


def zeroed(start: int, count: int) -> bytes:
    return CHINA[:start] + bytes(count) + CHINA[start + count :]


def extraneous() -> bytes:
    return CHINA[:-2] + b"\x00\x01\x02" * 20 + CHINA[-2:]


@pytest.mark.parametrize("options", [{}, {"mode": "raw"}, {"max_side": 100}])
def test_corrupt_jpeg_data_is_broken_although_pillow_shows_it(options):
    data = zeroed(len(CHINA) // 2, 2000)
    Image.open(io.BytesIO(data)).load()
    with pytest.raises(BrokenImageError, match="Corrupt JPEG data: "):
        encode(data, Encoding(**options))


def test_extraneous_bytes_in_a_jpeg_are_kept_and_noted():
    stored = encode(extraneous(), Encoding())
    assert stored.data == extraneous()
    assert stored.notes == (EXTRANEOUS, KEPT)


def test_no_truncated_jpeg_is_stored():
    for length in [*np.linspace(0, len(CHINA) - 1, 50).astype(int), len(CHINA) - 2]:
        with pytest.raises((OSError, BrokenImageError, SyntaxError)):
            encode(CHINA[:length], Encoding())


DECODE_ALL = """
import sys
from pathlib import Path

import numpy as np

from ssl_xcit.data import images, kernels

work = kernels.make_scratch(np.zeros(0, kernels.VIEW), 3, 427 * 640, 427, 640)
handle = images._turbojpeg().tjInitDecompress()
for file in sorted(Path(sys.argv[1]).iterdir()):
    stored = np.fromfile(file, np.uint8)
    print(kernels.decode(work, handle, stored, 427, 640, images.JPG, 3))
"""


def test_the_loaders_decoder_agrees_on_what_is_broken(tmp_path):
    rng = np.random.default_rng(3)
    cases = [CHINA, extraneous(), *(CHINA[:n] for n in (1000, 99999, len(CHINA) - 2))]
    cases += [zeroed(start, 200) for start in rng.integers(700, len(CHINA) - 900, 30)]
    for i, data in enumerate(cases):
        (tmp_path / f"{i:03}").write_bytes(data)
    # In a process of its own: pytest's type checks of every function do not compile
    done = forked.run(
        [sys.executable, "-c", DECODE_ALL, tmp_path], capture_output=True, text=True, check=True
    )
    statuses = [int(line) for line in done.stdout.split()]
    for data, status in zip(cases, statuses, strict=True):
        problem = jpeg_problem(data, 427, 640)
        assert (status == OK) == (problem is None), problem
        assert (status <= DAMAGED) == (problem is None or is_harmless(problem)), problem
    assert set(statuses) >= {OK, DAMAGED, CORRUPT, TRUNCATED}


def test_the_cheap_check_reads_headers_only():
    cut = CHINA[: len(CHINA) // 2]
    assert encode(cut, Encoding(check="header")).data == cut
    with pytest.raises(BrokenImageError, match="Premature end"):
        encode(cut, Encoding(check="full"))


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff", CHINA[:100]])
def test_what_is_no_image_raises(data):
    with pytest.raises((BrokenImageError, OSError, SyntaxError)):
        encode(data, Encoding())


# EXIF, sizes, modes, channels


def test_exif_orientation_is_ignored_by_default_and_applied_on_demand():
    for orientation in range(1, 9):
        data = with_orientation(photo(), orientation)
        ignored = encode(data, Encoding())
        assert ignored.data == data
        assert ("EXIF orientation ignored" in ignored.notes) == (orientation > 1)
        rotated = encode(data, Encoding(exif="rotate", mode="auto"))
        upright = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
        assert pixels(rotated).shape == upright.shape
        assert np.abs(pixels(rotated).astype(int) - upright).mean() < 5
        assert (rotated.data == data) == (orientation == 1)
        assert ("EXIF orientation applied" in rotated.notes) == (orientation > 1)


def test_shrinking_keeps_the_aspect_ratio_and_never_enlarges():
    assert Encoding(max_side=320).stored_size(427, 640) == (214, 320)
    assert Encoding(max_side=320).stored_size(640, 427) == (320, 214)
    assert Encoding(short_side=256).stored_size(427, 640) == (256, 384)
    assert Encoding(short_side=256).stored_size(640, 427) == (384, 256)
    assert Encoding(short_side=500).stored_size(427, 640) == (427, 640)
    assert Encoding(max_side=10).stored_size(3, 3000) == (1, 10)


def test_shrunk_pixels_are_pillows_antialiased_bicubic():
    stored = encode(CHINA, Encoding(mode="raw", max_side=160))
    expected = photo().resize((160, 107), Image.Resampling.BICUBIC)
    assert np.array_equal(pixels(stored), np.array(expected))
    as_jpeg = encode(CHINA, Encoding(max_side=160, quality=95))
    assert as_jpeg.mode == JPG
    assert np.abs(pixels(as_jpeg).astype(int) - np.array(expected)).mean() < 4


def test_quality_is_that_of_pillow():
    stored = encode(CHINA, Encoding(max_side=160, quality=37))
    small = photo().resize((160, 107), Image.Resampling.BICUBIC)
    assert stored.data == saved(small, "JPEG", quality=37)


def test_mode_auto_stores_tiny_images_raw_and_larger_ones_as_jpeg():
    for side, mode in ((28, RAW), (64, RAW), (65, JPG)):
        original = smooth(side, 20)
        stored = encode(saved(Image.fromarray(original), "PNG"), Encoding())
        assert stored.mode == mode
        assert np.abs(pixels(stored).astype(int) - original).mean() < (8 if mode == JPG else 0.5)
        assert encode(original, Encoding()).data == stored.data


def test_one_channel_is_gray_and_raw():
    stored = encode(CHINA, Encoding(channels=1))
    assert stored.mode == RAW
    assert np.array_equal(pixels(stored, 1)[:, :, 0], np.array(photo().convert("L")))


def test_arrays_of_any_number_of_channels_are_stored_raw_and_shrunk_per_channel():
    values = RNG.integers(0, 256, (50, 40, 5), np.uint8)
    stream = io.BytesIO()
    np.save(stream, values)
    stored = encode(stream.getvalue(), Encoding(channels=5))
    assert stored.mode == RAW
    assert np.array_equal(pixels(stored, 5), values)
    small = pixels(encode(stream.getvalue(), Encoding(channels=5, max_side=25)), 5)
    for c in range(5):
        plane = Image.fromarray(values[:, :, c]).resize((20, 25), Image.Resampling.BICUBIC)
        assert np.array_equal(small[:, :, c], np.array(plane))


def test_arrays_of_the_wrong_kind_are_refused_with_what_was_expected():
    for values, message in (
        (np.zeros((9, 9, 4), np.uint8), "expected 5 channels, got 4"),
        (np.zeros((9, 9, 5), np.float32), "expected uint8"),
        (np.zeros((1, 9, 9, 5), np.uint8), r"expected uint8 \(h, w, c\)"),
        (np.zeros((0, 9, 5), np.uint8), "too few"),
    ):
        with pytest.raises(BrokenImageError, match=message):
            encode(values, Encoding(channels=5))
    with pytest.raises(BrokenImageError, match="expected 5 channels, got 3"):
        encode(CHINA, Encoding(channels=5))


def test_a_pickle_in_disguise_is_not_executed():
    stream = io.BytesIO()
    np.save(stream, np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="pickle"):
        encode(stream.getvalue(), Encoding())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_side": 9, "short_side": 9}, "exclude each other"),
        ({"max_side": 0}, "max_side must be 1 to 65535, got 0"),
        ({"short_side": 70000}, "short_side must be"),
        ({"quality": 101}, "quality must be 1 to 100, got 101"),
        ({"channels": 0}, "channels must be at least 1"),
        ({"channels": 4, "mode": "jpg"}, "use mode raw"),
    ],
)
def test_impossible_options_are_user_errors(options, message):
    with pytest.raises(UserError, match=message):
        Encoding(**options)


# Sources


def tree(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(CHINA[:10])
    return folder


def listed(source: Source) -> list[str]:
    return [source.name(i) for i in range(source.size)]


def test_a_folder_per_class_gives_labels_by_sorted_folder_name_like_torchvision(tmp_path):
    names = ["b/2.jpg", "b/10.JPEG", "a/x.png", "Z/y.jpg", "ä/ü ñ.jpg"]
    source = open_source(tree(tmp_path, *names))
    oracle = torchvision.datasets.ImageFolder(tmp_path)
    assert source.class_names == tuple(oracle.classes) == ("Z", "a", "b", "ä")
    assert source.labels.tolist() == [label for _, label in oracle.samples]
    assert listed(source) == [os.path.relpath(path, tmp_path) for path, _ in oracle.samples]
    assert source.read(0) == CHINA[:10]
    assert "4 folder names" in source.description


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["a.jpg", "b.jpg"], "a.jpg is not in a class folder"),
        (["a/1.jpg", "b/1.jpg", "c.jpg"], "c.jpg is not in a class folder"),
        (["a/1.jpg", "b/deep/1.jpg"], "b/deep/1.jpg is not in a class folder"),
        (["a/1.jpg", "a/2.jpg"], "all images are in one folder"),
        (["c.jpg", "d.jpg", "e.jpg"], "c.jpg is not .* under .*, nor are 2 others"),
        (["train/1.jpg", "val/1.jpg"], r"its folders are splits \(train, val\), not classes"),
        (["train/images/1.jpg", "val/images/1.jpg"], r"its folders are splits \(train, val\)"),
    ],
)
def test_other_trees_have_no_labels_and_say_why(tmp_path, names, reason):
    source = open_source(tree(tmp_path, *names))
    assert source.labels is None
    assert source.class_names is None
    assert re.search(reason, source.description)
    assert source.unlabelled.startswith("since ")
    assert source.description.endswith(f"labels: none, {source.unlabelled}")
    assert listed(source) == sorted(names)


CLASSES = [f"{name}/{i}.jpg" for name in "ab" for i in range(9)]


@pytest.mark.parametrize("stray", ["cover.jpg", "a/deep/1.jpg", "b/deep/est/1.jpg"])
def test_images_astray_beside_class_folders_are_listed_and_refused(tmp_path, stray):
    tree(tmp_path, *CLASSES, stray)
    with pytest.raises(UserError, match=f"1 of 19 images are not .*: {stray}: .*--no-labels"):
        open_source(tmp_path)
    source = open_source(tmp_path, labels=False)
    assert (source.size, source.labels) == (19, None)
    tree(tmp_path, "2.jpg", "3.jpg")  # 18 of 21 are less than nine tenths
    assert open_source(tmp_path).labels is None


@pytest.mark.parametrize("splits", [("train", "val"), ("Training", "test", "valid"), ("train",)])
def test_a_folder_of_splits_is_refused_with_the_one_to_give(tmp_path, splits):
    tree(tmp_path, *(f"{split}/{name}" for split in splits for name in CLASSES))
    with pytest.raises(UserError, match=f"holds splits .* such as {tmp_path / min(splits)}, or"):
        open_source(tmp_path)
    assert open_source(tmp_path, labels=False).size == 18 * len(splits)
    assert open_source(tmp_path / splits[0]).class_names == ("a", "b")


def test_what_systems_put_beside_class_folders_is_passed_over(tmp_path):
    tree(tmp_path, *CLASSES)
    before = open_source(tmp_path)
    tree(
        tmp_path,
        "@eaDir/a/1.jpg/SYNOPHOTO_THUMB_M.jpg",
        "__MACOSX/a/._1.jpg",
        "__MACOSX/a/1.jpg",
        ".ipynb_checkpoints/1-checkpoint.jpg",
        "a/.ipynb_checkpoints/1-checkpoint.jpg",
        "b/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg",
        "$RECYCLE.BIN/1.jpg",
        "a/Thumbs.db",
        "b/._1.jpg",
    )
    (tmp_path / "lost+found").mkdir()  # no class without images either
    after = open_source(tmp_path)
    assert listed(after) == listed(before) == CLASSES
    assert after.class_names == before.class_names == ("a", "b")
    assert (after.description, after.left_out) == (before.description, "")


def test_files_of_other_kinds_are_counted(tmp_path):
    names = [f"a/{i}.HEIC" for i in range(10)] + ["b/IMG_1", "b/IMG_2", "notes.txt", ".hidden"]
    tree(tmp_path, *CLASSES, *names)
    (tmp_path / "c").symlink_to("unmounted")
    assert open_source(tmp_path).left_out == (
        "14 files: 10 .heic, 2 without extension, 1 .txt, 1 linked to nowhere"
    )
    tree(tmp_path, *(f"many/x.{i}" for i in range(20)))
    assert open_source(tmp_path).left_out.endswith("1 .13, 16 of other kinds")
    (tmp_path / "phone").mkdir()
    tree(tmp_path / "phone", "1.heic")
    with pytest.raises(UserError, match=r"holds no image \(.*\), only 1 file: 1 \.heic"):
        open_source(tmp_path / "phone")


def test_what_cannot_be_read_as_a_file_is_no_image_and_nothing_waits_for_it(tmp_path):
    tree(tmp_path, "1.jpg")
    os.mkfifo(tmp_path / "2.jpg")
    (tmp_path / "3.jpg").symlink_to("3.jpg")
    (tmp_path / "4.jpg").symlink_to("nowhere")
    (tmp_path / "5.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "6.jpg"))
    source = open_source(tmp_path)
    reasons = {2: "no regular file", 3: "Too many levels", 4: "a link to a file that is not there"}
    reasons |= {5: "no regular file", 6: "no regular file"}
    assert source.size == 6
    for number, reason in reasons.items():
        with pytest.raises(BrokenImageError, match=reason), guarded():
            source.read(number - 1)


def test_labels_can_be_declined(tmp_path):
    source = open_source(tree(tmp_path, "a/1.jpg", "b/1.jpg"), labels=False)
    assert source.labels is None
    assert "as asked" in source.description


def test_an_empty_class_keeps_its_number_so_that_splits_agree(tmp_path):
    tree(tmp_path, "a/1.jpg", "c/1.jpg")
    (tmp_path / "b").mkdir()
    source = open_source(tmp_path)
    assert source.class_names == ("a", "b", "c")
    assert source.labels.tolist() == [0, 2]
    assert "empty: b" in source.description


def test_hidden_and_other_files_are_passed_over_and_links_are_followed(tmp_path):
    images_folder = tree(tmp_path / "in", "a/1.jpg", "b/1.jpg", ".hidden/1.jpg", "a/._1.jpg")
    tree(images_folder, "README.md", "a/notes.txt")
    outside = tree(tmp_path / "elsewhere", "2.jpg")
    (images_folder / "a" / "link.jpg").symlink_to(outside / "2.jpg")
    (images_folder / "c").symlink_to(outside)
    (outside / "loop").symlink_to(images_folder)
    (images_folder / "b" / "up").symlink_to(images_folder)
    source = open_source(images_folder)
    assert listed(source) == ["a/1.jpg", "a/link.jpg", "b/1.jpg", "c/2.jpg"]
    assert source.class_names == ("a", "b", "c")


def test_wrong_sources_are_user_errors(tmp_path):
    for source, message in ((tmp_path / "no", "expected a folder"), (tmp_path, "holds no image")):
        with pytest.raises(UserError, match=message):
            open_source(source)
    with pytest.raises(UserError, match="split and root are for FashionMNIST"):
        open_source(tree(tmp_path, "1.jpg"), split="test")


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))


def test_fashion_mnist_is_read_from_the_debian_package(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DEBIAN_FASHION_MNIST", tmp_path)
    for stem, n in (("train", 6), ("t10k", 4)):
        write_idx(tmp_path / f"{stem}-images-idx3-ubyte.gz", np.full((n, 28, 28), n, np.uint8))
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte.gz", np.arange(n, dtype=np.uint8))
    for split, n in ((None, 6), ("train", 6), ("test", 4)):
        source = open_source("FashionMNIST", split=split)
        assert source.labels.tolist() == list(range(n))
        assert np.array_equal(source.read(n - 1), np.full((28, 28), n))
        assert source.class_names[:2] == ("T-shirt/top", "Trouser")
    stored = encode(source.read(0), Encoding())
    assert (stored.mode, stored.height, stored.width, len(stored.data)) == (RAW, 28, 28, 2352)


@pytest.mark.skipif(not sources.DEBIAN_FASHION_MNIST.is_dir(), reason="no dataset-fashion-mnist")
def test_the_debian_package_holds_the_published_numbers():
    source = open_source("FashionMNIST", split="test")
    assert np.bincount(source.labels).tolist() == [1000] * 10
    assert source.labels[:5].tolist() == [9, 2, 1, 1, 6]  # ankle boot, pullover, 2 trousers, shirt
    assert source.read(0).shape == (28, 28)


def test_cifar_comes_from_torchvision(tmp_path, monkeypatch):
    class Stub:
        data = RNG.integers(0, 256, (5, 32, 32, 3), np.uint8)
        targets = (3, 1, 4, 1, 5)
        classes = tuple("abcdef")

        def __init__(self, root, train, download):
            assert (root, train, download) == (tmp_path, False, True)

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Stub)
    source = open_source("CIFAR10", split="test", root=tmp_path)
    assert source.labels.tolist() == [3, 1, 4, 1, 5]
    assert np.array_equal(source.read(2), Stub.data[2])
    assert source.class_names == Stub.classes


def test_a_download_that_fails_is_one_line_that_names_the_folder(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("no\nnetwork")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", fail)
    with pytest.raises(UserError, match=f"downloaded to {tmp_path} .no network.; .*--root"):
        open_source("CIFAR100", root=tmp_path)
