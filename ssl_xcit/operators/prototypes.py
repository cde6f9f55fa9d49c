"""The last layer of the projection head: inner products with weight-normed prototypes.

With tens of thousands of prototypes this is the largest layer of the head. Its gradient is written
out here to avoid a normalised copy of the prototypes in the forward and backward pass.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssl_xcit.operators.linear import compute_dtype, linear, without_autocast


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose weight rows are g_k v_k / |v_k|, k = 1..out_dim.

    The keys are those of `torch.nn.utils.weight_norm`, which DINO uses and torch has deprecated:
    `weight_g` (K, 1), initialised to 1, and `weight_v` (K, in_dim), initialised as the weight of
    nn.Linear. While `weight_g` is 1 and inputs have unit length, the logits are cosines.
    """

    def __init__(self, in_dim: int, out_dim: int, train_norm: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=train_norm)
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))

    def forward(self, x: Float[Tensor, "b d"], frozen: bool = False) -> Float[Tensor, "b k"]:
        """Return the logits: float32 also under autocast, which rounds only the product's inputs.

        If `frozen`, no gradient is computed for the prototypes. It is None, or zero with several
        ranks, whose reduction expects one.
        """
        weights = self.weight_v, self.weight_g
        if frozen and not torch.distributed.is_initialized():
            weights = tuple(weight.detach() for weight in weights)
        return _Logits.apply(x, *weights, frozen)


class _Logits(torch.autograd.Function):
    """y = s (x v^T), s_k = g_k / |v_k|, of x (b, d), v (K, d) and g (K, 1).

    s scales the columns of y instead of the rows of v, which costs a pass over the logits instead
    of the prototypes.
    """

    @staticmethod
    def forward(ctx, x: Tensor, v: Tensor, g: Tensor, frozen: bool) -> Tensor:
        low = compute_dtype(x)
        with without_autocast(x):
            length = torch.linalg.vector_norm(v, dim=1)
            rounded = v.to(low)
            product = linear(x.to(low), rounded)
            scale = g[:, 0] / length
            ctx.save_for_backward(x, v, rounded, product, g, length)
            ctx.frozen = frozen
            return product * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Float[Tensor, "b k"]) -> tuple[Tensor | None, ...]:
        x, v, rounded, product, g, length = ctx.saved_tensors
        scaled = grad * (g[:, 0] / length)
        grad_x = linear(scaled.to(rounded.dtype), rounded.mT).to(x.dtype)
        if ctx.frozen:
            zeros = [weight.new_zeros(1).expand_as(weight) for weight in (v, g)]
            return grad_x, zeros[0], zeros[1] if ctx.needs_input_grad[2] else None, None
        if not any(ctx.needs_input_grad[1:3]):
            return grad_x, None, None, None
        grad_scale = (grad * product).sum(0)
        grad_v = grad_g = None
        if ctx.needs_input_grad[1]:
            grad_v = linear(scaled.mT, x.to(scaled.dtype).mT)
            grad_v.addcmul_(v, (grad_scale * g[:, 0] / length**3)[:, None], value=-1)
        if ctx.needs_input_grad[2]:
            grad_g = (grad_scale / length)[:, None]
        return grad_x, grad_v, grad_g, None
