"""JSON objects that carry a checksum, so that a flipped bit is noticed where they are read.

The checksum is the last entry, "crc32": of the object as Python writes it, whatever its layout in
the file. An object without it was written by an older version, or by hand, and is taken as it is.
"""

import json
import zlib
from pathlib import Path

NAME = "crc32"


def seal(document: dict) -> dict:
    """`document` with its checksum, to be written."""
    plain = {key: value for key, value in document.items() if key != NAME}
    return {**plain, NAME: _checksum(plain)}


def unseal(document: object) -> dict:
    """What was read, without its checksum. Raises ValueError if it is altered, or no object."""
    if not isinstance(document, dict):
        raise ValueError(f"holds a {type(document).__name__}, expected an object")
    plain = {key: value for key, value in document.items() if key != NAME}
    if NAME in document and document[NAME] != _checksum(plain):
        raise ValueError("its checksum differs from its content: it was altered")
    return plain


def read_sealed(path: Path) -> dict:
    """The object in a JSON file, without its checksum.

    Raises OSError if it cannot be read, ValueError if it is cut, altered or no JSON object.
    """
    return unseal(json.loads(path.read_text()))


def _checksum(document: dict) -> int:
    return zlib.crc32(json.dumps(document).encode())
