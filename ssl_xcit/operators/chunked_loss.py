"""DINO's loss straight from the head's unit vectors, a chunk of prototypes at a time.

The logits (views x samples x prototypes) never exist whole: memory does not grow with the number of
prototypes but for the prototypes themselves. The softmax is the streaming one (Milakov and
Gimelshein 2018, arXiv:1805.02867), the gradient is exact, and the price is that the products with
the prototypes are computed twice.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ssl_xcit.operators.linear import compute_dtype, linear, without_autocast
from ssl_xcit.operators.prototypes import WeightNormLinear


class Temperatures(NamedTuple):
    """Of the softmax of each network."""

    student: float
    teacher: float


def chunked_loss(
    student_vectors: Float[Tensor, "vn d"],
    student_layer: WeightNormLinear,
    teacher_vectors: Float[Tensor, "tn d"],
    teacher_layer: WeightNormLinear,
    center: Float[Tensor, "1 k"],
    temperatures: Temperatures,
    chunk: int,
    views: range | None = None,
    total: int | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "1 k"]]:
    """What `DINOLoss` makes of the logits of these vectors, and the mean of the teacher's logits.

    Both are view-major as there, of all views or of some `views` of `total`; `chunk` prototypes are
    seen at a time. Under autocast the products are of rounded numbers and all else is float32, as
    in `WeightNormLinear`.
    """
    views = range(2 * len(student_vectors) // len(teacher_vectors)) if views is None else views
    weights = student_layer.trained_weights()
    loss, mean = _ChunkedLoss.apply(
        student_vectors,
        *weights,
        student_layer.frozen,
        teacher_vectors.detach(),
        teacher_layer.weight_v.detach(),
        teacher_layer.weight_g.detach(),
        center,
        temperatures,
        chunk,
        views,
        len(views) if total is None else total,
    )
    return loss, mean


class _Logits(NamedTuple):
    """A layer whose logits are computed piece by piece."""

    x: Float[Tensor, "b d"]
    v: Float[Tensor, "k d"]
    scale: Float[Tensor, " k"]  # g / |v|
    low: torch.dtype

    def chunk(self, piece: slice) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b c"]]:
        """(products, logits) of some prototypes."""
        product = linear(self.x.to(self.low), self.v[piece].to(self.low))
        return product, product * self.scale[piece]


class _ChunkedLoss(torch.autograd.Function):
    """With targets q_0, q_1 of the teacher's two views and logits s_v / T of the student's:

        loss = (sum_v w_v lse(s_v) - sum_k q_0 (s_1 + s_local) - sum_k q_1 (s_0 + s_local)) / pairs

    summed over the samples; s_local is the sum over the local views, w_v is 1 for a global view and
    2 for a local one.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x, v, g, frozen, tx, tv, tg, center, temperatures, chunk, views, total
    ):
        low = compute_dtype(x)
        with without_autocast(x):
            length = torch.linalg.vector_norm(v, dim=1)
            student = _Logits(x, v, g[:, 0] / length, low)
            teacher = _Logits(tx, tv, tg[:, 0] / torch.linalg.vector_norm(tv, dim=1), low)
            n = len(tx) // 2
            precise = student.scale.dtype
            of_student = _RunningSum(x.new_empty((len(x), 0), dtype=precise))
            of_teacher = _RunningSum(x.new_empty((2 * n, 0), dtype=precise))
            inner = x.new_zeros(2, n, dtype=precise)
            mean = torch.empty_like(center)
            for piece in _pieces(len(v), chunk):
                raw = teacher.chunk(piece)[1]
                mean[:, piece] = raw.mean(0, keepdim=True)
                targets = (raw - center[:, piece]) / temperatures.teacher
                logits = student.chunk(piece)[1] / temperatures.student
                weights, shrink = of_teacher.add(targets)  # exp(targets - the largest so far)
                inner *= shrink.view(2, n)
                inner += (weights.unflatten(0, (2, n)) * _compared(logits, n, views)).sum(-1)
                of_student.add(logits)
            pairs = n * (2 * total - 2)
            entropies = (_counts(views, x) * of_student.logsumexp().view(-1, n)).sum()
            loss = (entropies - (inner / of_teacher.total.view(2, n)).sum()) / pairs
        ctx.save_for_backward(
            *(x, v, g, length, tx, tv, teacher.scale, center),
            *(of_student.logsumexp(), of_teacher.logsumexp()),
        )
        ctx.facts = low, temperatures, chunk, pairs, frozen, views
        ctx.mark_non_differentiable(mean)
        return loss, mean

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Float[Tensor, ""], _: Tensor):
        x, v, g, length, tx, tv, t_scale, center, s_lse, t_lse = ctx.saved_tensors
        low, temperatures, chunk, pairs, frozen, views = ctx.facts
        scale = g[:, 0] / length
        student, teacher = _Logits(x, v, scale, low), _Logits(tx, tv, t_scale, low)
        n, globals_ = len(tx) // 2, _globals(views)
        counts = _counts(views, x)[..., None]
        wants_v, wants_g = (want and not frozen for want in ctx.needs_input_grad[1:3])
        grad_x = torch.zeros_like(x, dtype=scale.dtype)
        grad_v = torch.empty_like(v) if wants_v else None
        grad_g = torch.empty_like(g) if wants_g else None
        for piece in _pieces(len(v), chunk):
            targets = (teacher.chunk(piece)[1] - center[:, piece]) / temperatures.teacher
            targets = (targets - t_lse[:, None]).exp_().unflatten(0, (2, n))
            product, logits = student.chunk(piece)
            p = (logits / temperatures.student - s_lse[:, None]).exp_()
            by_view = p.view(len(views), n, -1).mul_(counts)
            if globals_:
                by_view[:globals_] -= targets.flip(0)  # they learn from each other
            by_view[globals_:] -= targets.sum(0)
            d = by_view.flatten(0, 1).mul_(grad / (pairs * temperatures.student))
            scaled = d * scale[piece]
            grad_x += linear(scaled.to(low), v[piece].to(low).mT)
            if not (wants_v or wants_g):
                continue
            d_scale = (d * product).sum(0)
            if wants_v:
                part = linear(scaled.mT, x.to(scaled.dtype).mT)
                coefficient = d_scale * scale[piece] / length[piece].square()
                grad_v[piece] = part.addcmul_(v[piece], coefficient[:, None], value=-1)
            if wants_g:
                grad_g[piece] = (d_scale / length[piece])[:, None]
        if frozen and ctx.needs_input_grad[1]:  # several ranks, whose reduction expects gradients
            grad_v = v.new_zeros(1).expand_as(v)
            grad_g = g.new_zeros(1).expand_as(g) if ctx.needs_input_grad[2] else None
        return grad_x.to(x.dtype), grad_v, grad_g, *[None] * 9


