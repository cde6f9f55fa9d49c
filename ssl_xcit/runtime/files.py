"""Files that appear complete or not at all, and logs that may end in the middle of a line."""

import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ssl_xcit.runtime.errors import UserError
from ssl_xcit.runtime.sealed import unseal


@contextmanager
def new_file(out: Path, overwrite: bool = True) -> Iterator[BinaryIO]:
    """A file that takes the place of `out` when the block ends well, and else vanishes.

    Until then it lies beside `out` as NAME.tmp. What a killed process left under that name is
    written over.

    Raises UserError when `out` exists and may not be overwritten, is a folder, is being written by
    another process, or when the disk refuses.
    """
    temporary = out.with_name(f"{out.name}.tmp")
    try:
        if out.is_dir():
            raise UserError(f"{out}: is a folder, expected the name of a file to write")
        # "wb" would empty another process's file before we know that it is not ours
        with open(temporary, "r+b", opener=_open_or_create) as file:
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
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error


def write_text(out: Path, text: str) -> None:
    """Make `text` the content of `out`, as `new_file` does; folders above it are made.

    Raises UserError when the disk refuses.
    """
    make_folder(out.parent)
    with new_file(out) as file:
        file.write(text.encode())


def make_folder(folder: Path) -> None:
    """Make `folder` and those above it where they do not exist. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written: {error.strerror}; choose another place"
        ) from error


def _open_or_create(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)


def _is_ours(file: BinaryIO, path: Path) -> bool:
    """Lock an open file; False if another process holds it, or has renamed it meanwhile."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # some cluster file systems have no locks
    return path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, [] if there is no file.

    A last line cut off by a kill is left out. So is any damaged line, and stderr says which: the
    rows after it are whole.
    """
    rows, damaged = [], []
    content = path.read_bytes() if path.exists() else b""
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            row = unseal(json.loads(line.decode()))
            if not isinstance(row.get("step"), int):
                raise ValueError("no step")
            rows.append(row)
        except ValueError:
            if number < len(lines) or line.endswith(b"\n"):
                damaged.append(str(number))
    if damaged:
        which = f"line{'s' if len(damaged) > 1 else ''} {', '.join(damaged)}"
        print(f"{path}: {which} damaged, left out", file=sys.stderr)
    return rows
