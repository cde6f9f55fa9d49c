"""Linear layers whose products are as quick on a CPU as the CPU is.

torch multiplies float32 matrices by MKL, which on AMD's processors reaches less than half of what
oneDNN does: on a core of a Zen 5 server 92 and 238 GFLOP/s. torch is built with both, and gives
bfloat16 and convolutions to oneDNN itself. The operator used here is the one that torch.compile
calls for a linear layer; in float32 it differs from MKL's by the order of rounding, and in bfloat16
it takes 5 to 11 % less than torch's own call, which copies the bias first.
"""

import functools

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x: Float[Tensor, "... c"]) -> Float[Tensor, "... d"]:
        return linear(x, self.weight, self.bias)


def linear(
    x: Float[Tensor, "... c"], weight: Float[Tensor, "d c"], bias: Float[Tensor, " d"] | None = None
) -> Float[Tensor, "... d"]:
    """x W^T + b: torch's own `linear`, or on a CPU oneDNN's, in float32 or bfloat16 autocast.

    Autocast rounds the same numbers as before torch's.
    """
    if not _is_for_onednn(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled("cpu"):
        x, weight = x.bfloat16(), weight.bfloat16()
        bias = None if bias is None else bias.bfloat16()
    if torch.is_grad_enabled():
        return _OneDnnLinear.apply(x, weight, bias)
    return _product(x, weight, bias)


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    # A compiler chooses the library itself.
    if torch.compiler.is_compiling() or not torch.backends.mkldnn.is_available():
        return False
    if not (x.device.type == weight.device.type == "cpu" and x.ndim > 1 and x.numel() > 0):
        return False
    if torch.is_autocast_enabled("cpu"):
        bfloat16 = torch.get_autocast_dtype("cpu") == torch.bfloat16
        return bfloat16 and x.dtype != torch.float64 and _has_bfloat16()
    return x.dtype == weight.dtype == torch.float32


@functools.cache
def _has_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


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
        return _gradients(grad, x, weight, ctx.needs_input_grad)


def gelu_linear(
    x: Float[Tensor, "... c"], weight: Float[Tensor, "d c"], bias: Float[Tensor, " d"]
) -> Float[Tensor, "... d"]:
    """linear(gelu(x)), of which the gradient keeps x alone and makes gelu(x) anew.

    That is a sixth of a network's activations for a few percent of its time.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return linear(F.gelu(x), weight, bias)
    low = compute_dtype(x)
    return _GeluLinear.apply(x.to(low), weight.to(low), bias.to(low))


def compute_dtype(x: Tensor) -> torch.dtype:
    """What autocast multiplies in, where it is on; else the type of `x`."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else x.dtype


class _GeluLinear(torch.autograd.Function):
    """Exact GELU, then the product."""

    @staticmethod
    def forward(
        ctx, x: Float[Tensor, "... c"], weight: Float[Tensor, "d c"], bias: Float[Tensor, " d"]
    ) -> Float[Tensor, "... d"]:
        ctx.save_for_backward(x, weight)
        return linear(F.gelu(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Float[Tensor, "... d"]) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        d_gelu, *others = _gradients(grad, F.gelu(x), weight, ctx.needs_input_grad)
        d_x = None if d_gelu is None else torch.ops.aten.gelu_backward(d_gelu, x)
        return d_x, *others


def _gradients(
    grad: Float[Tensor, "... d"],
    x: Float[Tensor, "... c"],
    weight: Float[Tensor, "d c"],
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Of x, weight and bias of a linear layer, as far as `wanted`; without a graph of their own."""
    rows = grad.flatten(0, -2)
    # torch gives bfloat16 to oneDNN, and in these layouts its own way is the quicker one
    product = linear if grad.dtype == torch.float32 else F.linear
    d_x = product(grad, weight.t()) if wanted[0] else None
    d_weight = product(rows.t(), x.flatten(0, -2).t()) if wanted[1] else None
    return d_x, d_weight, rows.sum(dim=0) if wanted[2] else None


def _product(
    x: Float[Tensor, "... c"], weight: Float[Tensor, "d c"], bias: Float[Tensor, " d"] | None = None
) -> Float[Tensor, "... d"]:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
