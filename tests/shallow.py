"""The nano architectures with few blocks, where depth proves nothing and costs most of the time.

with networks(2): ...
python shallow.py 2 SCRIPT ARGUMENTS ...
"""

import contextlib
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssl_xcit.checkpoints.read import expected_tensors
from ssl_xcit.models.variants import VARIANTS

PROGRAM = __file__
TINY = {  # settings of a pretraining on crops of 32 pixels
    "global_crops_size": 32,
    "local_crops_number": 2,
    "local_crops_size": 16,
    "out_dim": 32,
    "head_hidden_dim": 32,
    "head_bottleneck_dim": 16,
}
either_depth = pytest.mark.parametrize("depth", [2, pytest.param(12, marks=pytest.mark.long)])


@contextlib.contextmanager
def networks(depth: int = 2) -> Iterator[None]:
    """xcit_nano_12_p16 and _p8 have this many blocks."""
    real = VARIANTS["xcit_nano_12"]
    VARIANTS["xcit_nano_12"] = real._replace(depth=depth)
    expected_tensors.cache_clear()
    try:
        yield
    finally:
        VARIANTS["xcit_nano_12"] = real
        expected_tensors.cache_clear()


if __name__ == "__main__":
    depth, script, *rest = sys.argv[1:]
    sys.argv, sys.path[0] = [script, *rest], str(Path(script).resolve().parent)
    with networks(int(depth)):
        runpy.run_path(script, run_name="__main__")
