"""Where libjpeg-turbo is: the one library beside Python's packages that reading JPEGs needs.

We use FFCV's file format, which `beton` and `writer` read and write by themselves, and nothing of
its Python package: `import ffcv` takes seconds and changes torch's and numba's global state. But
ffcv's compiled part is linked to libjpeg-turbo, and leads to one that the system does not list.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ssl_xcit.runtime.errors import UserError

Library = TypeVar("Library")
NAMES = ("libturbojpeg.so.0", "libturbojpeg.so")


def load_turbojpeg(load: Callable[[str], Library]) -> Library:
    """What `load`, ctypes's or llvmlite's, returns for the first library that it can load.

    Raises UserError when there is none.
    """
    spec = importlib.util.find_spec("ffcv")  # finds it without importing it
    folders = spec.submodule_search_locations if spec else []
    built_by_ffcv = [str(file) for folder in folders for file in Path(folder).glob("_libffcv*.so")]
    reasons = []
    for name in (*NAMES, *built_by_ffcv):
        try:
            return load(name)
        except (OSError, RuntimeError) as error:
            reasons.append(str(error))
    raise UserError(
        f"no JPEG decoder ({'; '.join(reasons)}): install libturbojpeg (Debian: libturbojpeg0)"
    )
