"""Images in one file: FFCV's .beton format, read and written by our own code.

    python -m ssl_xcit.beton write SOURCE OUT    # an image folder, or a dataset by its name
    python -m ssl_xcit.beton info FILE
    python -m ssl_xcit.beton verify FILE         # decodes every image
    python -m ssl_xcit.beton preview FILE --out PNG    # draws what the model sees of it

The format is version 2 of ffcv 1.0.2 (`ffcv/types.py`), little-endian:

    header       version u16, number of fields u16, page size u32, samples u64, table's pointer u64
    fields       one 1,041-byte descriptor each: type u8, name 16 bytes, arguments 1,024 bytes
    samples      one record each: image (mode u8, width u16, height u16, pointer u64), label i64
    images       from a page boundary on; none crosses a page boundary, for ffcv's page cache
    notes        ours, see below
    table        one entry per image, up to the end of the file: sample u64, pointer u64, size u64

What FFCV has no place for lies between the images and the table, where stock ffcv never looks: a
JSON object (class names, channels, source, options, counts: `Beton.info`) and one CRC-32 (u32) per
image. The image field's arguments, unused by ffcv, say where (`REFERENCE`). Stock ffcv reads our
files, except images of other than 3 channels, which it does not know. We read stock ffcv's files:
their first image field and the integer field `label`; other fields are ignored.

`import ffcv` is avoided on purpose: it takes seconds and changes torch's and numba's global state.
"""

import argparse
import fcntl
import io
import json
import os
import signal
import sys
import time
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from ssl_xcit.errors import UserError, exit_on_user_error
from ssl_xcit.images import (
    DATASETS,
    ENCODED,
    EXTRANEOUS,
    JPG,
    KEPT,
    RAW,
    BrokenImageError,
    Encoding,
    Source,
    Stored,
    encode,
    is_harmless,
    jpeg_problem,
    open_source,
)
from ssl_xcit.processor import usable_cores

VERSION = 2
INT_FIELD, IMAGE_FIELD = 1, 2

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("table_pointer", "<u8"),
    ]
)
FIELD = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "u1", 1024)])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
TABLE = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])
BYTES = np.dtype([("pointer", "<u8"), ("size", "<u8")])
RECORDS = dict(enumerate(["<f8", "<i8", IMAGE, BYTES, "<u8", BYTES, "<u8"]))
"""What a sample's record holds for each of FFCV's field types: float, int, image, bytes, array,
JSON, tensor (`ffcv/fields/*.py`). Types from 2 on have entries in the table."""
REFERENCE = np.dtype(
    [
        ("magic", "S8"),
        ("pointer", "<u8"),
        ("json_size", "<u8"),  # the checksums follow the JSON at the next multiple of 8
        ("notes_crc", "<u4"),  # CRC-32 of JSON, padding and checksums
        ("index_crc", "<u4"),  # CRC-32 of header, fields, samples and table
    ]
)
MAGIC = b"ssl_xcit"

PAGE = 8 << 20
"""Bytes per page, ffcv's default; an image larger than that makes the file's pages larger."""

Result = TypeVar("Result")


