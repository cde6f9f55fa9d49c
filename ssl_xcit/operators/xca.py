"""XCA, cross-covariance attention among the channels of a head (XCiT, section 3.2)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssl_xcit.operators.linear import Gain, Linear, linear, without_autocast
from ssl_xcit.operators.tokens import Grid, Tokens, join_tokens, split_tokens


def attend(
    packed: Float[Tensor, "3 b heads n e"], temperature: Float[Tensor, "heads 1 1"]
) -> Float[Tensor, "b heads n e"]:
    """XCA by definition: v softmax(temperature q_hat^T k_hat)^T, q_hat and k_hat of unit length.

    Equation 3 of the paper (its tau is 1 / temperature) as the official code computes it, with
    norms and softmax in at least float32. Used under a compiler, which fuses it by itself, and in
    float16, where the undivided q^T k can exceed 65504.
    """
    q, k, v = packed.unbind(0)
    inverse_q, inverse_k = inverse_lengths(packed[:2])[..., None, :].unbind(0)
    product = (q * inverse_q).to(v.dtype).mT @ (k * inverse_k).to(v.dtype)
    attention = (product * temperature).softmax(dim=-1, dtype=inverse_q.dtype)
    return v @ attention.to(v.dtype).mT


class Attended(NamedTuple):
    """The result of `attend`, and what its gradient needs."""

    mixed: Float[Tensor, "b heads n e"]
    inverse: Float[Tensor, "2 b heads e"]  # 1 / length of the channels of q and k
    product: Float[Tensor, "b heads e e"]  # q^T k
    attention: Float[Tensor, "b heads e e"]


def attend_dividing_late(
    packed: Float[Tensor, "3 b heads n e"], temperature: Float[Tensor, "heads 1 1"]
) -> Attended:
    """`attend` with the division after the product, which avoids normalised copies of q and k.

    Norms, division and softmax are float32 even if q and k are bfloat16 (autocast), and float64 if
    they are float64.
    """
    q, k, v = packed.unbind(0)
    inverse = inverse_lengths(packed[:2])
    product = q.mT @ k  # (b, heads, e, e)
    logits = product * (temperature * inverse[0, ..., None])
    attention = logits.mul_(inverse[1, ..., None, :]).softmax(dim=-1)
    return Attended(v @ attention.to(v.dtype).mT, inverse, product, attention)


def inverse_lengths(x: Float[Tensor, "*s n e"]) -> Float[Tensor, "*s e"]:
    """1 / L2 norm of each channel over the n tokens, at most 1e12, in at least float32."""
    precise = torch.promote_types(x.dtype, torch.float32)
    if x.is_cuda or torch.compiler.is_compiling():
        lengths = torch.linalg.vector_norm(x, dim=-2, dtype=precise)
    else:  # on a CPU vector_norm is ten times slower than this unless tokens are the last axis
        squares = x.square() if x.dtype == precise else x.to(precise).square_()
        lengths = squares.sum(dim=-2).sqrt()
    return lengths.clamp_min(1e-12).reciprocal()


class _Attend(torch.autograd.Function):
    """`attend` for each grid, from qkv layout to token layout, with its own gradient.

    Autograd would save five (e, e) matrices per head, which for small crops is more than all
    tokens, and make several more passes over them and over q and k. With G = q^T k, the logits
    L_ij = T G_ij / (|q_i| |k_j|), their gradient dL, and dG_ij = T dL_ij / (|q_i| |k_j|):

        dT   = sum_ij dG_ij G_ij / T
        dq_i = u_i - q_i / |q_i|^2 sum_j dG_ij G_ij,   u_i = sum_j dG_ij k_j,   dk_j likewise

    The sum over j also equals q_i u_i, which is cheaper if there are fewer tokens than channels,
    and does not need G.
    """

    @staticmethod
    def forward(
        ctx,
        qkv: Float[Tensor, "t 3 heads e"],
        temperature: Float[Tensor, "heads 1 1"],
        grids: Sequence[Grid],
    ) -> Float[Tensor, "t d"]:
        out, saved = qkv.new_empty(len(qkv), *qkv.shape[2:]), []
        for part, to in zip(split_tokens(qkv, grids), split_tokens(out, grids), strict=True):
            packed = _pack(part)
            n, e = packed.shape[3:]
            with without_autocast(qkv):
                mixed, inverse, product, attention = attend_dividing_late(packed, temperature)
            to.copy_(mixed.transpose(1, 2))
            saved += [packed, inverse, None if n < e else product, attention]
        ctx.save_for_backward(temperature, *saved)
        ctx.grids = grids
        return out.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Float[Tensor, "t d"]) -> tuple[Tensor | None, ...]:
        temperature, *saved = ctx.saved_tensors
        heads, e = len(temperature), grad.shape[1] // len(temperature)
        d_qkv = grad.new_empty(len(grad), 3, heads, e)
        d_temperature = torch.zeros_like(temperature)
        gradients = split_tokens(grad.unflatten(1, (heads, e)), ctx.grids)
        parts = zip(gradients, split_tokens(d_qkv, ctx.grids), strict=True)
        with without_autocast(grad):
            for i, (part, to) in enumerate(parts):
                d_temperature += _gradients(part, temperature, *saved[4 * i : 4 * i + 4], to)
        return d_qkv, d_temperature, None


def _gradients(
    grad: Float[Tensor, "b n heads e"],
    temperature: Float[Tensor, "heads 1 1"],
    packed: Float[Tensor, "3 b heads n e"],
    inverse: Float[Tensor, "2 b heads e"],
    product: Float[Tensor, "b heads e e"] | None,
    attention: Float[Tensor, "b heads e e"],
    d_qkv: Float[Tensor, "b n 3 heads e"],
) -> Float[Tensor, "heads 1 1"]:
    """Write one grid's gradient (see `_Attend`) into `d_qkv`; return the temperature's gradient."""
    q, k, v = packed.unbind(0)
    d_q, d_k, d_v = d_qkv.permute(2, 0, 3, 1, 4).unbind(0)
    grad = grad.transpose(1, 2).to(packed.dtype, memory_format=torch.contiguous_format)
    d_v.copy_(grad @ attention.to(grad.dtype))
    d_attention = (grad.mT @ v).to(attention.dtype)
    d_logits = torch._softmax_backward_data(d_attention, attention, -1, attention.dtype)
    row, column = temperature * inverse[0, ..., None], inverse[1, ..., None, :]
    d_product = d_logits.mul_(row).mul_(column)
    rounded = d_product.to(q.dtype)
    u_q, u_k = k @ rounded.mT, q @ rounded
    if product is None:
        precise = inverse.dtype
        of_q = (q * u_q).sum(dim=2, dtype=precise)
        of_k = (k * u_k).sum(dim=2, dtype=precise)
    else:
        shares = d_product * product
        of_q, of_k = shares.sum(dim=3), shares.sum(dim=2)  # (b, heads, e)
    shrink_q, shrink_k = (torch.stack((of_q, of_k)) * -inverse.square()).to(q.dtype)
    torch.addcmul(u_q, q, shrink_q[:, :, None], out=d_q)
    torch.addcmul(u_k, k, shrink_k[:, :, None], out=d_k)
    return of_q.sum(dim=(0, 2))[:, None, None] / temperature


def _pack(qkv: Float[Tensor, "b n 3 heads e"]) -> Float[Tensor, "3 b heads n e"]:
    # One copy here, or each batched product would make its own. With the channels last, it copies
    # contiguous runs of e numbers; a copy with the tokens last takes five times as long on a CPU.
    packed = qkv.permute(2, 0, 3, 1, 4)
    if not torch.compiler.is_compiling() and 4 * packed.shape[3] <= packed.shape[4]:
        # Casting the (e, e) matrices back and forth costs more than lower precision saves.
        precise = torch.promote_types(qkv.dtype, torch.float32)
        return packed.to(precise, memory_format=torch.contiguous_format)
    return packed.contiguous()


class XCA(nn.Module):
    """XCA layer: qkv projection, cross-covariance attention per image and head, projection."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = Linear(embed_dim, 3 * embed_dim)
        self.proj = Linear(embed_dim, embed_dim)

    def forward(self, x: Tokens, grids: Sequence[Grid], gain: Gain = None) -> Tokens:
        """Apply XCA to the tokens of all `grids`; `gain` (LayerScale) scales the output."""
        qkv = self.qkv(x).unflatten(1, (3, self.num_heads, -1))  # (t, 3, heads, d/heads)
        plain = torch.compiler.is_compiling() or qkv.dtype == torch.float16
        if torch.is_grad_enabled() and not plain:
            mixed = _Attend.apply(qkv, self.temperature, grids)
        else:
            with without_autocast(qkv):
                parts = map(_pack, split_tokens(qkv, grids))
                if plain:
                    outs = [attend(part, self.temperature) for part in parts]
                else:
                    outs = [attend_dividing_late(part, self.temperature).mixed for part in parts]
            mixed = join_tokens(out.to(qkv.dtype).transpose(1, 2).flatten(2) for out in outs)
        return linear(mixed, self.proj.weight, self.proj.bias, gain)
