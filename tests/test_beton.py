"""The .beton file: against stock ffcv in both directions, and against every way to damage it.

Stock ffcv runs in one subprocess (`ORACLE`), since importing it changes torch and numba globally.
"""

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
from conftest import heed_interrupts
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ssl_xcit.data import images
from ssl_xcit.data.beton import FIELD, HEADER, PAGE, REFERENCE, TABLE, Beton, BetonWriter, place
from ssl_xcit.data.command import describe, main, verify_beton
from ssl_xcit.data.images import EXTRANEOUS, JPG, KEPT, RAW
from ssl_xcit.data.writer import write_beton
from ssl_xcit.runtime.errors import UserError

ROOT = Path(__file__).parents[1]
IMAGENET_SAMPLE = ROOT.parent / "shared" / "data" / "imagenet_sample" / "train"
PHOTOS = Path(sklearn.datasets.__file__).parent / "images"
CHINA, FLOWER = (PHOTOS / f"{name}.jpg" for name in ("china", "flower"))  # both 640 x 427
COMMAND = [sys.executable, "-m", "ssl_xcit", "data"]

ORACLE = """
import sys
from pathlib import Path

import numpy as np
from ffcv.fields import FloatField, IntField, JSONField, RGBImageField
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.reader import Reader
from ffcv.transforms import ToTensor
from ffcv.writer import DatasetWriter


class Images:
    pixels = np.load("pixels.npy")

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return self.pixels[i], 7 * i - 3, i / 2, {"i": int(i)}


def write(name, fields, **options):
    writer = DatasetWriter(name, fields, num_workers=2, **options)
    writer.from_indexed_dataset(Images(), chunksize=1)


image = RGBImageField(write_mode="proportion", compress_probability=0.5)
write("stock.beton", {"image": image, "label": IntField()}, page_size=1 << 21)
more = {"image": RGBImageField(), "label": IntField(), "x": FloatField(), "y": JSONField()}
write("stock_more.beton", more)

for name in ("photos", "raw", "unlabelled"):
    reader = Reader(f"{name}.beton")
    image = reader.metadata["f0"]
    np.savez(
        f"{name}.npz",
        fields=reader.field_names,
        page_size=reader.page_size,
        mode=image["mode"], width=image["width"], height=image["height"], ptr=image["data_ptr"],
        label=reader.metadata["f1"] if "f1" in reader.metadata.dtype.names else [],
        table=reader.alloc_table,
    )

loader = Loader(
    "photos.beton", batch_size=4, num_workers=1, order=OrderOption.SEQUENTIAL, os_cache=False,
    drop_last=False,
    pipelines={"image": [SimpleRGBImageDecoder(), ToTensor()], "label": [IntDecoder(), ToTensor()]},
)
seen = [(image.numpy().copy(), label.numpy().copy()) for image, label in loader]
np.savez("loaded.npz", image=np.concatenate([i for i, _ in seen]),
         label=np.concatenate([l for _, l in seen]).ravel())
"""


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A folder in which stock ffcv has read our files and written some of its own."""
    folder = tmp_path_factory.mktemp("stock")
    # 84 photographs fill two pages, so that some image must move to the next page
    for i in range(84):
        image = folder / "tree" / "cb"[i % 2] / f"{i:03}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.symlink_to((CHINA, FLOWER)[i % 2])
    write_beton(folder / "tree", folder / "photos.beton", progress=False)
    write_beton(small_tree(folder / "small"), folder / "raw.beton", mode="raw", progress=False)
    write_beton(folder / "tree" / "b", folder / "unlabelled.beton", limit=3, progress=False)
    rng = np.random.default_rng(0)
    np.save(folder / "pixels.npy", rng.integers(0, 256, (40, 300, 200, 3), np.uint8))
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ORACLE],
        cwd=folder,
        check=True,
        timeout=300,
        stdout=subprocess.DEVNULL,
    )
    return folder


def small_tree(folder: Path, count: int = 6) -> Path:
    """PNGs of different small sizes in classes b, a, c."""
    rng = np.random.default_rng(1)
    for i in range(count):
        path = folder / "bac"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (5 + i, 9 + i, 3), np.uint8)).save(path)
    return folder


@pytest.fixture
def small(tmp_path):
    """A .beton of 6 small raw images and one photograph, all classes labelled."""
    folder = small_tree(tmp_path / "tree")
    (folder / "a" / "china.jpg").symlink_to(CHINA)
    write_beton(folder, tmp_path / "small.beton", progress=False)
    return tmp_path / "small.beton"


# Stock ffcv and we


@pytest.mark.parametrize("name", ["photos", "raw", "unlabelled"])
def test_stock_ffcv_reads_the_index_that_we_read(stock, name):
    ours, theirs = Beton(stock / f"{name}.beton"), np.load(stock / f"{name}.npz")
    assert theirs["fields"].tolist() == (["image"] if name == "unlabelled" else ["image", "label"])
    assert np.array_equal(ours.pointers, theirs["ptr"])
    assert np.array_equal(ours.modes, theirs["mode"])
    assert np.array_equal(ours.heights, theirs["height"])
    assert np.array_equal(ours.widths, theirs["width"])
    assert theirs["table"]["sample_id"].tolist() == list(range(len(ours)))
    assert np.array_equal(ours.pointers, theirs["table"]["ptr"])
    assert np.array_equal(ours.sizes, theirs["table"]["size"])
    if name == "unlabelled":
        assert ours.labels is None
    else:
        assert np.array_equal(ours.labels, theirs["label"])


def test_stock_ffcvs_loader_and_page_cache_read_our_images(stock):
    ours, loaded = Beton(stock / "photos.beton"), np.load(stock / "loaded.npz")
    assert ours.data.size > 2 * PAGE
    assert ours.class_names == ("b", "c")
    assert loaded["label"].tolist() == [0] * 42 + [1] * 42 == ours.labels.tolist()
    china, flower = (np.array(Image.open(p)).astype(int) for p in (CHINA, FLOWER))
    for i, image in enumerate(loaded["image"]):
        expected = china if loaded["label"][i] else flower
        assert np.abs(image - expected).mean() < 2, i  # ffcv decodes with libjpeg's fast DCT
        assert np.array_equal(ours.decode(i), expected), i


def test_no_image_crosses_a_page_of_the_file(stock):
    theirs = np.load(stock / "photos.npz")
    table, page = theirs["table"], int(theirs["page_size"])
    first, last = table["ptr"] // page, (table["ptr"] + table["size"] - 1) // page
    assert np.array_equal(first, last)
    assert first.max() > first.min() > 0


@pytest.mark.parametrize("name", ["stock", "stock_more"])
def test_we_read_what_stock_ffcv_wrote(stock, name):
    beton, pixels = Beton(stock / f"{name}.beton"), np.load(stock / "pixels.npy")
    assert len(beton) == 40
    assert beton.labels.tolist() == [7 * i - 3 for i in range(40)]
    assert (beton.channels, beton.class_names, beton.info, beton.checksums) == (3, None, {}, None)
    assert set(beton.modes) == ({JPG, RAW} if name == "stock" else {RAW})
    for i in range(40):
        if beton.modes[i] == RAW:
            assert np.array_equal(beton.decode(i), pixels[i])
        else:
            assert beton.decode(i).shape == pixels[i].shape
    assert verify_beton(stock / f"{name}.beton", progress=False) == []
    assert "40 images" in describe(beton)


def test_a_stock_table_in_any_order_is_looked_up_by_pointer(stock, tmp_path):
    data = bytearray((stock / "stock.beton").read_bytes())
    start = int(np.frombuffer(data, HEADER, 1)["table_pointer"][0])
    table = np.frombuffer(bytes(data[start:]), TABLE)
    data[start:] = table[np.random.default_rng(0).permutation(len(table))].tobytes()
    (tmp_path / "shuffled.beton").write_bytes(data)
    shuffled, ordered = Beton(tmp_path / "shuffled.beton"), Beton(stock / "stock.beton")
    assert np.array_equal(shuffled.sizes, ordered.sizes)


def test_verify_finds_a_wrong_size_and_wrong_bytes_in_a_stock_file(stock, tmp_path):
    beton = Beton(stock / "stock.beton")
    first, second = np.flatnonzero(beton.modes == JPG)[:2]
    data = bytearray((stock / "stock.beton").read_bytes())
    record = HEADER.itemsize + 2 * FIELD.itemsize + 24 * int(first)
    assert data[record + 1 : record + 3] == (200).to_bytes(2, "little")
    data[record + 1 : record + 3] = (199).to_bytes(2, "little")
    middle = int(beton.pointers[second] + beton.sizes[second] // 2)
    data[middle : middle + 500] = bytes(500)
    (tmp_path / "wrong.beton").write_bytes(data)
    problems = verify_beton(tmp_path / "wrong.beton", progress=False)
    assert [i for i, _ in problems] == [first, second]
    assert problems[0][1] == "200 x 300 pixels, expected 199 x 300"
    assert problems[1][1].startswith("Corrupt JPEG data")


# Writing


def test_pixels_labels_and_names_come_back(small):
    beton = Beton(small)
    tree = small.parent / "tree"
    names = sorted(p.relative_to(tree).as_posix() for p in tree.rglob("*.*g"))
    assert beton.class_names == ("a", "b", "c")
    assert [beton.class_names[label] for label in beton.labels] == [name[0] for name in names]
    for i, name in enumerate(names):
        assert np.array_equal(beton.decode(i), np.array(Image.open(tree / name))), name
    assert beton.modes.tolist() == [RAW, RAW, JPG, RAW, RAW, RAW, RAW]
    assert beton.data[beton.pointers[2] :][: beton.sizes[2]].tobytes() == CHINA.read_bytes()
    assert beton.info["notes"] == {KEPT: 1}
    assert f"folder {tree}" in beton.info["source"]


def test_the_file_is_the_same_for_any_number_of_workers(small):
    for workers in (1, 5):
        other = small.with_name(f"{workers}.beton")
        write_beton(small.parent / "tree", other, workers=workers, progress=False)
        assert other.read_bytes() == small.read_bytes()


@pytest.mark.parametrize("channels", [1, 5])
def test_images_of_other_channels_are_written_and_read(tmp_path, channels):
    rng = np.random.default_rng(2)
    arrays = [rng.integers(0, 256, (70, 80 + i, channels), np.uint8) for i in range(3)]
    (tmp_path / "in").mkdir()
    for i, array in enumerate(arrays):
        np.save(tmp_path / "in" / f"{i}.npy", array)
    write_beton(tmp_path / "in", tmp_path / "n.beton", channels=channels, progress=False)
    beton = Beton(tmp_path / "n.beton")
    assert beton.channels == channels
    assert beton.labels is None
    for i, array in enumerate(arrays):
        assert np.array_equal(beton.decode(i), array)
    assert f"{channels} channels" in describe(beton)


def test_a_limit_takes_the_same_random_images_for_the_same_seed(tmp_path):
    tree = small_tree(tmp_path / "tree", 60)
    files = {}
    for seed in (0, 0, 1):
        out = tmp_path / f"{seed}-{len(files)}.beton"
        write_beton(tree, out, limit=20, seed=seed, progress=False)
        files[out] = Beton(out)
    first, again, other = files.values()
    assert [len(b) for b in files.values()] == [20, 20, 20]
    assert np.array_equal(first.widths, again.widths)
    assert not np.array_equal(first.widths, other.widths)
    assert np.array_equal(first.labels, np.sort(first.labels))  # in the source's order
    assert np.bincount(first.labels).min() > 1  # not the first 20, which are all of class a
    assert first.class_names == ("a", "b", "c")


def test_a_limit_beyond_the_source_takes_all(tmp_path):
    tree = small_tree(tmp_path / "tree")
    assert write_beton(tree, tmp_path / "x.beton", limit=99, progress=False)["samples"] == 6


def test_exif_orientations_are_counted(tmp_path):
    tree = small_tree(tmp_path / "tree")
    exif = Image.Exif()
    exif[0x0112] = 3
    for name in ("a/x.jpg", "b/y.jpg"):
        Image.open(CHINA).save(tree / name, exif=exif)
    write_beton(tree, tmp_path / "x.beton", progress=False)
    assert Beton(tmp_path / "x.beton").info["notes"]["EXIF orientation ignored"] == 2
    assert "2 x EXIF orientation ignored" in describe(Beton(tmp_path / "x.beton"))
    write_beton(tree, tmp_path / "y.beton", exif="rotate", progress=False)
    upside_down = np.array(Image.open(CHINA).rotate(180)).astype(int)
    shown = Beton(tmp_path / "y.beton").decode(2)
    assert np.abs(shown - upside_down).mean() < 10


def test_summary_counts_what_was_stored(tmp_path):
    tree = small_tree(tmp_path / "tree")
    (tree / "a" / "china.jpg").symlink_to(CHINA)
    done = write_beton(tree, tmp_path / "x.beton", progress=False)
    assert done["samples"] == 7
    assert done["classes"] == 3
    assert done["modes"] == {"jpg": 1, "raw": 6}
    assert done["bytes"] == (tmp_path / "x.beton").stat().st_size
    assert done["notes"] == {KEPT: 1}
    assert done["broken"] == []


def break_some(tree: Path) -> None:
    (tree / "a" / "0 empty.jpg").touch()
    (tree / "b" / "cut.jpg").write_bytes(CHINA.read_bytes()[:20000])
    (tree / "b" / "text.png").write_text("no image")
    (tree / "c" / "gone.jpg").symlink_to(tree / "nowhere.jpg")


def test_broken_images_are_named_and_nothing_is_written(tmp_path, capsys):
    tree = small_tree(tmp_path / "tree")
    break_some(tree)
    with pytest.raises(UserError, match=r"4 of 10 images are broken, nothing written: a/0 empty"):
        write_beton(tree, tmp_path / "x.beton")
    shown = capsys.readouterr().err
    for name in ("a/0 empty.jpg: the file is empty", "b/cut.jpg: ", "b/text.png: ", "c/gone.jpg: "):
        assert f"broken: {name}" in shown
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tree"]


def test_broken_images_are_left_out_on_demand_and_noted(tmp_path):
    tree = small_tree(tmp_path / "tree")
    write_beton(tree, tmp_path / "good.beton", progress=False)
    break_some(tree)
    done = write_beton(tree, tmp_path / "x.beton", skip_broken=True, progress=False)
    good, skipped = Beton(tmp_path / "good.beton"), Beton(tmp_path / "x.beton")
    assert done["samples"] == len(skipped) == 6
    assert np.array_equal(skipped.labels, good.labels)
    for i in range(6):
        assert np.array_equal(skipped.decode(i), good.decode(i))
    assert [line.split(":")[0] for line in skipped.info["broken"]] == [
        "a/0 empty.jpg",
        "b/cut.jpg",
        "b/text.png",
        "c/gone.jpg",
    ]
    assert "left out    b/text.png" in describe(skipped)
    for path in tree.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 10 images"):
        write_beton(tree, tmp_path / "none.beton", skip_broken=True, progress=False)
    assert not (tmp_path / "none.beton").exists()


def test_the_same_images_are_left_out_in_the_same_words_for_any_number_of_workers(tmp_path):
    tree = small_tree(tmp_path / "tree")
    break_some(tree)
    os.mkfifo(tree / "c" / "pipe.jpg")  # nobody will ever write to it
    (tree / "c" / "self.jpg").symlink_to("self.jpg")
    for i in range(3):
        (tree / "a" / f"{i}.heic").touch()
    files = [tmp_path / f"{workers}.beton" for workers in (1, 5)]
    for workers, file in zip((1, 5), files, strict=True):
        write = [*COMMAND, "write", tree, file, "--skip-broken", "--workers", str(workers)]
        done = subprocess.run(write, capture_output=True, text=True, check=True, timeout=60)
        assert "left out 3 files: 3 .heic" in done.stderr.splitlines()
    assert files[0].read_bytes() == files[1].read_bytes()
    beton = Beton(files[0])
    assert len(beton) == 6
    assert beton.info["broken"][2:] == [
        "b/text.png: no format that Pillow knows",
        "c/gone.jpg: a link to a file that is not there",
        "c/pipe.jpg: no regular file",
        "c/self.jpg: Too many levels of symbolic links",
    ]
    assert "left out    3 files: 3 .heic" in describe(beton)


def test_nothing_is_noted_of_files_left_out_where_there_are_none(small):
    assert "left_out" not in Beton(small).info


def test_a_missing_decoder_is_not_blamed_on_the_images(tmp_path, monkeypatch):
    tree = many_links(tmp_path / "in", 3)
    images._turbojpeg.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("ssl_xcit.data.turbojpeg.NAMES", ("libnone.so",))
    with pytest.raises(UserError, match=r"no JPEG decoder \(libnone.so: .*install libturbojpeg"):
        write_beton(tree, tmp_path / "x.beton", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_jpegs_with_extraneous_bytes_are_kept_and_named(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    data = CHINA.read_bytes()
    (tmp_path / "in" / "odd.jpg").write_bytes(data[:-2] + bytes(60) + data[-2:])
    write_beton(tmp_path / "in", tmp_path / "x.beton")
    assert f"{EXTRANEOUS}: odd.jpg" in capsys.readouterr().err
    assert verify_beton(tmp_path / "x.beton", progress=False) == []


def test_an_existing_file_is_kept_unless_asked(small):
    before = small.read_bytes()
    with pytest.raises(UserError, match=r"exists; .*--overwrite"):
        write_beton(small.parent / "tree", small, progress=False)
    assert small.read_bytes() == before
    reader = Beton(small)
    write_beton(small.parent / "tree", small, limit=2, overwrite=True, progress=False)
    assert len(Beton(small)) == 2
    assert verify_beton(small, progress=False) == []
    assert np.array_equal(reader.data, np.frombuffer(before, np.uint8))  # open maps stay valid


def test_a_failing_overwrite_keeps_the_old_file(small):
    before = small.read_bytes()
    break_some(small.parent / "tree")
    with pytest.raises(UserError, match="broken"):
        write_beton(small.parent / "tree", small, overwrite=True, progress=False)
    assert small.read_bytes() == before


def test_places_that_cannot_be_written_are_user_errors(tmp_path):
    tree = small_tree(tmp_path / "tree")
    for out, message in (
        (tmp_path / "no" / "x.beton", "No such file or directory"),
        (tmp_path / "tree" / "b" / "0.png" / "x.beton", "Not a directory"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(UserError, match=message):
            write_beton(tree, out, progress=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into every folder")
def test_a_folder_without_write_permission_is_a_user_error(tmp_path):
    tree = small_tree(tmp_path / "tree")
    tree.chmod(0o555)
    with pytest.raises(UserError, match="Permission denied"):
        write_beton(tree, tree / "x.beton", progress=False)


def test_a_second_writer_of_the_same_file_is_refused(tmp_path):
    tree = small_tree(tmp_path / "tree")
    with open(tmp_path / "x.beton.tmp", "wb") as other:
        other.write(b"the other's work")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing it"):
            write_beton(tree, tmp_path / "x.beton", progress=False)
        assert (tmp_path / "x.beton.tmp").read_bytes() == b"the other's work"


def many_links(folder: Path, count: int) -> Path:
    folder.mkdir()
    for i in range(count):
        (folder / f"{i}.jpg").symlink_to(CHINA)
    return folder


def limit_file_size() -> None:
    # What a full disk does to a write, this does for any file beyond 20 MB
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, 20_000_000))


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    many_links(tmp_path / "in", 150)
    done = subprocess.run(
        [*COMMAND, "write", tmp_path / "in", tmp_path / "x.beton"],
        capture_output=True,
        text=True,
        preexec_fn=limit_file_size,
    )
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last == f"error: {tmp_path}/x.beton: cannot be written: File too large"
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_an_interrupted_write_leaves_no_file_and_the_next_one_succeeds(tmp_path, sent, status):
    many_links(tmp_path / "in", 3000)
    out, temporary = tmp_path / "x.beton", tmp_path / "x.beton.tmp"
    arguments = [*COMMAND, "write", tmp_path / "in", out]
    process = subprocess.Popen(
        arguments, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    )
    deadline = time.monotonic() + 120
    while not (temporary.exists() and temporary.stat().st_size > PAGE):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(sent)
    _, shown = process.communicate(timeout=120)
    assert process.returncode == status
    assert "Traceback" not in shown
    left = {p.name for p in tmp_path.iterdir()} - {"in"}
    assert left == ({temporary.name} if sent == signal.SIGKILL else set())
    write_beton(tmp_path / "in", out, limit=3, progress=False)
    assert {p.name for p in tmp_path.iterdir()} - {"in"} == {out.name}
    assert verify_beton(out, progress=False) == []


def test_what_a_killed_writer_left_does_not_get_into_the_file(small):
    again = small.with_name("again.beton")
    small.with_name("again.beton.tmp").write_bytes(b"\xee" * (2 * small.stat().st_size))
    write_beton(small.parent / "tree", again, progress=False)
    assert again.read_bytes() == small.read_bytes()
    assert not small.with_name("again.beton.tmp").exists()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(st.integers(1, 3 * PAGE), st.integers(1, PAGE // 4), st.just(PAGE)), max_size=30
    ),
    st.integers(0, PAGE),
)
def test_images_of_any_sizes_follow_each_other_within_pages(sizes, position):
    starts, pages = [], [PAGE]
    for size in sizes:
        start, page = place(position, size)
        assert start >= position
        starts.append(start)
        pages.append(page)
        position = start + size
    page = max(pages)
    assert page & (page - 1) == 0
    for start, size in zip(starts, sizes, strict=True):
        assert start // page == (start + size - 1) // page


def test_an_image_larger_than_a_page_makes_the_pages_larger(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for i, side in enumerate((100, 2000, 100)):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(
            tmp_path / "in" / f"{i}.bmp"
        )
    write_beton(tmp_path / "in", tmp_path / "x.beton", mode="raw", progress=False)
    beton = Beton(tmp_path / "x.beton")
    assert beton.page_size == 2 * PAGE  # 12 MB
    ends = beton.pointers + beton.sizes - 1
    assert np.array_equal(beton.pointers // beton.page_size, ends // beton.page_size)
    assert verify_beton(tmp_path / "x.beton", progress=False) == []


# Reading


@pytest.fixture(scope="module")
def large_index(tmp_path_factory):
    """A sparse file with the true index of 1.3 million images of 110 kB, without the images."""

    path = tmp_path_factory.mktemp("large") / "large.beton"
    count, size, per_page = 1_300_000, 110_000, PAGE // 110_000
    with open(path, "w+b") as file:
        writer = BetonWriter(file, count, with_labels=True)
        i = np.arange(count)
        start = writer.position + i // per_page * PAGE + i % per_page * size
        image = writer.samples["image"]
        image["height"], image["width"], image["pointer"] = 375, 500, start
        writer.samples["label"] = i % 1000
        writer.table["sample"], writer.table["pointer"], writer.table["size"] = i, start, size
        writer.count, writer.position = count, int(start[-1]) + size
        writer.finish({"channels": 3, "class_names": [f"n{i:08}" for i in range(1000)]})
    return path


def test_an_index_of_imagenets_size_opens_in_seconds_with_little_memory(large_index):
    assert large_index.stat().st_size > 143e9
    tracemalloc.start()
    started = time.monotonic()
    beton = Beton(large_index)
    seconds = time.monotonic() - started
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 10
    assert kept < 50 * len(beton)  # bytes per image
    assert peak < 150 * len(beton)
    assert len(beton) == 1_300_000
    assert beton.labels[-1] == 299_999 % 1000
    assert beton.sizes.min() == beton.sizes.max() == 110_000


def test_the_map_is_shared_with_other_processes_and_cannot_be_written(small):
    beton = Beton(small)
    mapped = [
        line for line in Path("/proc/self/maps").read_text().splitlines() if str(small) in line
    ]
    assert mapped
    assert all(line.split()[1] == "r--s" for line in mapped)
    with pytest.raises(ValueError, match="read-only"):
        beton.data[0] = 1


def test_a_closed_file_leaves_no_handle_and_no_map(small):
    before = len(os.listdir("/proc/self/fd"))
    beton = Beton(small)
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    del beton
    assert len(os.listdir("/proc/self/fd")) == before
    assert str(small) not in Path("/proc/self/maps").read_text()


def test_a_file_cut_anywhere_is_refused(small):
    data = small.read_bytes()
    beton = Beton(small)
    edges = [0, 1, HEADER.itemsize, int(beton.pointers[0]), int(beton.pointers[-1])]
    table = len(data) - TABLE.itemsize * len(beton)
    edges += [
        table - 1,
        table,
        table + 1,
        table + 24,
        len(data) - 25,
        len(data) - 24,
        len(data) - 1,
    ]
    for length in [*edges, *np.linspace(2, len(data) - 1, 50).astype(int)]:
        os.truncate(small, length)
        with pytest.raises(UserError, match=r"small.beton: .*(cut|too few|table entries)"):
            Beton(small)
        small.write_bytes(data)
    small.write_bytes(data + bytes(24))
    with pytest.raises(UserError, match="8 table entries, expected 7"):
        Beton(small)


def test_a_stock_file_whose_table_was_cut_is_refused(stock, tmp_path):
    for name, entries in (("stock", 1), ("stock_more", 41), ("stock_more", 1)):
        data = (stock / f"{name}.beton").read_bytes()
        (tmp_path / "cut.beton").write_bytes(data[: -TABLE.itemsize * entries])
        with pytest.raises(UserError, match="table"):
            Beton(tmp_path / "cut.beton")


def significant_bytes(data: bytes) -> np.ndarray:
    """Where the index of a file of ours lies: all but padding, images and unused arguments."""
    header = np.frombuffer(data, HEADER, 1)[0]
    samples = HEADER.itemsize + 2 * FIELD.itemsize
    notes = np.frombuffer(data, REFERENCE, 1, HEADER.itemsize + 17)[0]
    end = int(notes["pointer"]) + int(notes["json_size"])
    return np.concatenate(
        [
            np.arange(HEADER.itemsize + 17 + REFERENCE.itemsize),
            np.arange(HEADER.itemsize + FIELD.itemsize, HEADER.itemsize + FIELD.itemsize + 17),
            np.arange(samples, samples + 24 * int(header["num_samples"])),
            np.arange(int(notes["pointer"]), end),
            np.arange(int(header["table_pointer"]), len(data)),
        ]
    )


def test_a_flipped_bit_anywhere_in_the_index_is_refused(small):
    data = small.read_bytes()
    places = significant_bytes(data)
    rng = np.random.default_rng(0)
    head = HEADER.itemsize + 17 + REFERENCE.itemsize
    with open(small, "r+b", buffering=0) as file:
        for position in [*range(head), *rng.choice(places, 300)]:
            flipped = data[position] ^ 1 << rng.integers(8)
            os.pwrite(file.fileno(), bytes([flipped]), position)
            with pytest.raises(UserError, match=r"small.beton: .*; copy it again"):
                Beton(small)
            os.pwrite(file.fileno(), data[position : position + 1], position)
    assert len(Beton(small)) == 7


def test_a_flipped_bit_in_any_image_is_found_by_verify(small):
    data, beton = small.read_bytes(), Beton(small)
    rng = np.random.default_rng(0)
    for i in range(len(beton)):
        flipped = bytearray(data)
        flipped[int(beton.pointers[i] + rng.integers(beton.sizes[i]))] ^= 1 << rng.integers(8)
        small.write_bytes(flipped)
        assert verify_beton(small, progress=False) == [(i, "its bytes do not match their checksum")]


def edited(data: bytes, **changes: int) -> bytes:
    """A stock-like file (no checksums) with one value of sample 1 or of its table entry changed."""
    data = bytearray(data)
    arguments = HEADER.itemsize + 17
    data[arguments : arguments + REFERENCE.itemsize] = bytes(REFERENCE.itemsize)
    start = HEADER.itemsize + 2 * FIELD.itemsize + 24
    offsets = {"mode": (0, 1), "width": (1, 2), "height": (3, 2), "pointer": (5, 8)}
    table = int(np.frombuffer(bytes(data), HEADER, 1)["table_pointer"][0]) + 24
    entry = {"entry_sample": (0, 8), "entry_pointer": (8, 8), "entry_size": (16, 8)}
    for name, value in changes.items():
        base, (offset, size) = (start, offsets[name]) if name in offsets else (table, entry[name])
        data[base + offset : base + offset + size] = value.to_bytes(size, "little")
    return bytes(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": 2}, r"1 of its images \(first: 1\) have an unknown mode"),
        ({"width": 0}, "a height or width of 0"),
        ({"height": 0}, "a height or width of 0"),
        ({"width": 3000}, "a size unlike its pixels'"),
        ({"pointer": 4096}, "no entry in its allocation table"),
        ({"entry_pointer": 4096}, "no entry in its allocation table"),
        ({"entry_sample": 2}, "no entry in its allocation table"),
        ({"entry_size": 1}, "a size unlike its pixels'"),
        ({"entry_size": 0}, "bytes outside of the image region"),
        ({"entry_size": 1 << 40}, "bytes outside of the image region"),
        ({"entry_size": (1 << 64) - 1}, "bytes outside of the image region"),
        ({"pointer": 8, "entry_pointer": 8}, "bytes outside of the image region"),
        ({"pointer": 1 << 40, "entry_pointer": 1 << 40}, "bytes outside of the image region"),
        ({"pointer": 1 << 63, "entry_pointer": 1 << 63}, "bytes outside of the image region"),
    ],
)
def test_a_contradiction_in_a_file_without_checksums_is_refused(small, changes, message):
    data = small.read_bytes()
    small.write_bytes(edited(data))
    assert len(Beton(small)) == 7
    small.write_bytes(edited(data, **changes))
    with pytest.raises(UserError, match=message):
        Beton(small)


def test_other_files_are_refused_with_a_reason(tmp_path):
    path = tmp_path / "x.beton"
    with pytest.raises(UserError, match="found none; write one with"):
        Beton(path)
    unfinished = np.zeros(1, HEADER)
    unfinished["version"], unfinished["num_fields"], unfinished["num_samples"] = 2, 1, 5
    for data, message in (
        (b"", "0 bytes are too few"),
        (CHINA.read_bytes(), "not a .beton of version 2"),
        (bytes(9000), "not a .beton of version 2"),
        (unfinished.tobytes() + bytes(9000), "never finished"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=message):
            Beton(path)


@pytest.mark.parametrize("types", [[255, 1], [1, 1], [7, 2]])
def test_unknown_field_types_are_refused(small, types):
    data = bytearray(small.read_bytes())
    for i, number in enumerate(types):
        data[HEADER.itemsize + i * FIELD.itemsize] = number
    small.write_bytes(data)
    with pytest.raises(UserError, match="expected FFCV's field types"):
        Beton(small)


# The command


def run(capsys, *arguments) -> tuple[int, str, str]:
    try:
        main([str(a) for a in arguments])
        status = 0
    except SystemExit as stop:
        status = stop.code
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_the_commands_write_describe_and_verify(tmp_path, capsys):
    tree = small_tree(tmp_path / "tree")
    (tree / "a" / "china.jpg").symlink_to(CHINA)
    out = tmp_path / "x.beton"
    status, shown, decided = run(capsys, "write", tree, out, "--max-side", 300, "--quality", 80)
    assert status == 0
    assert "wrote" in shown
    assert "7 images (1 jpg, 6 raw), 3 classes" in shown
    assert "labels: 3 folder names" in decided
    assert "1 x shrunk, e.g. a/china.jpg" in decided
    status, shown, _ = run(capsys, "info", out)
    assert status == 0
    for expected in ("7 images", "1 jpg, 6 raw; 3 channels", "a, b, c", "max_side 300, quality 80"):
        assert expected in shown
    assert shown.splitlines()[3].split() == ["width", "9", "9", "12", "214", "300"]
    status, shown, _ = run(capsys, "verify", out)
    assert (status, shown) == (0, f"{out}: all 7 images are good\n")


def test_names_that_are_not_unicode_are_printed(tmp_path):
    tree = small_tree(tmp_path / "tree")
    odd = os.fsdecode(b"\xff")
    (tree / odd).mkdir()
    (tree / odd / f"{odd}.jpg").touch()
    write = [*COMMAND, "write", tree, tmp_path / "x.beton"]
    done = subprocess.run(write, capture_output=True)
    assert done.returncode == 2
    assert rb"\udcff/\udcff.jpg: the file is empty" in done.stderr.splitlines()[-1]
    subprocess.run([*write, "--skip-broken"], capture_output=True, check=True)
    assert Beton(tmp_path / "x.beton").class_names == ("a", "b", "c", odd)
    done = subprocess.run([*COMMAND, "info", tmp_path / "x.beton"], capture_output=True, check=True)
    assert rb"a, b, c, \udcff" in done.stdout


def test_labels_can_be_declined_on_the_command_line(tmp_path, capsys):
    tree = small_tree(tmp_path / "tree")
    status, shown, decided = run(capsys, "write", tree, tmp_path / "x.beton", "--no-labels")
    assert status == 0
    assert "no labels" in shown
    assert "labels: none, as asked" in decided
    assert Beton(tmp_path / "x.beton").labels is None
    status, shown, _ = run(capsys, "info", tmp_path / "x.beton")
    assert "labels      none" in shown


def test_verify_lists_what_is_damaged_and_fails(small, capsys):
    beton = Beton(small)
    with open(small, "r+b") as file:
        for i in (1, 4):
            file.seek(beton.pointers[i])
            file.write(b"\0\1\2\3")
    status, shown, error = run(capsys, "verify", small)
    assert status == 2
    assert "image 1: its bytes" in shown
    assert "image 4: its bytes" in shown
    assert error.startswith(f"error: {small}: 2 images are damaged, the first is 1;")
    assert error.count("\n") == 1


def test_mistakes_are_one_line_and_status_2(small, tmp_path, capsys):
    tree = tmp_path / "tree"
    for arguments, message in (
        (("write", tree, small), "exists; name another"),
        (("write", tmp_path / "no", tmp_path / "x.beton"), "expected a folder of images or one of"),
        (("write", tree, tmp_path / "x.beton", "--limit", 0), "limit must be at least 1"),
        (("write", tree, tmp_path / "x.beton", "--quality", 0), "quality must be 1 to 100, got 0"),
        (("write", tree, tmp_path / "x.beton", "--split", "test"), "split and root are for"),
        (("verify", small, "--workers", -1), "workers must be 0 or more, got -1"),
        (("info", tmp_path / "none.beton"), "found none"),
        (("verify", CHINA), "not a .beton"),
    ):
        status, _, error = run(capsys, *arguments)
        assert status == 2
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1
    status, _, error = run(capsys, "write", tree, small, "--max-side", 9, "--short-side", 9)
    assert status == 2
    assert "not allowed with" in error


def test_help_imports_neither_torch_nor_torchvision_nor_ffcv():
    code = (
        "import sys; from ssl_xcit.data import command\n"
        "try: command.main(['write', '--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'torchvision', 'ffcv', 'numba') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--skip-broken" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.skipif(not IMAGENET_SAMPLE.is_dir(), reason="no sample of ImageNet beside the project")
def test_a_sample_of_imagenet_is_stored_byte_for_byte(tmp_path):
    write_beton(IMAGENET_SAMPLE, tmp_path / "x.beton", progress=False)
    beton = Beton(tmp_path / "x.beton")
    files = sorted(IMAGENET_SAMPLE.rglob("*.JPEG"))
    assert len(beton) == len(files)
    assert beton.class_names == tuple(sorted(p.name for p in IMAGENET_SAMPLE.iterdir()))
    kept = 0
    for i, file in enumerate(files):
        stored = beton.data[beton.pointers[i] :][: beton.sizes[i]].tobytes()
        assert beton.class_names[beton.labels[i]] == file.parent.name
        kept += stored == file.read_bytes()
    assert kept == beton.info["notes"][KEPT] >= 0.99 * len(files)
    assert verify_beton(tmp_path / "x.beton", progress=False) == []
    assert json.dumps(beton.info)  # plain data