class Beton:
    """A .beton file, mapped into memory and checked in full except for the images themselves.

    The map is read-only and is the page cache itself, so all processes of a host share it.
    Opening reads about 50 bytes per image (1.3 million images: 0.1 s, 140 MB of memory).

    Attributes:
        path: the file.
        num_samples: images in the file, N.
        page_size: bytes per page.
        pointers, sizes: (N,) int64, bytes: image i is `data[pointers[i] : pointers[i] + sizes[i]]`.
        heights, widths: (N,) int32, pixels.
        modes: (N,) uint8: JPG = 0, or RAW = 1 (height × width × channels bytes).
        labels: (N,) int64, or None when the file has no field `label`.
        class_names: the name of each label, or None when unknown.
        channels: 3, unless our writer noted otherwise.
        checksums: (N,) uint32, CRC-32 of each image's bytes, or None in a file of stock ffcv.
        info: what our writer noted: source, options, counts; empty in a file of stock ffcv.
        data: the whole file, uint8.

    Raises:
        UserError: the file is missing, is no .beton, was cut, or contradicts itself.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(
                f"{path}: expected a .beton file, found none; "
                "write one with `python -m ssl_xcit.beton write`"
            )
        try:
            length = self.path.stat().st_size
            if length < HEADER.itemsize:
                self._refuse(f"{length} bytes are too few for a .beton")
            self.data = np.memmap(self.path, np.uint8, mode="r")
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error

        header = self.data[: HEADER.itemsize].view(HEADER)[0]
        if header["version"] != VERSION or not 0 < header["num_fields"] < 256:
            self._refuse(f"not a .beton of version {VERSION}")
        self.num_samples = int(header["num_samples"])
        self.page_size = int(header["page_size"])
        table_start = int(header["table_pointer"])
        if table_start == 0 or self.num_samples == 0:
            self._refuse("its writing was never finished, or it holds no image")
        fields_end = HEADER.itemsize + int(header["num_fields"]) * FIELD.itemsize
        if max(fields_end, table_start) > length:
            self._refuse(f"cut: {length:,} bytes, but its table should start at {table_start:,}")
        if (length - table_start) % TABLE.itemsize:
            self._refuse("cut inside of its allocation table")
        fields = self.data[HEADER.itemsize : fields_end].view(FIELD)
        table = self.data[table_start:].view(TABLE)

        samples_end = self._read_samples(fields, table, fields_end, table_start)
        self.info: dict = {}
        self.checksums: np.ndarray | None = None
        where = fields["type_id"].tolist().index(IMAGE_FIELD)
        reference = fields["arguments"][where, : REFERENCE.itemsize]
        if reference.any():  # stock ffcv writes zeros
            reference = reference.view(REFERENCE)[0]
            self._read_notes(reference, table_start)
        self.channels: int = self.info.get("channels", 3)
        names = self.info.get("class_names")
        self.class_names: tuple[str, ...] | None = None if names is None else tuple(names)
        self._check_samples(samples_end, table_start)
        if self.info:
            crc = _index_crc(header, fields, self.data[fields_end:samples_end], table)
            if crc != reference["index_crc"]:
                self._refuse("its index does not match its checksum")

    def __len__(self) -> int:
        return self.num_samples

    def decode(self, index: int) -> UInt8[np.ndarray, "h w c"]:
        """Pixels of one image, JPEGs by Pillow: for tools and tests, the loader is faster."""
        stored = self.data[self.pointers[index] :][: self.sizes[index]]
        if self.modes[index] == RAW:
            return np.array(stored).reshape(self.heights[index], self.widths[index], -1)
        return np.array(Image.open(io.BytesIO(stored.tobytes())).convert("RGB"))

    def _read_samples(
        self, fields: np.ndarray, table: np.ndarray, start: int, table_start: int
    ) -> int:
        """Fills the per-image arrays; returns where the samples' records end."""
        types = fields["type_id"].tolist()
        if not set(types) <= set(RECORDS) or IMAGE_FIELD not in types:
            self._refuse(f"expected FFCV's field types 0-6, one of them 2 (image), got {types}")
        record = np.dtype([(str(i), RECORDS[t]) for i, t in enumerate(types)], align=True)
        end = start + self.num_samples * record.itemsize
        if end > table_start:
            self._refuse(f"no room for {self.num_samples:,} samples before its table")
        entries = self.num_samples * sum(t >= IMAGE_FIELD for t in types)
        if len(table) != entries:
            self._refuse(f"{len(table):,} table entries, expected {entries:,}")

        samples = self.data[start:end].view(record)
        images = samples[str(types.index(IMAGE_FIELD))]
        self.modes = images["mode"].copy()
        self.heights = images["height"].astype(np.int32)
        self.widths = images["width"].astype(np.int32)
        self.pointers = images["pointer"].astype(np.int64)
        self.sizes = self._look_up_sizes(table)
        is_label = (fields["type_id"] == INT_FIELD) & (fields["name"] == b"label")
        self.labels: np.ndarray | None = None
        if is_label.any():
            self.labels = samples[str(is_label.argmax())].astype(np.int64)
        return end

    def _look_up_sizes(self, table: np.ndarray) -> np.ndarray:
        """(N,) sizes by pointer: stock ffcv's parallel writer leaves the table in any order."""
        pointers, wanted = table["pointer"], self.pointers.view(np.uint64)
        entry = np.arange(self.num_samples)
        if not np.array_equal(pointers, wanted):
            order = np.argsort(pointers)
            entry = order[np.searchsorted(pointers, wanted, sorter=order).clip(max=len(order) - 1)]
        wrong = pointers[entry] != wanted
        wrong |= table["sample"][entry] != np.arange(self.num_samples, dtype=np.uint64)
        self._refuse_any(wrong, "no entry in its allocation table")
        return table["size"][entry].astype(np.int64)

    def _read_notes(self, reference: np.void, table_start: int) -> None:
        start = int(reference["pointer"])
        json_end = start + int(reference["json_size"])
        checksums_start = _round_up(json_end, 8)
        end = checksums_start + 4 * self.num_samples
        known = reference["magic"] == MAGIC and end <= table_start
        if not known or zlib.crc32(self.data[start:end]) != reference["notes_crc"]:
            self._refuse("the notes behind its images are damaged")
        self.info = json.loads(self.data[start:json_end].tobytes())
        self.checksums = self.data[checksums_start:end].view("<u4")

    def _check_samples(self, samples_end: int, table_start: int) -> None:
        self._refuse_any(self.modes > RAW, "an unknown mode")
        self._refuse_any((self.heights == 0) | (self.widths == 0), "a height or width of 0")
        # A u64 beyond int64 has become negative, so that the subtraction cannot overflow
        outside = (self.pointers < samples_end) | (self.sizes <= 0)
        outside |= self.sizes > table_start - self.pointers
        self._refuse_any(outside, "bytes outside of the image region")
        pixels = self.heights.astype(np.int64) * self.widths * self.channels
        self._refuse_any((self.modes == RAW) & (self.sizes != pixels), "a size unlike its pixels'")
        if self.class_names is not None and self.labels is not None:
            wrong = (self.labels < 0) | (self.labels >= len(self.class_names))
            self._refuse_any(wrong, f"a label outside of the {len(self.class_names)} classes")

    def _refuse(self, what: str) -> None:
        raise UserError(f"{self.path}: {what}; copy it again from its origin, or write it again")

    def _refuse_any(self, wrong: np.ndarray, what: str) -> None:
        if wrong.any():
            self._refuse(f"{wrong.sum():,} of its images (first: {wrong.argmax()}) have {what}")


