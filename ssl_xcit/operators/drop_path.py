"""Stochastic depth: a sample that drops a residual branch skips its computation."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssl_xcit.operators.tokens import Grid, split_tokens


class Kept(NamedTuple):
    """The samples that keep a residual branch, and the branch's scale."""

    factors: Float[Tensor, "t 1"]  # per token: `scale` if its sample keeps the branch, else 0
    scale: float  # 1 / (1 - rate)
    rows: tuple[Int64[Tensor, " _kept"], ...] | None  # kept samples per grid; None: not on the host


def add_branch(
    x: Float[Tensor, "t d"],
    branch: Callable[[Tensor, Sequence[Grid]], Tensor],
    grids: Sequence[Grid],
    kept: Kept | None,
) -> Float[Tensor, "t d"]:
    """Compute x + factors * branch(x, grids); if `rows` are known, only on the kept samples.

    The branch must process samples independently. If all samples drop it, it gets an empty batch,
    so that its parameters get zero gradients, as DistributedDataParallel and the optimiser expect.
    """
    if kept is None:
        return x + branch(x, grids)
    if kept.rows is None:
        return torch.addcmul(x, branch(x, grids), kept.factors)
    if all(len(rows) == grid.b for grid, rows in zip(grids, kept.rows, strict=True)):
        return torch.add(x, branch(x, grids), alpha=kept.scale)
    # One call per grid, although one for all would do: oneDNN builds a kernel for each new number
    # of tokens. A single grid has few different numbers of kept tokens, the sum over grids many.
    some = [
        branch(tokens, (grid._replace(b=len(rows)),))
        for tokens, grid, rows in zip(
            _TakeSamples.apply(x, grids, kept.rows), grids, kept.rows, strict=True
        )
    ]
    return _AddSamples.apply(x, grids, kept, *some)


class _TakeSamples(torch.autograd.Function):
    """Selects the tokens of the kept samples of each grid."""

    @staticmethod
    def forward(
        ctx, x: Tensor, grids: Sequence[Grid], rows: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        ctx.grids, ctx.rows = grids, rows
        return _take(x, grids, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Float[Tensor, "_kept d"]) -> tuple[Tensor | None, ...]:
        tokens = sum(grid.b * grid.tokens for grid in ctx.grids)
        d_x = grads[0].new_zeros(tokens, grads[0].shape[1])
        return _add(d_x, ctx.grids, ctx.rows, grads), None, None


class _AddSamples(torch.autograd.Function):
    """Adds scale * some to the kept samples of x."""

    @staticmethod
    def forward(ctx, x: Tensor, grids: Sequence[Grid], kept: Kept, *some: Tensor) -> Tensor:
        ctx.grids, ctx.kept = grids, kept
        return _add(x.clone(), grids, kept.rows, some, kept.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Float[Tensor, "t d"]) -> tuple[Tensor | None, ...]:
        d_some = _take(grad, ctx.grids, ctx.kept.rows)
        return grad, None, None, *(part.mul_(ctx.kept.scale) for part in d_some)


def _take(
    x: Float[Tensor, "t d"], grids: Sequence[Grid], rows: Sequence[Int64[Tensor, " _kept"]]
) -> tuple[Float[Tensor, "_kept d"], ...]:
    parts = zip(split_tokens(x, grids), rows, strict=True)
    return tuple(part.index_select(0, places).flatten(0, 1) for part, places in parts)


def _add(
    x: Float[Tensor, "t d"],
    grids: Sequence[Grid],
    rows: Sequence[Int64[Tensor, " _kept"]],
    some: Sequence[Float[Tensor, "_kept d"]],
    scale: float = 1.0,
) -> Float[Tensor, "t d"]:
    # By sample, not by token: index_add has a cost per row.
    parts = zip(split_tokens(x, grids), rows, some, strict=True)
    for to, places, tokens in parts:
        samples = tokens.view(len(places), *to.shape[1:]).to(x.dtype)
        to.index_add_(0, places, samples, alpha=scale)
    return x
