"""Writing of .beton files."""

import itertools
import sys
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from tqdm import tqdm

from ssl_xcit.data.beton import BetonWriter
from ssl_xcit.data.images import (
    ENCODED,
    EXTRANEOUS,
    KEPT,
    BrokenImageError,
    Encoding,
    Stored,
    encode,
    guarded,
)
from ssl_xcit.data.sources import Source, open_source
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.runtime.files import new_file
from ssl_xcit.runtime.processor import usable_cores
from ssl_xcit.runtime.signals import deferred

Result = TypeVar("Result")


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
    """Store the images of `source` in the file `out`; the same bits for any number of `workers`.

    The bytes of a plain RGB or gray JPEG are kept, unless it must be shrunk or rotated. Everything
    else is decoded by Pillow (first frame, 16 bits to 8, CMYK to RGB, transparency over white) and
    stored as pixels or encoded as JPEG.

    Args:
        source: a folder of images (a folder per class, flat, or nested), or one of `DATASETS`.
            Labels are the sorted folder names if every image lies exactly one folder deep.
        out: the file; it appears complete (temporary file, fsync, rename) or not at all.
        mode: jpg, raw (pixels), or auto: JPEGs as JPEG, others raw up to 64 × 64, else as JPEG.
        max_side, short_side: shrink images whose longer (shorter) side has more pixels.
        quality: of the JPEGs encoded here, 1 to 100.
        exif: ignore orientation tags, as DINO's own data loading does, or rotate by them.
        channels: 3 (RGB), 1 (gray), or another number for .npy files: uint8, (h, w, channels).
            All but 3 are stored raw, and stock ffcv cannot read them.
        check: full decodes the JPEGs whose bytes are kept, header trusts them.
        labels: False ignores the folders' names.
        split: train (default) or test, of a dataset by name.
        root: torchvision's folder of the dataset, default data/ (it downloads what is missing);
            for FashionMNIST the Debian package dataset-fashion-mnist comes first.
        limit: store a random subset of this many images, chosen by `seed`, in the source's order.
        skip_broken: leave out unreadable images instead of writing nothing.
        overwrite: replace an existing file.
        workers: threads; 0: one per core that this process may use.
        progress: report on stderr what is decided and found, with a progress bar on a terminal.

    Returns:
        out, samples, bytes, classes, modes, notes (how many images had what), broken, left_out (how
        many files of a folder are of other kinds), seconds.

    Raises:
        UserError: bad arguments, nothing to store, labels in doubt (see `open_source`), broken
            images, or `out` cannot be written.
    """
    started = time.monotonic()
    encoding = Encoding(mode, max_side, short_side, quality, exif, channels, check)
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, got {limit}")
    with new_file(Path(out), overwrite) as file:
        images = open_source(source, labels, split, root)
        chosen = np.arange(images.size)
        if limit is not None:
            # numpy guarantees RandomState's numbers forever, a Generator's not
            chosen = np.sort(np.random.RandomState(seed).permutation(images.size)[:limit])
        beton = BetonWriter(file, len(chosen), images.labels is not None)
        info = {
            "channels": channels,
            "class_names": images.class_names,
            "source": images.description,
            "options": {**asdict(encoding), "limit": limit, "seed": seed},
        }
        if images.left_out:
            info["left_out"] = images.left_out
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
        "left_out": images.left_out,
        "seconds": time.monotonic() - started,
    }


def _store_images(
    beton: BetonWriter,
    images: Source,
    chosen: Sequence[int],
    encoding: Encoding,
    skip_broken: bool,
    workers: int,
    progress: bool,
) -> dict:
    """Encode the chosen images into `beton`; returns the `notes` and `broken` of `Beton.info`."""

    def say(line: str) -> None:
        if progress:
            tqdm.write(line, file=sys.stderr)

    def encoded(i: int) -> Stored | BrokenImageError:
        try:
            with guarded():
                return encode(images.read(i), encoding)
        except BrokenImageError as error:
            return error

    say(f"{len(chosen):,} images of {images.description}")
    if images.left_out:
        say(f"left out {images.left_out}")
    notes: Counter[str] = Counter()
    examples: dict[str, str] = {}
    broken: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about odd EXIF data, without a file's name
        for i, image in in_order(encoded, chosen, workers, "write", progress):
            if isinstance(image, BrokenImageError):
                broken.append(f"{images.name(i)}: {image}")
                say(f"broken: {broken[-1]}")
                continue
            for note in image.notes:
                notes[note] += 1
                examples.setdefault(note, images.name(i))
            if EXTRANEOUS in image.notes:
                say(f"{EXTRANEOUS}: {images.name(i)}")
            if skip_broken or not broken:  # else nothing is written, but all images are checked
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


def in_order(
    function: Callable[[int], Result],
    indices: Sequence[int],
    workers: int,
    name: str,
    progress: bool,
) -> Iterator[tuple[int, Result]]:
    """(i, function(i)) in the given order, computed by threads, with a progress bar on a terminal.

    Threads suffice: reading, decoding and checksums release the GIL. Only a few results wait at a
    time, since they hold images.
    """
    if workers < 0:
        raise UserError(f"workers must be 0 or more, got {workers}")
    workers = workers or usable_cores()
    hidden = not (progress and sys.stderr.isatty())
    with deferred() as check, ThreadPoolExecutor(workers) as pool:
        orders = (pool.submit(function, i) for i in indices)
        waiting = deque(itertools.islice(orders, 4 * workers))
        for i in tqdm(indices, desc=name, unit=" images", disable=hidden):
            check()
            waiting.extend(itertools.islice(orders, 1))
            yield i, waiting.popleft().result()
