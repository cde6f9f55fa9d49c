"""Linear layers that use the faster matrix library on each CPU.

torch multiplies float32 matrices with MKL. On AMD processors this is less than half as fast as
oneDNN (92 against 238 GFLOP/s on a core of a Zen 5 server); on Intel's it is faster (by 7 % on an
Emerald Rapids). torch is built with both and uses oneDNN for bfloat16 and convolutions. The
operator used here is the one that torch.compile calls for a linear layer. In float32 it differs
from MKL only in rounding order; in bfloat16 it takes 5 to 11 % less time than torch's own call,
which first copies the bias.
"""

import contextlib
import functools
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssl_xcit.runtime.processor import made_by_intel

Gain = Float[Tensor, " d"] | None  # of LayerScale


class Linear(nn.Linear):
    """nn.Linear computed by `linear`."""

    def forward(self, x: Float[Tensor, "... c"]) -> Float[Tensor, "... d"]:
        return linear(x, self.weight, self.bias)


def initialise(module: nn.Module) -> None:
    """Initialise all linear layers in `module` as the official code does: std 0.02, bias 0.

    The official code truncates the normal distribution at +-2, a hundred standard deviations, which
    no draw reaches. `trunc_normal_` draws different numbers in torch 2.11 and 2.15; `normal_` draws
    those of 2.15 in both.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


def linear(
    x: Float[Tensor, "... c"],
    weight: Float[Tensor, "d c"],
    bias: Float[Tensor, " d"] | None = None,
    gain: Float[Tensor, " d"] | None = None,
) -> Float[Tensor, "... d"]:
    """Compute gain (x W^T + b), on a CPU in float32 or bfloat16 autocast with oneDNN's operator.

    Autocast rounds the same tensors as for torch's `linear`. If `takes_gain` is true, LayerScale's
    `gain` is multiplied into W and b. This saves a pass over the tokens, forward and backward, and
    the copy of the unscaled tokens that the gain's gradient would need.
    """
    if gain is not None and not takes_gain(x):
        return gain * linear(x, weight, bias)
    if not _is_for_onednn(x, weight):
        return F.linear(x, *scaled_weights(weight, bias, gain))
    low = compute_dtype(x)
    if torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias, gain, low, False)
    weight, bias = scaled_weights(weight, bias, gain, low)
    if low == torch.float32 and made_by_intel():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x.to(low), weight, bias, "none", [], "")


def gelu_linear(
    x: Float[Tensor, "... c"],
    weight: Float[Tensor, "d c"],
    bias: Float[Tensor, " d"],
    gain: Float[Tensor, " d"] | None = None,
) -> Float[Tensor, "... d"]:
    """`linear` of gelu(x) that saves only x for the backward pass, which recomputes gelu(x).

    This saves a sixth of the network's activation memory for a few percent more time.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return linear(F.gelu(x), weight, bias, gain)
    if gain is not None and not takes_gain(x):
        return gain * gelu_linear(x, weight, bias)
    return _Linear.apply(x, weight, bias, gain, compute_dtype(x), True)


def takes_gain(x: Tensor) -> bool:
    """Whether LayerScale's gain may be multiplied into the weights of the layer applied to `x`.

    Not in float16, which would lose them: a gain of 1e-5 times a weight of 0.02 is 2e-7, of which
    it keeps two bits. Not under a compiler, which fuses the gain with the residual sum.
    """
    return not torch.compiler.is_compiling() and compute_dtype(x) != torch.float16


def scaled_weights(
    weight: Float[Tensor, "d c"],
    bias: Float[Tensor, " d"] | None,
    gain: Float[Tensor, " d"] | None,
    dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, "d c"], Float[Tensor, " d"] | None]:
    """Return gain W and gain b (W and b if `gain` is None), rounded to `dtype` if given."""
    if gain is not None:
        weight, bias = gain[:, None] * weight, None if bias is None else gain * bias
    if dtype is not None:
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return weight, bias


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    # A compiler chooses the library by itself.
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


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products: autocast's if it is enabled, else that of `x`."""
    return torch.get_autocast_dtype(x.device.type) if _autocasts(x) else x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Context in which operations on `x` keep its dtype."""
    if not _autocasts(x):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def _autocasts(x: Tensor) -> bool:
    if torch.compiler.is_compiling():  # it casts by itself, and torch 2.11 cannot trace the rest
        return False
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


class _Linear(torch.autograd.Function):
    """`linear` of x, or of gelu(x) recomputed from x, in dtype `low` (as autocast casts).

    With y = x U^T, U the scaled and rounded weight, the gradients are dx = dy U, dU = dy^T x,
    dW = gain dU, dgain = sum_c dU W + db_scaled b, and likewise for b.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, gain, low: torch.dtype, gelu: bool) -> Tensor:
        x = x.to(low)
        used, used_bias = scaled_weights(weight, bias, gain, low)
        ctx.save_for_backward(x, used, weight, bias, gain)
        ctx.gelu = gelu
        return linear(F.gelu(x) if gelu else x, used, used_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Float[Tensor, "... d"]) -> tuple[Tensor | None, ...]:
        x, used, weight, bias, gain = ctx.saved_tensors
        of_x, of_weight, of_bias, of_gain, *_ = ctx.needs_input_grad
        d_x = d_weight = d_bias = d_gain = None
        rows, inputs = grad.flatten(0, -2), F.gelu(x) if ctx.gelu else x
        # torch computes bfloat16 with oneDNN too, and in these layouts its own call is faster.
        product = linear if grad.dtype == torch.float32 else F.linear
        if of_x:
            d_x = product(grad, used.t())
        if of_weight or of_gain:
            d_weight = product(rows.t(), inputs.flatten(0, -2).t()).to(weight.dtype)
        if bias is not None and (of_bias or of_gain):
            d_bias = rows.sum(dim=0).to(bias.dtype)
        if gain is not None:
            if of_gain:
                d_gain = (d_weight * weight).sum(dim=1)
                d_gain = d_gain if bias is None else d_gain.addcmul_(d_bias, bias)
            d_weight = gain[:, None] * d_weight if of_weight else None
            d_bias = gain * d_bias if of_bias else None
        del inputs  # its memory is free for what follows
        if ctx.gelu and of_x:
            d_x = torch.ops.aten.gelu_backward(d_x, x)
        return d_x, d_weight, d_bias, d_gain, None, None
