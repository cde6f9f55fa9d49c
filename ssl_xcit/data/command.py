"""The commands `data write`, `info` and `verify`."""

import argparse
import os
import signal
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ssl_xcit.data.beton import Beton
from ssl_xcit.data.images import JPG, RAW, is_harmless, jpeg_problem
from ssl_xcit.data.sources import DATASETS
from ssl_xcit.data.writer import in_order, write_beton
from ssl_xcit.runtime.errors import UserError, exit_on_user_error


def verify_beton(
    path: str | Path, workers: int = 0, progress: bool = True
) -> list[tuple[int, str]]:
    """(index, what is wrong) of every damaged image.

    Compares checksums (in files of our writer) and decodes each JPEG with the loader's decoder.
    Raises UserError as `Beton` does.
    """
    beton = Beton(path)

    def check(i: int) -> str | None:
        # pread, not the map: page faults would hold the GIL while the disk works
        data = os.pread(file.fileno(), beton.sizes[i], beton.pointers[i])
        if beton.checksums is not None and zlib.crc32(data) != beton.checksums[i]:
            return "its bytes do not match their checksum"
        if beton.modes[i] == RAW:
            return None
        problem = jpeg_problem(data, int(beton.heights[i]), int(beton.widths[i]))
        # If the checksum matches, the writer has seen and named this image
        if problem and is_harmless(problem) and beton.checksums is not None:
            return None
        return problem

    with open(path, "rb") as file:
        found = in_order(check, range(len(beton)), workers, "verify", progress)
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
        if names:  # there may be classes without images
            counts = np.bincount(beton.labels, minlength=len(names))
        some = ": " + ", ".join(names[:5]) + (", ..." if names[5:] else "") if names else ""
        spread = f"{counts.min():,} to {counts.max():,}"
        lines.append(f"labels      {len(counts):,} classes of {spread} images{some}")
    if beton.info:
        options = {k: v for k, v in beton.info["options"].items() if v is not None}
        lines.append(f"source      {beton.info['source']}")
        lines.append("options     " + ", ".join(f"{k} {v}" for k, v in options.items()))
        lines += [f"            {n:,} x {note}" for note, n in beton.info["notes"].items()]
        if "left_out" in beton.info:
            lines.append(f"left out    {beton.info['left_out']}")
        lines += [f"left out    {name}" for name in beton.info["broken"]]
    return "\n".join(lines)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _write_command(args: argparse.Namespace) -> None:
    options = {k: v for k, v in vars(args).items() if k not in ("run", "command")}
    # SIGTERM, by which batch systems stop a job, must remove the temporary file too
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ssl-xcit data", description="Images in one file of FFCV's .beton format."
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
        help="of JPEGs encoded here (90); the bytes of JPEGs that keep their size are kept",
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
        help="decode each JPEG whose bytes are kept (default), or trust it",
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
        help="leave out unreadable images instead of writing nothing",
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
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit status 2 and one line on stderr for a user's mistake."""
    args = _parser().parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid Unicode
    with exit_on_user_error():
        args.run(args)
