"""XCiT: Cross-Covariance Image Transformers (El-Nouby et al., NeurIPS 2021, arXiv:2106.09681).

    image -> convolutional patch embedding + Fourier positions -> depth x XCABlock
          -> 2 x ClassAttentionBlock (CaiT, arXiv:2103.17239) -> LayerNorm -> cls token -> head

Parameter names are those of facebookresearch/xcit, so its files and DINO's backbones load with
`strict=True`. Tokens are (b, n, d) in memory throughout, n = rows x columns; seen as an image that
is torch's channels_last layout, so the convolutions among them copy nothing. Those of images of
several sizes may lie one size after the other in one matrix (t, d), see `tokens`.

LayerScale's gains scale the weights of a branch's last layer, not its tokens (`takes_gain`), and in
training a sample that drops a branch (stochastic depth) is left out of the branch's work. Both
change no number but by rounding. Under autocast branches compute in lower precision; the tokens
that they are added to, the residual stream, stay float32.
"""

import contextlib
import difflib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssl_xcit.draws import uniform
from ssl_xcit.drop_path import Kept, add_branch
from ssl_xcit.errors import UserError
from ssl_xcit.lpi import LPI
from ssl_xcit.products import Linear, gelu_linear, initialise
from ssl_xcit.tokens import Grid, join_tokens, split_tokens
from ssl_xcit.xca import XCA


class Variant(NamedTuple):
    """One row of table 1 of the paper; `eta` is LayerScale's initial gain."""

    embed_dim: int
    depth: int
    num_heads: int
    eta: float
    tokens_norm: bool  # in the class-attention blocks norm2 sees all tokens, or the cls token alone


VARIANTS = {
    "xcit_nano_12": Variant(128, 12, 4, 1.0, False),
    "xcit_tiny_12": Variant(192, 12, 4, 1.0, True),
    "xcit_tiny_24": Variant(192, 24, 4, 1e-5, True),
    "xcit_small_12": Variant(384, 12, 8, 1.0, True),
    "xcit_small_24": Variant(384, 24, 8, 1e-5, True),
    "xcit_medium_24": Variant(512, 24, 8, 1e-5, True),
    "xcit_large_24": Variant(768, 24, 16, 1e-5, True),
}
ARCHITECTURES = tuple(f"{name}_p{patch_size}" for name in VARIANTS for patch_size in (16, 8))


def build_xcit(
    arch: str, *, num_classes: int = 1000, in_chans: int = 3, drop_path_rate: float = 0.0
) -> "XCiT":
    """The model called `arch` in `ARCHITECTURES`, freshly initialised; 0 classes: the backbone.

    Raises:
        UserError: there is no such architecture (the message names the nearest).
    """
    if arch not in ARCHITECTURES:
        nearest = difflib.get_close_matches(arch, ARCHITECTURES, n=1, cutoff=0.0)[0]
        raise UserError(
            f"no architecture is called {arch!r}; did you mean {nearest!r}? "
            f"There are: {', '.join(ARCHITECTURES)}"
        )
    name, _, patch_size = arch.rpartition("_p")
    return XCiT(
        int(patch_size),
        *VARIANTS[name],
        num_classes=num_classes,
        in_chans=in_chans,
        drop_path_rate=drop_path_rate,
    )


# Positions


def fourier_features(height: int, width: int, device: torch.device) -> Float32[Tensor, "n 64"]:
    """Sines and cosines of the places of the tokens, row by row ("Attention Is All You Need", 3.5).

    Each axis runs over (1 .. size) / size * 2 pi, whatever its size, at 16 frequencies
    10000^(-i/16); sin and cos alternate, 32 features for y, then 32 for x. Always float32, as in
    the official code, whose weights in float64 expect the float32 numbers, its 1e-6 included.
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
    # A tensor made in inference mode could never be used in training afterwards.
    with torch.inference_mode(False):
        return fourier_features(height, width, device)


class FourierPositions(nn.Module):
    """The fixed Fourier features of a grid, brought to the embedding size by a learned projection.

    The features depend on the grid alone: they are computed once per (height, width, device) in the
    whole process, and projected once per forward, not once per image.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.token_projection = nn.Conv2d(64, embed_dim, kernel_size=1)

    def forward(self, height: int, width: int, device: torch.device) -> Float[Tensor, "n d"]:
        # A compiled graph computes them itself: its memory must not end in a cache outside of it.
        make = fourier_features if torch.compiler.is_compiling() else _cached_fourier_features
        features = make(height, width, device)
        weight = self.token_projection.weight.flatten(1)
        return F.linear(features.to(weight.dtype), weight, self.token_projection.bias)


