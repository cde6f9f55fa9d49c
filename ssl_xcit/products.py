"""Linear layers whose float32 products are as quick on a CPU as the CPU is.

torch multiplies float32 matrices by MKL, which on AMD's processors reaches less than half of what
oneDNN does: on a core of a Zen 5 server 92 and 238 GFLOP/s. torch is built with both, and gives
bfloat16 and convolutions to oneDNN itself. The operator used here is the one that torch.compile
calls for a linear layer; it is plain float32, rounded in another order.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import flop_registry, register_flop_formula


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x: Float[Tensor, "... c"]) -> Float[Tensor, "... d"]:
        return linear(x, self.weight, self.bias)


def linear(
    x: Float[Tensor, "... c"], weight: Float[Tensor, "d c"], bias: Float[Tensor, " d"] | None = None
) -> Float[Tensor, "... d"]:
    """x W^T + b: torch's own `linear`, or in float32 on a CPU oneDNN's."""
    if not _is_for_onednn(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _OneDnnLinear.apply(x, weight, bias)
    return _product(x, weight, bias)


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    # A compiler chooses the library itself.
    return not torch.compiler.is_compiling() and (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.ndim > 1
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )


class _OneDnnLinear(torch.autograd.Function):
    """The operator with the gradient that it lacks: dx = dy W, dW = dy^T x, db = sum dy."""

    @staticmethod
    def forward(
        ctx,
        x: Float[Tensor, "... c"],
        weight: Float[Tensor, "d c"],
        bias: Float[Tensor, " d"] | None,
    ) -> Float[Tensor, "... d"]:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Float[Tensor, "... d"]) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        d_x = _product(grad, weight.t()) if wanted[0] else None
        d_weight = _product(rows.t(), x.flatten(0, -2).t()) if wanted[1] else None
        return d_x, d_weight, rows.sum(dim=0) if wanted[2] else None


def _product(
    x: Float[Tensor, "... c"], weight: Float[Tensor, "d c"], bias: Float[Tensor, " d"] | None = None
) -> Float[Tensor, "... d"]:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _flops(x_shape, weight_shape, *_, out_shape=None, **__) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0]


# torch's counter of FLOPs does not know the operator.
if torch.ops.mkldnn._linear_pointwise not in flop_registry:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_flops)