def _index_crc(
    header: np.ndarray | np.void, fields: np.ndarray, samples: np.ndarray, table: np.ndarray
) -> int:
    crc = 0
    # The fields' arguments are left out, since this number is one of them
    for part in (header, fields["type_id"], fields["name"], samples, table):
        crc = zlib.crc32(part.tobytes(), crc)
    return crc


def _round_up(position: int, multiple: int) -> int:
    return -(-position // multiple) * multiple


# Writing


def write_beton(
    source: str | Path,
    out: str | Path,
    *,
    mode: Literal["auto", "jpg", "raw"] = "auto",
    max_side: int | None = None,
    short_side: int | None = None,
    quality: int = 90,
    exif: Literal["ignore", "rotate"] = "ignore",
    channels: int = 3,
    check: Literal["full", "header"] = "full",
    labels: bool = True,
    split: Literal["train", "test"] | None = None,
    root: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    skip_broken: bool = False,
    overwrite: bool = False,
    workers: int = 0,
    progress: bool = True,
) -> dict:
    """Store the images of `source` in the file `out`, bit for bit the same for any `workers`.

    A JPEG that is plain RGB or gray, and is not to be shrunk or rotated, is stored as the bytes it
    is; all else is decoded by Pillow (first frame, 16 bits to 8, CMYK to RGB, transparency over
    white) and stored as pixels or encoded as JPEG.

    Args:
        source: a folder of images (a folder per class, flat, or nested), or one of `DATASETS`.
            Labels are the sorted folder names if every image lies exactly one folder deep.
        out: the file; it appears complete (temporary file, fsync, rename) or not at all.
        mode: jpg, raw (pixels), or auto: JPEGs as JPEG, others raw up to 64 × 64, else as JPEG.
        max_side, short_side: shrink images whose longer (shorter) side has more pixels than that.
        quality: of the JPEGs encoded here, 1 to 100.
        exif: ignore orientation tags, as DINO's own data loading does, or rotate by them.
        channels: 3 (RGB), 1 (gray) or another number, then of .npy files: uint8, (h, w, channels).
            All but 3 are stored raw, and only we can read them, not stock ffcv.
        check: full decodes the JPEGs that are stored as they are, header trusts them.
        labels: False ignores the folders' names.
        split: train (default) or test, of a dataset by name.
        root: torchvision's folder of the dataset, default data/ (it downloads what is missing);
            for FashionMNIST the Debian package dataset-fashion-mnist comes first.
        limit: store a random subset of so many images, chosen by `seed`, in the source's order.
        skip_broken: leave out what cannot be read instead of writing nothing.
        overwrite: replace an existing file.
        workers: threads, 0 for one per core that this process may use.
        progress: say on stderr what is decided and found, with a bar on a terminal.

    Returns:
        out, samples, bytes, classes, modes, notes (how many images had what), broken, seconds.

    Raises:
        UserError: bad arguments, nothing to store, broken images, or `out` cannot be written.
    """
    started = time.monotonic()
    encoding = Encoding(mode, max_side, short_side, quality, exif, channels, check)
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, got {limit}")
    with new_file(Path(out), overwrite) as file:
        images = open_source(source, labels, split, root)
        chosen = np.arange(images.size)
        if limit is not None:
            # RandomState's numbers are frozen by numpy's policy, a Generator's are not
            chosen = np.sort(np.random.RandomState(seed).permutation(images.size)[:limit])
        beton = _BetonWriter(file, len(chosen), images.labels is not None)
        info = {
            "channels": channels,
            "class_names": images.class_names,
            "source": images.description,
            "options": {**asdict(encoding), "limit": limit, "seed": seed},
        }
        info |= _store_images(
            beton, images, chosen.tolist(), encoding, skip_broken, workers, progress
        )
        size = beton.finish(info)
    jpg = info["notes"].get(KEPT, 0) + info["notes"].get(ENCODED, 0)
    return {
        "out": str(out),
        "samples": beton.count,
        "bytes": size,
        "classes": None if images.class_names is None else len(images.class_names),
        "modes": {"jpg": jpg, "raw": beton.count - jpg},
        "notes": info["notes"],
        "broken": info["broken"],
        "seconds": time.monotonic() - started,
    }


def _store_images(
    beton: "_BetonWriter",
    images: Source,
    chosen: Sequence[int],
    encoding: Encoding,
    skip_broken: bool,
    workers: int,
    progress: bool,
) -> dict:
    """Encodes the chosen images into `beton`; returns the `notes` and `broken` of `Beton.info`."""

    def say(line: str) -> None:
        if progress:
            tqdm.write(line, file=sys.stderr)

    def encoded(i: int) -> Stored | BrokenImageError:
        try:
            return encode(images.read(i), encoding)
        except UserError:
            raise
        # Any file may run into any bug of any decoder, and each must be reported by its name
        except Exception as error:
            return BrokenImageError(str(error) or type(error).__name__)

    say(f"{len(chosen):,} images of {images.description}")
    notes: Counter[str] = Counter()
    examples: dict[str, str] = {}
    broken: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about odd EXIF data, without a file's name
        for i, image in _in_order(encoded, chosen, workers, "write", progress):
            if isinstance(image, BrokenImageError):
                broken.append(f"{images.name(i)}: {image}")
                say(f"broken: {broken[-1]}")
                continue
            for note in image.notes:
                notes[note] += 1
                examples.setdefault(note, images.name(i))
            if EXTRANEOUS in image.notes:
                say(f"{EXTRANEOUS}: {images.name(i)}")
            if skip_broken or not broken:  # else nothing will be written, but all is checked
                beton.append(image, 0 if images.labels is None else int(images.labels[i]))
    if broken and not skip_broken:
        raise UserError(
            f"{len(broken):,} of {len(chosen):,} images are broken, nothing written: "
            f"{'; '.join(broken[:3])}{' ...' if broken[3:] else ''}; "
            "repair or remove them, or pass --skip-broken"
        )
    if len(broken) == len(chosen):
        raise UserError(f"none of the {len(chosen):,} images of {images.description} can be read")
    for note, count in sorted(notes.items()):
        say(f"{count:,} x {note}, e.g. {examples[note]}")
    return {"notes": dict(sorted(notes.items())), "broken": broken}


def place(position: int, size: int) -> tuple[int, int]:
    """(start, page size) of an image of `size` bytes, at or after `position`.

    An image that would cross a boundary of its page size, PAGE or the next power of two that holds
    it, starts at that boundary. With the largest page size of all images as the file's, none
    crosses a page: boundaries of larger pages are boundaries of smaller ones too.
    """
    page = max(PAGE, 1 << (size - 1).bit_length())
    if position % page + size > page:
        position = _round_up(position, page)
    return position, page


class _BetonWriter:
    """Lays out a file of at most `capacity` images; images are streamed, the index is kept."""

    def __init__(self, file: BinaryIO, capacity: int, with_labels: bool) -> None:
        self.file, self.count, self.page_size = file, 0, PAGE
        self.fields = np.zeros(1 + with_labels, FIELD)
        self.fields["type_id"] = [IMAGE_FIELD, INT_FIELD][: 1 + with_labels]
        self.fields["name"] = [b"image", b"label"][: 1 + with_labels]
        record = np.dtype([("image", IMAGE), ("label", "<i8")][: 1 + with_labels], align=True)
        self.samples = np.zeros(capacity, record)
        self.table = np.zeros(capacity, TABLE)
        self.checksums = np.zeros(capacity, "<u4")
        self.samples_start = HEADER.itemsize + self.fields.nbytes
        self.position = _round_up(self.samples_start + self.samples.nbytes, PAGE)

    def append(self, image: Stored, label: int) -> None:
        start, page = place(self.position, len(image.data))
        self.page_size = max(self.page_size, page)
        sample = self.samples[self.count]
        sample["image"] = (image.mode, image.width, image.height, start)
        if "label" in self.samples.dtype.names:
            sample["label"] = label
        self.table[self.count] = (self.count, start, len(image.data))
        self.checksums[self.count] = zlib.crc32(image.data)
        self.file.seek(start)
        self.file.write(image.data)
        self.position = start + len(image.data)
        self.count += 1

    def finish(self, info: dict) -> int:
        """Write notes, table, samples and header; returns the file's bytes."""
        samples, table = self.samples[: self.count], self.table[: self.count]
        text = json.dumps(info).encode()
        notes_start = _round_up(self.position, 8)
        padding = bytes(-len(text) % 8)
        notes = text + padding + self.checksums[: self.count].tobytes()
        table_start = _round_up(notes_start + len(notes), 8)
        header = np.array(
            (VERSION, len(self.fields), self.page_size, self.count, table_start), HEADER
        )
        crc = _index_crc(header, self.fields, samples, table)
        reference = np.array((MAGIC, notes_start, len(text), zlib.crc32(notes), crc), REFERENCE)
        self.fields["arguments"][0, : REFERENCE.itemsize] = np.frombuffer(reference, np.uint8)
        for start, part in ((notes_start, notes), (table_start, table), (0, header)):
            self.file.seek(start)
            self.file.write(part)
        self.file.write(self.fields)
        self.file.write(samples)
        return table_start + table.nbytes


@contextmanager
def new_file(out: Path, overwrite: bool) -> Iterator[BinaryIO]:
    """A file that takes `out`'s place when the block ends well, and vanishes when it does not.

    Its name is `out`.tmp; what a killed process left under that name is written over.
    """
    temporary = out.with_name(out.name + ".tmp")
    try:
        if out.is_dir():
            raise UserError(f"{out}: is a folder, expected the name of a file to write")
        with open(os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            if not _is_ours(file, temporary):
                raise UserError(f"{out}: another process is writing it; wait, or name another file")
            try:
                if out.exists() and not overwrite:
                    raise UserError(f"{out}: exists; name another file, or pass --overwrite")
                file.truncate(0)
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, out)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        folder = os.open(out.parent, os.O_RDONLY)
        os.fsync(folder)  # the rename itself survives a power cut
        os.close(folder)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from error


def _is_ours(file: BinaryIO, path: Path) -> bool:
    """Locks an open file; False if another process holds it, or has renamed it meanwhile."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # some cluster file systems have no locks
    return path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))


def _in_order(
    function: Callable[[int], Result],
    indices: Sequence[int],
    workers: int,
    name: str,
    progress: bool,
) -> Iterator[tuple[int, Result]]:
    """(i, function(i)) in the given order, computed by threads, with a bar on a terminal.

    Threads suffice: reading, decoding and checksums release the interpreter's lock. Only few
    results wait, since they hold images.
    """
    if workers < 0:
        raise UserError(f"workers must be 0 or more, got {workers}")
    workers = workers or usable_cores()
    hidden = not (progress and sys.stderr.isatty())
    waiting = deque()
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(indices), desc=name, unit=" images", disable=hidden) as bar,
    ):
        for k in range(len(indices) + 4 * workers):
            if k < len(indices):
                waiting.append((indices[k], pool.submit(function, indices[k])))
            if k >= 4 * workers:
                i, future = waiting.popleft()
                yield i, future.result()
                bar.update()


# Checking and showing


def verify_beton(
    path: str | Path, workers: int = 0, progress: bool = True
) -> list[tuple[int, str]]:
    """(index, what is wrong) of every image whose bytes, size or pixels are not as they should be.

    Compares checksums (files of our writer) and decodes each JPEG with the loader's decoder.

    Raises:
        UserError: the file cannot be opened; see `Beton`.
    """
    beton = Beton(path)

    def check(i: int) -> str | None:
        # pread, not the map: page faults would hold the interpreter's lock while disks work
        data = os.pread(file.fileno(), beton.sizes[i], beton.pointers[i])
        if beton.checksums is not None and zlib.crc32(data) != beton.checksums[i]:
            return "its bytes do not match their checksum"
        if beton.modes[i] == RAW:
            return None
        problem = jpeg_problem(data, int(beton.heights[i]), int(beton.widths[i]))
        # What matches its checksum is as the writer stored it, which has named such images
        if problem and is_harmless(problem) and beton.checksums is not None:
            return None
        return problem

    with open(path, "rb") as file:
        found = _in_order(check, range(len(beton)), workers, "verify", progress)
        return [(i, problem) for i, problem in found if problem]


def describe(beton: Beton) -> str:
    """What `info` prints."""
    jpgs = int((beton.modes == JPG).sum())
    lines = [
        f"{beton.path}: {len(beton):,} images, {_megabytes(len(beton.data))}",
        f"stored      {jpgs:,} jpg, {len(beton) - jpgs:,} raw; {beton.channels} channels; "
        f"{beton.sizes.mean():,.0f} bytes per image; pages of {beton.page_size >> 20} MiB",
        "            min     5%    50%    95%    max",
    ]
    for name, values in (("width", beton.widths), ("height", beton.heights)):
        quantiles = np.quantile(values, (0, 0.05, 0.5, 0.95, 1))
        lines.append(f"{name:8}" + "".join(f"{q:7.0f}" for q in quantiles))
    if beton.labels is None:
        lines.append("labels      none")
    else:
        names = beton.class_names or ()
        counts = np.unique(beton.labels, return_counts=True)[1]
        if names:  # then there may be classes without images
            counts = np.bincount(beton.labels, minlength=len(names))
        some = ": " + ", ".join(names[:5]) + (", ..." if names[5:] else "") if names else ""
        spread = f"{counts.min():,} to {counts.max():,}"
        lines.append(f"labels      {len(counts):,} classes of {spread} images{some}")
    if beton.info:
        options = {k: v for k, v in beton.info["options"].items() if v is not None}
        lines.append(f"source      {beton.info['source']}")
        lines.append("options     " + ", ".join(f"{k} {v}" for k, v in options.items()))
        lines += [f"            {n:,} x {note}" for note, n in beton.info["notes"].items()]
        lines += [f"left out    {name}" for name in beton.info["broken"]]
    return "\n".join(lines)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


# The command


def _write_command(args: argparse.Namespace) -> None:
    options = {k: v for k, v in vars(args).items() if k not in ("run", "command")}
    # So that SIGTERM, a batch system's way to stop a job, removes the temporary file too
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        done = write_beton(**options)
    finally:
        signal.signal(signal.SIGTERM, previous)
    print(
        f"wrote {done['out']}: {done['samples']:,} images"
        f" ({done['modes']['jpg']:,} jpg, {done['modes']['raw']:,} raw),"
        f" {'no labels' if done['classes'] is None else str(done['classes']) + ' classes'},"
        f" {_megabytes(done['bytes'])}, {done['seconds']:.1f} s"
    )


def _info_command(args: argparse.Namespace) -> None:
    print(describe(Beton(args.file)))


def _verify_command(args: argparse.Namespace) -> None:
    problems = verify_beton(args.file, args.workers)
    for index, problem in problems[:20]:
        print(f"image {index}: {problem}")
    if problems:
        raise UserError(
            f"{args.file}: {len(problems):,} images are damaged, the first is {problems[0][0]}; "
            "copy the file again from its origin, or write it again"
        )
    print(f"{args.file}: all {len(Beton(args.file)):,} images are good")


def _preview_command(args: argparse.Namespace) -> None:
    # Here, not above: the preview is built on this module, and the other commands need neither
    from ssl_xcit.config import read_crops
    from ssl_xcit.preview import write_preview

    crops = read_crops(args.config) if args.config else None
    shown, width, height = write_preview(
        args.file, args.out, crops=crops, images=args.images, seed=args.seed, epoch=args.epoch
    )
    print(f"wrote {args.out}: views of {shown:,} images, {width:,} x {height:,} pixels")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ssl_xcit.beton", description="Images in one file of FFCV's .beton format."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    write = commands.add_parser("write", help="store a folder of images, or a torchvision dataset")
    write.set_defaults(run=_write_command)
    write.add_argument(
        "source",
        help=f"folder of images (a folder per class, flat, or nested), or {', '.join(DATASETS)}",
    )
    write.add_argument("out", help="file to write; it appears complete or not at all")
    write.add_argument(
        "--mode",
        choices=("auto", "jpg", "raw"),
        default="auto",
        help="auto: JPEG as JPEG, others raw pixels up to 64 x 64, else JPEG (default)",
    )
    shrink = write.add_mutually_exclusive_group()
    shrink.add_argument("--max-side", type=int, metavar="N", help="shrink longer sides to N pixels")
    shrink.add_argument("--short-side", type=int, metavar="N", help="shrink shorter sides to N")
    write.add_argument(
        "--quality",
        type=int,
        default=90,
        help="of JPEGs encoded here (90); JPEGs that keep their size stay as they are",
    )
    write.add_argument(
        "--exif",
        choices=("ignore", "rotate"),
        default="ignore",
        help="orientation tags: ignore as DINO does (default), or rotate the pixels",
    )
    write.add_argument(
        "--channels",
        type=int,
        default=3,
        help="3 (RGB, default), 1 (gray), or that of your .npy files: uint8, (h, w, channels)",
    )
    write.add_argument(
        "--check",
        choices=("full", "header"),
        default="full",
        help="decode each JPEG that is stored as it is (default), or trust it",
    )
    write.add_argument(
        "--no-labels", dest="labels", action="store_false", help="ignore the folders' names"
    )
    write.add_argument("--split", choices=("train", "test"), help="of a dataset (train)")
    write.add_argument("--root", help="where torchvision keeps datasets, or downloads them (data)")
    write.add_argument("--limit", type=int, metavar="N", help="a random subset of N images")
    write.add_argument("--seed", type=int, default=0, help="of that subset (0)")
    write.add_argument(
        "--skip-broken",
        action="store_true",
        help="leave out what cannot be read, instead of writing nothing",
    )
    write.add_argument("--overwrite", action="store_true", help="replace an existing file")
    write.add_argument("--workers", type=int, default=0, help="threads (0: one per core)")

    info = commands.add_parser("info", help="print what a file holds")
    info.set_defaults(run=_info_command)
    info.add_argument("file")

    verify = commands.add_parser("verify", help="check every image of a file")
    verify.set_defaults(run=_verify_command)
    verify.add_argument("file")
    verify.add_argument("--workers", type=int, default=0, help="threads (0: one per core)")

    preview = commands.add_parser("preview", help="draw images and the views that training makes")
    preview.set_defaults(run=_preview_command)
    preview.add_argument("file")
    preview.add_argument("--out", required=True, metavar="PNG", help="picture to write or replace")
    preview.add_argument("--images", type=int, default=8, metavar="N", help="how many (8)")
    preview.add_argument(
        "--config",
        metavar="FILE",
        help="whose views: a recipe of configs/, or a run's config.yaml (DINO's defaults)",
    )
    preview.add_argument("--seed", type=int, default=0, help="of the training shown (0)")
    preview.add_argument("--epoch", type=int, default=0, help="of the training shown (0)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit status 2 and one line on stderr for what a user can mend."""
    args = _parser().parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid Unicode
    with exit_on_user_error():
        args.run(args)


if __name__ == "__main__":
    main()