# Layers


class ConvPatchEmbed(nn.Module):
    """log2(patch_size) convolutions 3x3 of stride 2, each halving the image (sides rounded up)."""

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
    """Linear, exact GELU, Linear."""

    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(embed_dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, embed_dim)

    def forward(
        self, x: Float[Tensor, "... d"], gain: Float[Tensor, " d"] | None = None
    ) -> Float[Tensor, "... d"]:
        return gelu_linear(self.fc1(x), self.fc2.weight, self.fc2.bias, gain)


class XCABlock(nn.Module):
    """XCA, LPI and MLP, each normalised before and added with its own LayerScale gains.

    The official code numbers LPI's norm and gains 3 although LPI comes second.
    """

    def __init__(self, embed_dim: int, num_heads: int, mlp_ratio: int, eta: float) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(embed_dim, eps=1e-6) for _ in range(3))
        self.gamma1, self.gamma2, self.gamma3 = (
            nn.Parameter(torch.full((embed_dim,), eta)) for _ in range(3)
        )
        self.attn = XCA(embed_dim, num_heads)
        self.local_mp = LPI(embed_dim)
        self.mlp = MLP(embed_dim, mlp_ratio * embed_dim)

    def forward(
        self,
        x: Float[Tensor, "t d"],
        grids: Sequence[Grid],
        kept: tuple[Kept, Kept, Kept] | None = None,
    ) -> Float[Tensor, "t d"]:
        """The tokens of all `grids`; `kept`: drop path (XCA, LPI, MLP)."""
        of_xca, of_lpi, of_mlp = kept or (None, None, None)
        x = add_branch(x, self._xca, grids, of_xca)
        x = add_branch(x, self._lpi, grids, of_lpi)
        return add_branch(x, self._mlp, grids, of_mlp)

    def _xca(self, x: Float[Tensor, "t d"], grids: Sequence[Grid]) -> Float[Tensor, "t d"]:
        return self.attn(self.norm1(x), grids, self.gamma1)

    def _lpi(self, x: Float[Tensor, "t d"], grids: Sequence[Grid]) -> Float[Tensor, "t d"]:
        return self.local_mp(self.norm3(x), grids, self.gamma3)

    def _mlp(self, x: Float[Tensor, "t d"], grids: Sequence[Grid]) -> Float[Tensor, "t d"]:
        return self.mlp(self.norm2(x), self.gamma2)


