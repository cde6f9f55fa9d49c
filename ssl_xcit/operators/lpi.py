"""LPI, local patch interaction: depthwise convolutions over the tokens (XCiT, section 3.3)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssl_xcit.operators.linear import Gain, compute_dtype, scaled_weights, takes_gain
from ssl_xcit.operators.tokens import Grid, Tokens, join_tokens, split_tokens


class LPI(nn.Module):
    """Local patch interaction: two depthwise 3x3 convolutions on the token grid."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(embed_dim, embed_dim, 3, padding=1, groups=embed_dim)
        self.bn = nn.BatchNorm2d(embed_dim)
        self.conv2 = nn.Conv2d(embed_dim, embed_dim, 3, padding=1, groups=embed_dim)

    def forward(self, x: Tokens, grids: Sequence[Grid], gain: Gain = None) -> Tokens:
        """Apply LPI; `gain` (LayerScale) scales the output. BatchNorm runs grid by grid."""
        inside = gain if takes_gain(x) else None
        first, second = _kernels(self.conv1, None, x), _kernels(self.conv2, inside, x)
        parts = []
        for part, grid in zip(split_tokens(x, grids), grids, strict=True):
            image = part.mT.unflatten(2, (grid.rows, grid.columns))  # (b, d, ...): a view
            image = self.bn(F.gelu(_depthwise(image, *first)))
            parts.append(_depthwise(image, *second).flatten(2).transpose(1, 2))
        out = join_tokens(parts)
        return out if inside is gain else gain * out


def _kernels(conv: nn.Conv2d, gain: Gain, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight and bias, scaled and in the compute dtype of `x`, once for all grids."""
    # Flattening gives the weight's gradient the weight's own strides. A channels_last convolution
    # would give it (9, 1, 3, 1), which DistributedDataParallel warns about and copies, and which
    # the optimisers' multi-tensor kernels reject.
    flat = conv.weight.flatten(1)
    weight, bias = scaled_weights(flat, conv.bias, gain, compute_dtype(x))
    return weight.unflatten(1, (1, 3, 3)), bias


def _depthwise(
    x: Float[Tensor, "b d rows columns"],
    weight: Float[Tensor, "d 1 3 3"],
    bias: Float[Tensor, " d"],
) -> Float[Tensor, "b d rows columns"]:
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or min(x.shape[2:]) > 2:
        return F.conv2d(x, weight, bias, padding=1, groups=len(weight))
    return _SmallDepthwise.apply(x.to(weight.dtype), weight, bias)


class _SmallDepthwise(torch.autograd.Function):
    """3x3 depthwise convolution of images with a side of 1 or 2.

    oneDNN's weight gradient is 20 times slower for images smaller than the kernel, so it is
    computed on images padded to the kernel size. The padding is zero anyway.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=1, groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Float[Tensor, "b d rows columns"]) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        derive = torch.ops.aten.convolution_backward
        sizes = [len(weight)], [1, 1], [1, 1], [1, 1], False, [0, 0], len(weight)
        of_x, *of_others = ctx.needs_input_grad
        d_x = derive(grad, x, weight, *sizes, (of_x, False, False))[0] if of_x else None
        if not any(of_others):
            return d_x, None, None
        rows, columns = x.shape[2:]
        borders = (0, max(0, 3 - columns), 0, max(0, 3 - rows))
        wider = F.pad(grad, borders), F.pad(x, borders)
        return d_x, *derive(*wider, weight, *sizes, (False, *of_others))[1:]
