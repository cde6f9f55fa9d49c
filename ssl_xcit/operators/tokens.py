"""Tokens of images of several sizes in one matrix.

What treats each token by itself (norms, linear layers, residuals) sees all of them at once: images
of every size of crop are one product, not one each. What looks at an image splits the matrix.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Grid(NamedTuple):
    """`b` images of rows x columns tokens each, whose tokens follow one another row by row."""

    b: int
    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        """Of one image."""
        return self.rows * self.columns


def split_tokens(
    x: Float[Tensor, "t *rest"], grids: Sequence[Grid]
) -> list[Float[Tensor, "_b _n *rest"]]:
    """(b, n, ...) of each grid, without a copy; t is the sum of their b n."""
    if len(grids) == 1:
        return [x.unflatten(0, (grids[0].b, grids[0].tokens))]
    parts = x.split([grid.b * grid.tokens for grid in grids])
    return [
        part.unflatten(0, (grid.b, grid.tokens)) for part, grid in zip(parts, grids, strict=True)
    ]


def join_tokens(parts: Iterable[Float[Tensor, "_b _n *rest"]]) -> Float[Tensor, "t *rest"]:
    """Inverse of `split_tokens`; a copy, unless there is one part."""
    flat = [part.flatten(0, 1) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat)