class ClassAttention(nn.Module):
    """Attention whose only query is the cls token (CaiT, section 3.2); softmax in float32 or more.

    With one query per head, projecting it back through the key matrix (and the weighted mean of the
    tokens through the value matrix) gives what projecting every token to keys and values would:

        q^T (W_k x_n + b_k)       = (W_k^T q)^T x_n + constant
        sum_n a_n (W_v x_n + b_v) = W_v (sum_n a_n x_n) + b_v

    so no n x d x d product remains. The constant, all that b_k does, is lost in the softmax and is
    left out; b_k stays, unused, as a third of `qkv.bias`, because the official files have it.
    """

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def attention(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b heads n"]:
        """Weight of every token for the first one, which is the cls token; each row sums to 1."""
        w_q, w_k, _ = self.qkv.weight.chunk(3)
        q = F.linear(x[:, 0], w_q, self.qkv.bias.chunk(3)[0]).unflatten(1, (self.num_heads, -1))
        q = q * q.shape[2] ** -0.5  # (b, heads, d/heads)
        query = torch.einsum("bhe,hed->bhd", q, w_k.unflatten(0, (self.num_heads, -1)))
        logits = query @ x.mT  # (b, heads, n)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        w_v = self.qkv.weight.chunk(3)[2].unflatten(0, (self.num_heads, -1))  # (heads, d/heads, d)
        mean = self.attention(x).to(x.dtype) @ x  # (b, heads, d)
        values = torch.einsum("bhd,hed->bhe", mean, w_v).flatten(1) + self.qkv.bias.chunk(3)[2]
        return self.proj(values)


class ClassAttentionBlock(nn.Module):
    """Class attention and MLP for the cls token; what happens to the patch tokens is a legacy.

    In the official code the patch tokens get gamma1 * norm1(x) as a residual, are normalised by
    norm2 if `tokens_norm`, and doubled by the last residual. Trained weights depend on all of it.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, mlp_ratio: int, eta: float, tokens_norm: bool
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(embed_dim, eps=1e-6) for _ in range(2))
        self.gamma1, self.gamma2 = (nn.Parameter(torch.full((embed_dim,), eta)) for _ in range(2))
        self.attn = ClassAttention(embed_dim, num_heads)
        self.mlp = MLP(embed_dim, mlp_ratio * embed_dim)
        self.tokens_norm = tokens_norm

    def normalise(
        self, cls: Float[Tensor, "b d"], patches: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b n+1 d"]:
        """The input of the attention: cls token first, then the patch tokens, after norm1."""
        return self.norm1(torch.cat((cls[:, None], patches), dim=1))

    def forward(
        self, cls: Float[Tensor, "b d"], patches: Float[Tensor, "b n d"], cls_only: bool = False
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b n d"]]:
        """The new cls and patch tokens; `cls_only` leaves the patch tokens as they came, unused."""
        normed = self.normalise(cls, patches)
        cls = self.norm2(cls + self.gamma1 * self.attn(normed))
        cls = cls + self.gamma2 * self.mlp(cls)
        if not cls_only:
            patches = patches + self.gamma1 * normed[:, 1:]
            patches = 2 * (self.norm2(patches) if self.tokens_norm else patches)
        return cls, patches


# The model

TOGETHER_ON_CPU = 2**20  # numbers, see `_fit_together`; measured: +7 % at 0.36 M, -3 % at 2.1 M


class XCiT(nn.Module):
    """The network for images of any size, square or not.

    Args:
        patch_size: 16 or 8, or another power of 2; there is a token for each begun patch.
        embed_dim, depth, num_heads, eta, tokens_norm: see `Variant`.
        num_classes: size of the linear head; 0: none, the output is the cls token.
        in_chans: channels of the image.
        drop_path_rate: chance that a sample skips a residual branch in training, the same for every
            block; none in the class-attention blocks.
        mlp_ratio: hidden size of the MLPs, in embed_dim.

    Attributes:
        activation_checkpointing: keep a block's input only, and compute the block again in the
            backward pass: less memory, more time, the same numbers.
        compiled: in training, compile patch embedding and blocks by torch.compile. The blocks are
            alike, so it compiles one of each kind and not as many as there are.
        join_sizes: whether images of several sizes share a pass; None: where that is quicker.
    """

    activation_checkpointing = compiled = False
    join_sizes: bool | None = None

    def __init__(
        self,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        eta: float,
        tokens_norm: bool,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        mlp_ratio: int = 4,
    ) -> None:
        super().__init__()
        self.patch_size, self.embed_dim, self.num_classes = patch_size, embed_dim, num_classes
        self.drop_path_rate = drop_path_rate
        self.patch_embed = ConvPatchEmbed(patch_size, embed_dim, in_chans)
        self.pos_embeder = FourierPositions(embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.blocks = nn.ModuleList(
            XCABlock(embed_dim, num_heads, mlp_ratio, eta) for _ in range(depth)
        )
        self.cls_attn_blocks = nn.ModuleList(
            ClassAttentionBlock(embed_dim, num_heads, mlp_ratio, eta, tokens_norm) for _ in range(2)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        nn.init.normal_(self.cls_token, std=0.02)
        initialise(self)  # everything else keeps torch's initial values

    def forward(
        self,
        x: Float[Tensor, "b c height width"] | Sequence[Float[Tensor, "_b c _height _width"]],
        keys: Int64[Tensor, "b"] | Sequence[Int64[Tensor, " _b"]] | None = None,
    ) -> Float[Tensor, "b out"]:
        """Logits, or without a head the cls token; in training as in evaluation.

        `x` may be several batches of images, each of its own size. The results follow one another
        and are those of a pass for each batch; where that is quicker it is one pass for all.
        `keys` (see `draws.stream`) fix each sample's drop path; without, torch's generator draws.
        """
        tokens = [
            self._run(self.cls_attn_blocks[1], *stage, True)[0]
            for stage in self._before_last_block(x, keys)
        ]
        return self.head(self.norm(torch.cat(tokens)))

    def forward_features(
        self, x: Float[Tensor, "b c height width"], keys: Int64[Tensor, "b"] | None = None
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b n d"]]:
        """The cls token and the patch tokens (row by row), both after the last LayerNorm."""
        (stage,) = self._before_last_block(x, keys)
        cls, patches = self._run(self.cls_attn_blocks[1], *stage)
        return self.norm(cls), self.norm(patches)

    def class_attention(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b heads n"]:
        """Attention of the cls token to each patch token (row by row) in the last layer.

        The softmax includes the cls token itself: the map of a head sums to 1 minus that share.
        """
        last = self.cls_attn_blocks[1]
        (stage,) = self._before_last_block(x, None)
        return last.attn.attention(last.normalise(*stage))[:, :, 1:]

    def class_attention_inputs(
        self, x: Float[Tensor, "b c height width"]
    ) -> list[tuple[Float[Tensor, "b d"], Float[Tensor, "b n d"]]]:
        """(cls token, patch tokens) that enter each class-attention layer, and that leave the last.

        All after the last LayerNorm, so the last pair is what `forward_features` returns. The
        first cls token is the same for every image: no layer has told it of one.
        """
        stages = self._before_class_attention(x, None)
        for block in self.cls_attn_blocks:
            stages.append(block(*stages[-1]))
        return [(self.norm(cls), self.norm(patches)) for cls, patches in stages]

    def _before_last_block(
        self, x: Tensor | Sequence[Tensor], keys: Tensor | Sequence[Tensor] | None
    ) -> list[tuple[Float[Tensor, "_b d"], Float[Tensor, "_b _n d"]]]:
        stages = self._before_class_attention(x, keys)
        return [self._run(self.cls_attn_blocks[0], *stage) for stage in stages]

    def _before_class_attention(
        self, x: Tensor | Sequence[Tensor], keys: Tensor | Sequence[Tensor] | None
    ) -> list[tuple[Float[Tensor, "_b d"], Float[Tensor, "_b _n d"]]]:
        """(cls token, patch tokens) of each batch of images."""
        if torch.is_tensor(x):
            x, keys = [x], None if keys is None else [keys]
        images = [self._run(self.patch_embed, batch) for batch in x]
        if self._fit_together(images):
            return self._through_blocks(images, keys)
        each = [None] * len(images) if keys is None else [[of_batch] for of_batch in keys]
        pairs = zip(images, each, strict=True)
        return [stage for image, key in pairs for stage in self._through_blocks([image], key)]

    def _fit_together(self, images: Sequence[Float[Tensor, "_b d _rows _columns"]]) -> bool:
        """Whether the tokens of all images go in one matrix, or in a matrix for each size.

        On a GPU one is quicker. On a CPU each operation's start counts when they are few; when they
        are many, that they fit into its caches. While samples drop branches there is little to
        share. What computes blocks again, to need less memory, holds one size at a time.
        """
        if self.join_sizes is not None:
            return self.join_sizes
        if self.activation_checkpointing:
            return False
        if len(images) == 1 or images[0].device.type != "cpu":
            return True
        if self.training and self.drop_path_rate > 0:
            return False
        return sum(image.numel() for image in images) <= TOGETHER_ON_CPU

    def _through_blocks(
        self,
        images: Sequence[Float[Tensor, "_b d _rows _columns"]],
        keys: Sequence[Int64[Tensor, " _b"]] | None,
    ) -> list[tuple[Float[Tensor, "_b d"], Float[Tensor, "_b _n d"]]]:
        grids = tuple(Grid(image.shape[0], *image.shape[2:]) for image in images)
        # The residual stream has the weights' type, float32, under autocast too: in bfloat16 a
        # branch whose gain is 1e-5 would be rounded away. The official code's gains see to that.
        precise = self.cls_token.dtype
        patches = join_tokens(
            image.flatten(2).transpose(1, 2)
            + self.pos_embeder(*image.shape[2:], image.device).to(precise)
            for image in images
        )
        for block, kept in zip(self.blocks, self._kept(grids, keys), strict=True):
            patches = self._run(block, patches, grids, kept)
        cls = self.cls_token[0]
        return [(cls.expand(part.shape[0], -1), part) for part in split_tokens(patches, grids)]

    def _run(self, part: nn.Module, *arguments: object) -> Tensor | tuple[Tensor, Tensor]:
        """part(*arguments), compiled and checkpointed if that is wanted."""
        if self.compiled and self.training:
            part_call = functools.partial(_compiled_forward(type(part)), part)
        else:
            part_call = part
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return part_call(*arguments)
        # A compiler repeats no change of a buffer, and drop path was drawn before.
        again = {} if torch.compiler.is_compiling() else {"context_fn": lambda: _again(part)}
        options = {"use_reentrant": False, "preserve_rng_state": False}
        return checkpoint(part_call, *arguments, **options, **again)

    def _kept(
        self, grids: Sequence[Grid], keys: Sequence[Int64[Tensor, " _b"]] | None
    ) -> list[tuple[Kept, Kept, Kept]] | list[None]:
        """For each block, which samples keep its branches (XCA, LPI, MLP)."""
        b = sum(grid.b for grid in grids)
        factors = self._drop_path(b, None if keys is None else torch.cat(tuple(keys)))
        if factors is None:
            return [None] * len(self.blocks)
        rows: list[list[tuple[Tensor, ...] | None]] = [[None] * 3] * len(self.blocks)
        shapes_are_fixed = self.compiled or torch.compiler.is_compiling()
        by_grid = factors.split([grid.b for grid in grids], dim=2)
        if factors.device.type == "cpu" and not shapes_are_fixed:
            # block by block and branch by branch, of each grid
            each = list(zip(*map(self._places, by_grid), strict=True))
            # Never LPI: its BatchNorm sees all samples.
            rows = [[each[i], None, each[i + 2]] for i in range(0, len(each), 3)]
        pairs = zip(by_grid, grids, strict=True)
        by_token = [
            part.to(self.cls_token.device, non_blocking=True).repeat_interleave(grid.tokens, dim=2)
            for part, grid in pairs
        ]
        factors = torch.cat(by_token, dim=2)[..., None]
        scale = 1 / (1 - self.drop_path_rate)
        return [
            tuple(Kept(factors[i, j], scale, rows[i][j]) for j in range(3))
            for i in range(len(self.blocks))
        ]

    def _places(self, factors: Float[Tensor, "l 3 b"]) -> tuple[Int64[Tensor, " _kept"], ...]:
        """Of the samples whose factor is not 0, for each block and branch."""
        places = factors.nonzero()[:, 2].to(self.cls_token.device, non_blocking=True)
        return places.split(factors.count_nonzero(dim=2).flatten().tolist())

    def _drop_path(self, b: int, keys: Int64[Tensor, "b"] | None) -> Float[Tensor, "l 3 b"] | None:
        """0 or 1 / (1 - rate) for each block, branch (XCA, LPI, MLP) and sample, all at once.

        On the device of the keys: from keys on the host the host knows which samples to leave out.
        """
        if not self.training or self.drop_path_rate == 0:
            return None
        depth, rate, device = len(self.blocks), self.drop_path_rate, self.cls_token.device
        if keys is None:
            draws = torch.rand(depth, 3, b, device=device)
        else:
            keys = keys.to(device) if torch.compiler.is_compiling() else keys
            counters = torch.arange(3 * depth, device=keys.device).view(depth, 3, 1)
            draws = uniform(keys, counters)
        return (draws >= rate).to(self.cls_token.dtype) / (1 - rate)


@functools.cache
def _compiled_forward(kind: type[nn.Module]) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    """The compiled `forward` of all parts of a class: one graph for each size of image."""
    return torch.compile(kind.forward, dynamic=False)


def _again(part: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Around the first computation of a checkpointed part, and around the one for its gradient."""
    return contextlib.nullcontext(), _buffers_kept(part)


@contextlib.contextmanager
def _buffers_kept(part: nn.Module) -> Iterator[None]:
    """The second computation moves copies of BatchNorm's running statistics, which are thrown away.

    Not put back afterwards: autograd would take that for a change of what the first one has saved.
    """
    buffers = [
        (module, name, buffer)
        for module in part.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        for module, name, buffer in buffers:
            setattr(module, name, buffer.clone())
        yield
    finally:
        for module, name, buffer in buffers:
            setattr(module, name, buffer)
