"""The 14 architectures: table 1 of the paper."""

import difflib
from typing import NamedTuple

from ssl_xcit.runtime.errors import UserError


class Variant(NamedTuple):
    """One row of table 1 of the paper; `eta` is LayerScale's initial gain."""

    embed_dim: int
    depth: int
    num_heads: int
    eta: float
    tokens_norm: bool  # class-attention blocks: apply norm2 to all tokens, not only the cls token


VARIANTS = {
    "xcit_nano_12": Variant(128, 12, 4, 1.0, False),
    "xcit_tiny_12": Variant(192, 12, 4, 1.0, True),
    "xcit_tiny_24": Variant(192, 24, 4, 1e-5, True),
    "xcit_small_12": Variant(384, 12, 8, 1.0, True),
    "xcit_small_24": Variant(384, 24, 8, 1e-5, True),
    "xcit_medium_24": Variant(512, 24, 8, 1e-5, True),
    "xcit_large_24": Variant(768, 24, 16, 1e-5, True),
}
ARCHITECTURES = tuple(f"{name}_p{patch}" for name in VARIANTS for patch in (16, 8))


def check_arch(arch: str) -> None:
    """Raise UserError, which names the closest matches, unless `arch` is in ARCHITECTURES."""
    if arch not in ARCHITECTURES:
        nearest = difflib.get_close_matches(arch, ARCHITECTURES, n=3, cutoff=0.0)
        raise UserError(
            f"arch must be one of the {len(ARCHITECTURES)} XCiT names, got {arch!r}: "
            f"nearest {', '.join(nearest)}"
        )
