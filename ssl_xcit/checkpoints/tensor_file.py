"""A .safetensors that carries a checksum of its tensors and facts in its metadata.

safetensors notices a cut file, but no flipped bit. Files without a checksum are read as they are.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

NAME = "crc32"


def sealed_metadata(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> dict[str, str]:
    """`facts` with the checksum, to be written as the metadata of `tensors` (on the CPU)."""
    return {**facts, NAME: str(checksum(tensors, facts))}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata without the checksum). Raises ValueError for a cut or altered file."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            facts = dict(file.metadata() or {})
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(str(error)) from error
    stored = facts.pop(NAME, None)
    if stored is not None and stored != str(checksum(tensors, facts)):
        raise ValueError("its checksum differs from its content: it was altered")
    return tensors, facts


def checksum(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> int:
    """CRC-32 of all names, types, shapes, values and facts: 7 GB/s, a third of SHA-256's time."""
    crc = zlib.crc32(json.dumps(dict(sorted(facts.items()))).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.flatten().view(torch.uint8).numpy(), crc)
    return crc
