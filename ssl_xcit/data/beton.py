"""Images in one file: FFCV's .beton format, read and written by our own code.

The format is version 2 of ffcv 1.0.2 (`ffcv/types.py`), little-endian:

    header       version u16, number of fields u16, page size u32, samples u64, table's pointer u64
    fields       one 1,041-byte descriptor each: type u8, name 16 bytes, arguments 1,024 bytes
    samples      one record each: image (mode u8, width u16, height u16, pointer u64), label i64
    images       from a page boundary on; none crosses a page boundary, for ffcv's page cache
    notes        ours, see below
    table        one entry per image, up to the end of the file: sample u64, pointer u64, size u64

What FFCV has no place for lies between the images and the table, where stock ffcv never looks: a
JSON object (class names, channels, source, options, counts: `Beton.info`) and one CRC-32 (u32) per
image. The image field's arguments, unused by ffcv, point there (`REFERENCE`). Stock ffcv reads our
files if the images have 3 channels. We read stock ffcv's files: their first image field and the
integer field `label`; other fields are ignored.
"""

import hashlib
import io
import json
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ssl_xcit.data.images import RAW, Stored
from ssl_xcit.runtime.errors import UserError

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


class Beton:
    """A .beton file, mapped into memory and fully checked, except for the images themselves.

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
        unlabelled: why there are no labels, or "" when unknown.
        channels: 3, unless our writer noted otherwise.
        checksums: (N,) uint32, CRC-32 of each image's bytes, or None in a file of stock ffcv.
        info: what our writer noted: source, options, counts; empty in a file of stock ffcv.
        data: the whole file, uint8.

    Raises UserError for a file that is missing, is no .beton, was cut, or contradicts itself.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(
                f"{path}: expected a .beton file, found none; write one with `ssl-xcit data write`"
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
        self.unlabelled: str = self.info.get("source", "").partition("; labels: none, ")[2]
        self._check_samples(samples_end, table_start)
        if self.info:
            crc = index_crc(header, fields, self.data[fields_end:samples_end], table)
            if crc != reference["index_crc"]:
                self._refuse("its index does not match its checksum")

    def __len__(self) -> int:
        return self.num_samples

    def fingerprint(self) -> str:
        """SHA-256 that tells these images and labels from others: of our writer's checksums.

        In a file of stock ffcv, which has none: of the index and the first bytes of 1,000 images.
        """
        parts = [self.sizes, self.heights, self.widths, self.modes]
        if self.labels is not None:
            parts.append(self.labels)
        if self.checksums is not None:
            parts.append(self.checksums)
        else:
            some = np.linspace(0, self.num_samples - 1, min(1000, self.num_samples)).astype(int)
            parts += [self.data[self.pointers[i] :][: min(self.sizes[i], 4096)] for i in some]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(np.ascontiguousarray(part))
        return digest.hexdigest()

    def decode(self, index: int) -> UInt8[np.ndarray, "h w c"]:
        """Pixels of one image, by Pillow: for tools and tests; the loader is faster."""
        stored = self.data[self.pointers[index] :][: self.sizes[index]]
        if self.modes[index] == RAW:
            return np.array(stored).reshape(self.heights[index], self.widths[index], -1)
        return np.array(Image.open(io.BytesIO(stored.tobytes())).convert("RGB"))

    def _read_samples(
        self, fields: np.ndarray, table: np.ndarray, start: int, table_start: int
    ) -> int:
        """Fill the per-image arrays; returns where the samples' records end."""
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
        checksums_start = round_up(json_end, 8)
        end = checksums_start + 4 * self.num_samples
        known = reference["magic"] == MAGIC and end <= table_start
        if not known or zlib.crc32(self.data[start:end]) != reference["notes_crc"]:
            self._refuse("the notes behind its images are damaged")
        self.info = json.loads(self.data[start:json_end].tobytes())
        self.checksums = self.data[checksums_start:end].view("<u4")

    def _check_samples(self, samples_end: int, table_start: int) -> None:
        self._refuse_any(self.modes > RAW, "an unknown mode")
        self._refuse_any((self.heights == 0) | (self.widths == 0), "a height or width of 0")
        # A u64 beyond int64 has become negative, so the subtraction cannot overflow
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


def place(position: int, size: int) -> tuple[int, int]:
    """(start, page size) of an image of `size` bytes, at or after `position`.

    The page size is PAGE, or the next power of two that holds the image. An image that would cross
    a page boundary starts at it. The file's page size is the largest of all images; as boundaries
    of larger pages are also boundaries of smaller ones, no image crosses a page.
    """
    page = max(PAGE, 1 << (size - 1).bit_length())
    if position % page + size > page:
        position = round_up(position, page)
    return position, page


class BetonWriter:
    """Lays out a file of at most `capacity` images: streams the images, keeps the index."""

    def __init__(self, file: BinaryIO, capacity: int, with_labels: bool) -> None:
        self.file, self.count, self.page_size = file, 0, PAGE
        self.fields = np.zeros(1 + with_labels, FIELD)
        self.fields["type_id"] = [IMAGE_FIELD, INT_FIELD][: 1 + with_labels]
        self.fields["name"] = [b"image", b"label"][: 1 + with_labels]
        record = np.dtype([("image", IMAGE), ("label", "<i8")][: 1 + with_labels], align=True)
        self.samples = np.zeros(capacity, record)
        self.table = np.zeros(capacity, TABLE)
        self.checksums = np.zeros(capacity, "<u4")
        self.position = round_up(HEADER.itemsize + self.fields.nbytes + self.samples.nbytes, PAGE)

    def append(self, image: Stored, label: int) -> None:
        """Write an image behind the others; without labels `label` is ignored."""
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
        notes_start = round_up(self.position, 8)
        padding = bytes(-len(text) % 8)
        notes = text + padding + self.checksums[: self.count].tobytes()
        table_start = round_up(notes_start + len(notes), 8)
        header = np.array(
            (VERSION, len(self.fields), self.page_size, self.count, table_start), HEADER
        )
        crc = index_crc(header, self.fields, samples, table)
        reference = np.array((MAGIC, notes_start, len(text), zlib.crc32(notes), crc), REFERENCE)
        self.fields["arguments"][0, : REFERENCE.itemsize] = np.frombuffer(reference, np.uint8)
        for start, part in ((notes_start, notes), (table_start, table), (0, header)):
            self.file.seek(start)
            self.file.write(part)
        self.file.write(self.fields)
        self.file.write(samples)
        return table_start + table.nbytes


def index_crc(
    header: np.ndarray | np.void, fields: np.ndarray, samples: np.ndarray, table: np.ndarray
) -> int:
    crc = 0
    # Without the fields' arguments, since this number is one of them
    for part in (header, fields["type_id"], fields["name"], samples, table):
        crc = zlib.crc32(part.tobytes(), crc)
    return crc


def round_up(position: int, multiple: int) -> int:
    return -(-position // multiple) * multiple