class _RunningSum:
    """sum_k exp(x_k) of rows that come in pieces, as `total` exp(`largest`)."""

    def __init__(self, like: Float[Tensor, "b 0"]) -> None:
        self.largest = like.new_full((len(like),), -torch.inf)
        self.total = like.new_zeros(len(like))

    def add(self, x: Float[Tensor, "b c"]) -> tuple[Float[Tensor, "b c"], Float[Tensor, " b"]]:
        """exp(x - largest), and the factor by which what came before has shrunk."""
        largest = torch.maximum(self.largest, x.amax(1))
        shrink = (self.largest - largest).exp_()
        weights = (x - largest[:, None]).exp_()
        self.total = self.total * shrink + weights.sum(1)
        self.largest = largest
        return weights, shrink

    def logsumexp(self) -> Float[Tensor, " b"]:
        """Of everything so far."""
        return self.largest + self.total.log()


def _globals(views: range) -> int:
    """How many of them are global, which come first: 2 or 0."""
    return sum(view < 2 for view in views)


def _compared(logits: Float[Tensor, "vn c"], n: int, views: range) -> Float[Tensor, "2 n c"]:
    """What each of the teacher's views is compared with: the other global view and the local ones,
    summed."""
    by_view, globals_ = logits.unflatten(0, (-1, n)), _globals(views)
    of_locals = by_view[globals_:].sum(0).expand(2, -1, -1)
    return by_view[:globals_].flip(0) + of_locals if globals_ else of_locals


def _counts(views: range, like: Tensor) -> Float[Tensor, "v 1"]:
    """With how many targets each view is compared."""
    counts = torch.full((len(views), 1), 2.0, device=like.device)
    counts[: _globals(views)] = 1
    return counts


def _pieces(k: int, chunk: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk, k)) for start in range(0, k, chunk))
