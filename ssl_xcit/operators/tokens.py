"""Tokens of images of several sizes, concatenated in one matrix.

Layers that act on tokens independently (norms, linear layers, residuals) process all of them at
once: one product for all crop sizes instead of one each. Layers that act on whole images split the
matrix.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Tokens = Float[Tensor, "t d"]


class Grid(NamedTuple):
    """`b` images of rows x columns tokens each, stored row by row."""

    b: int
    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        """Number of tokens of one image."""
        return self.rows * self.columns


def split_tokens(
    x: Float[Tensor, "t *rest"], grids: Sequence[Grid]
) -> list[Float[Tensor, "_b _n *rest"]]:
    """Split into views (b, n, ...), one per grid; t is the sum of their b n."""
    if len(grids) == 1:
        return [x.unflatten(0, (grids[0].b, grids[0].tokens))]
    parts = x.split([grid.b * grid.tokens for grid in grids])
    return [
        part.unflatten(0, (grid.b, grid.tokens)) for part, grid in zip(parts, grids, strict=True)
    ]


def join_tokens(parts: Iterable[Float[Tensor, "_b _n *rest"]]) -> Float[Tensor, "t *rest"]:
    """Inverse of `split_tokens`; copies unless there is only one part."""
    flat = [part.flatten(0, 1) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat)
