"""Patch embedding, positional encoding and MLP."""

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor, nn

from ssl_xcit.operators.linear import Linear, gelu_linear


def fourier_features(height: int, width: int, device: torch.device) -> Float32[Tensor, "n 64"]:
    """Sine and cosine features of token positions, row by row ("Attention Is All You Need", 3.5).

    Each axis runs over (1 .. size) / size * 2 pi, at 16 frequencies 10000^(-i/16). Sine and cosine
    alternate: 32 features for y, then 32 for x. Always float32, including the 1e-6, as in the
    official code: its weights, even in float64, expect these values.
    """
    steps = torch.arange(16, dtype=torch.float32, device=device).repeat_interleave(2)
    wavelength = 10000.0 ** (2 * steps / 32)

    def axis(size: int) -> Float32[Tensor, "size 32"]:
        place = torch.arange(1, size + 1, dtype=torch.float32, device=device)
        angle = (place / (place[-1] + 1e-6) * (2 * math.pi))[:, None] / wavelength
        return torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=2).flatten(1)

    y = axis(height)[:, None].expand(height, width, 32)
    x = axis(width)[None].expand(height, width, 32)
    return torch.cat((y, x), dim=2).flatten(0, 1)


@functools.lru_cache(maxsize=64)  # bounds the memory when every image has its own size
def _cached_fourier_features(height: int, width: int, device: torch.device) -> Tensor:
    # A tensor created in inference mode could not be used in training later.
    with torch.inference_mode(False):
        return fourier_features(height, width, device)


class FourierPositions(nn.Module):
    """Fixed Fourier features of a grid, mapped to the embedding size by a learned projection.

    The features depend only on the grid. They are computed once per (height, width, device) and
    process, and projected once per forward pass instead of once per image.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.token_projection = nn.Conv2d(64, embed_dim, kernel_size=1)

    def forward(self, height: int, width: int, device: torch.device) -> Float[Tensor, "n d"]:
        # A compiled graph computes them itself: its memory must not escape into a cache.
        make = fourier_features if torch.compiler.is_compiling() else _cached_fourier_features
        features = make(height, width, device)
        weight = self.token_projection.weight.flatten(1)
        return F.linear(features.to(weight.dtype), weight, self.token_projection.bias)


class ConvPatchEmbed(nn.Module):
    """log2(patch_size) 3x3 convolutions of stride 2, each halving the sides (rounded up)."""

    def __init__(self, patch_size: int, embed_dim: int, in_chans: int) -> None:
        super().__init__()
        halvings = int(math.log2(patch_size))
        assert 2**halvings == patch_size, f"patch_size must be a power of 2, not {patch_size}"
        widths = [in_chans, *(embed_dim >> i for i in reversed(range(halvings)))]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            convolution = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            layers += [nn.Sequential(convolution, nn.BatchNorm2d(after)), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b d rows columns"]:
        return self.proj(x.contiguous(memory_format=torch.channels_last))


class MLP(nn.Module):
    """Linear to four times the width, exact GELU, Linear back."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(embed_dim, 4 * embed_dim)
        self.fc2 = Linear(4 * embed_dim, embed_dim)

    def forward(
        self, x: Float[Tensor, "... d"], gain: Float[Tensor, " d"] | None = None
    ) -> Float[Tensor, "... d"]:
        return gelu_linear(self.fc1(x), self.fc2.weight, self.fc2.bias, gain)
