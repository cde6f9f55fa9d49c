"""Files that appear complete or not at all, and logs that may end in the middle of a line."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ssl_xcit.runtime.errors import UserError


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


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, [] if there is no file; a line cut off by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
