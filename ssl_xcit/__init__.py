"""Self-supervised pretraining of XCiT with DINO, and its evaluation.

The names below are the Python API, see docs/api.md. Each is imported when it is first used: torch
takes seconds, and `import ssl_xcit` none.
"""

from pkgutil import resolve_name

_HOME = {
    "pretrain": "api",
    "load": "api",
    "knn": "api",
    "write_beton": "data.writer",
    "MultiCropLoader": "data.loader",
    "dino_views": "data.views",
    "build_xcit": "models.xcit",
    "DINOHead": "dino.head",
    "DINOLoss": "dino.loss",
    "update_teacher": "dino.teacher",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name in _HOME:
        return resolve_name(f"ssl_xcit.{_HOME[name]}:{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
