"""XCiT: Cross-Covariance Image Transformers (El-Nouby et al., NeurIPS 2021, arXiv:2106.09681).

    image -> convolutional patch embedding + Fourier positions -> depth x XCABlock
          -> 2 x ClassAttentionBlock (CaiT, arXiv:2103.17239) -> LayerNorm -> cls token -> head

Parameter names are those of facebookresearch/xcit, so its checkpoints and DINO's backbones load
with `strict=True`. Tokens are always (b, n, d) in memory, n = rows x columns. Viewed as an image,
this is torch's channels_last layout, so the convolutions on tokens need no copy. The tokens of
images of several sizes can be concatenated into one matrix (t, d), see `operators.tokens`.

LayerScale's gains scale the weights of a branch's last layer instead of its tokens (`takes_gain`).
In training, a sample that drops a branch (stochastic depth) skips its computation. Both change
results only by rounding. Under autocast the branches compute in lower precision; the residual
stream stays float32.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssl_xcit.models.class_attention import ClassAttentionBlock
from ssl_xcit.models.layers import MLP, ConvPatchEmbed, FourierPositions
from ssl_xcit.models.variants import VARIANTS, check_arch
from ssl_xcit.operators.drop_path import Kept, add_branch
from ssl_xcit.operators.linear import initialise
from ssl_xcit.operators.lpi import LPI
from ssl_xcit.operators.tokens import Grid, Tokens, join_tokens, split_tokens
from ssl_xcit.operators.xca import XCA
from ssl_xcit.runtime.draws import uniform


def build_xcit(
    arch: str, *, num_classes: int = 1000, in_chans: int = 3, drop_path_rate: float = 0.0
) -> "XCiT":
    """Build the architecture `arch`, freshly initialised; `num_classes=0` builds the backbone.

    Raises UserError, which names the closest matches, if there is no such architecture.
    """
    check_arch(arch)
    name, _, patch_size = arch.rpartition("_p")
    return XCiT(
        int(patch_size),
        *VARIANTS[name],
        num_classes=num_classes,
        in_chans=in_chans,
        drop_path_rate=drop_path_rate,
    )


class XCABlock(nn.Module):
    """Residual branches XCA, LPI and MLP, each with pre-norm and LayerScale.

    The official code numbers LPI's norm and gains 3, although LPI comes second.
    """

    def __init__(self, embed_dim: int, num_heads: int, eta: float) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(embed_dim, eps=1e-6) for _ in range(3))
        self.gamma1, self.gamma2, self.gamma3 = (
            nn.Parameter(torch.full((embed_dim,), eta)) for _ in range(3)
        )
        self.attn = XCA(embed_dim, num_heads)
        self.local_mp = LPI(embed_dim)
        self.mlp = MLP(embed_dim)

    def forward(
        self, x: Tokens, grids: Sequence[Grid], kept: tuple[Kept, Kept, Kept] | None = None
    ) -> Tokens:
        """Apply the branches to the tokens of all `grids`; `kept`: drop path of XCA, LPI, MLP."""
        of_xca, of_lpi, of_mlp = kept or (None, None, None)
        x = add_branch(x, self._xca, grids, of_xca)
        x = add_branch(x, self._lpi, grids, of_lpi)
        return add_branch(x, self._mlp, grids, of_mlp)

    def _xca(self, x: Tokens, grids: Sequence[Grid]) -> Tokens:
        return self.attn(self.norm1(x), grids, self.gamma1)

    def _lpi(self, x: Tokens, grids: Sequence[Grid]) -> Tokens:
        return self.local_mp(self.norm3(x), grids, self.gamma3)

    def _mlp(self, x: Tokens, grids: Sequence[Grid]) -> Tokens:
        return self.mlp(self.norm2(x), self.gamma2)


# The model

TOGETHER_ON_CPU = 2**20  # elements, see `_fit_together`; speed: +7 % at 0.36 M, -3 % at 2.1 M


class XCiT(nn.Module):
    """XCiT for images of any size, square or not.

    Args:
        patch_size: 16, 8 or another power of 2; partial patches at the border also get a token.
        embed_dim, depth, num_heads, eta, tokens_norm: see `Variant`.
        num_classes: size of the linear head; 0: no head, the output is the cls token.
        in_chans: channels of the image.
        drop_path_rate: probability that a sample skips a residual branch in training, the same in
            every block; the class-attention blocks have no drop path.

    Attributes:
        activation_checkpointing: store only the input of each block and recompute the block in the
            backward pass: less memory, more time, the same results.
        compiled: in training, compile patch embedding and blocks with torch.compile. Blocks of one
            kind share a compiled graph.
        join_sizes: whether images of several sizes share a pass; None: if that is faster.
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
    ) -> None:
        super().__init__()
        self.patch_size, self.embed_dim, self.num_classes = patch_size, embed_dim, num_classes
        self.drop_path_rate = drop_path_rate
        self.patch_embed = ConvPatchEmbed(patch_size, embed_dim, in_chans)
        self.pos_embeder = FourierPositions(embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.blocks = nn.ModuleList(XCABlock(embed_dim, num_heads, eta) for _ in range(depth))
        self.cls_attn_blocks = nn.ModuleList(
            ClassAttentionBlock(embed_dim, num_heads, eta, tokens_norm) for _ in range(2)
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
        """Return the logits, or the cls token if there is no head; in training too.

        `x` may be a list of image batches of different sizes. The results are concatenated and
        equal those of one pass per batch; if that is faster, all batches share a pass. `keys` (see
        `draws.stream`) fix each sample's drop path; without them, torch's generator draws it.
        """
        tokens = [
            self._run(self.cls_attn_blocks[1], *stage, True)[0]
            for stage in self._before_last_block(x, keys)
        ]
        return self.head(self.norm(torch.cat(tokens)))

    def forward_features(
        self, x: Float[Tensor, "b c height width"], keys: Int64[Tensor, "b"] | None = None
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b n d"]]:
        """Return cls token and patch tokens (row by row), both after the final LayerNorm."""
        (stage,) = self._before_last_block(x, keys)
        cls, patches = self._run(self.cls_attn_blocks[1], *stage)
        return self.norm(cls), self.norm(patches)

    def class_attention(self, x: Float[Tensor, "b c height width"]) -> Float[Tensor, "b heads n"]:
        """Attention of the cls token to each patch token (row by row) in the last layer.

        The softmax includes the cls token itself, so a head's map sums to 1 minus that weight.
        """
        last = self.cls_attn_blocks[1]
        (stage,) = self._before_last_block(x, None)
        return last.attn.attention(last.normalise(*stage))[:, :, 1:]

    def class_attention_inputs(
        self, x: Float[Tensor, "b c height width"]
    ) -> list[tuple[Float[Tensor, "b d"], Float[Tensor, "b n d"]]]:
        """Return (cls token, patch tokens) before each class-attention layer and after the last.

        The final LayerNorm is applied to all, so the last pair equals `forward_features`. The first
        cls token is the same for every image, because it has not attended to any patch yet.
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
        """Return (cls token, patch tokens) of each batch of images."""
        if torch.is_tensor(x):
            x, keys = [x], None if keys is None else [keys]
        images = [self._run(self.patch_embed, batch) for batch in x]
        if self._fit_together(images):
            return self._through_blocks(images, keys)
        each = [None] * len(images) if keys is None else [[of_batch] for of_batch in keys]
        pairs = zip(images, each, strict=True)
        return [stage for image, key in pairs for stage in self._through_blocks([image], key)]

    def _fit_together(self, images: Sequence[Float[Tensor, "_b d _rows _columns"]]) -> bool:
        """Whether the tokens of all sizes go into one matrix instead of one matrix per size.

        On a GPU one matrix is faster. On a CPU it is faster for few tokens, where the overhead per
        operation dominates, but slower for many, which no longer fit into its caches. While samples
        drop branches there is little to share. With activation checkpointing, one size at a time
        needs less memory.
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
        # The residual stream has the dtype of the weights, float32, also under autocast: bfloat16
        # would round away a branch with a gain of 1e-5. The official code's float32 gains have the
        # same effect.
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
        """Call part(*arguments), compiled and checkpointed if configured."""
        if self.compiled and self.training:
            part_call = functools.partial(_compiled_forward(type(part)), part)
        else:
            part_call = part
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return part_call(*arguments)
        # A compiled graph does not repeat buffer updates, and drop path is already drawn.
        options = {"use_reentrant": False, "preserve_rng_state": False}
        if not torch.compiler.is_compiling():  # contexts of the forward pass and of its repetition
            options["context_fn"] = lambda: (contextlib.nullcontext(), _buffers_kept(part))
        return checkpoint(part_call, *arguments, **options)

    def _kept(
        self, grids: Sequence[Grid], keys: Sequence[Int64[Tensor, " _b"]] | None
    ) -> list[tuple[Kept, Kept, Kept]] | list[None]:
        """Draw for each block which samples keep its branches (XCA, LPI, MLP)."""
        b = sum(grid.b for grid in grids)
        factors = self._drop_path(b, None if keys is None else torch.cat(tuple(keys)))
        if factors is None:
            return [None] * len(self.blocks)
        rows: list[list[tuple[Tensor, ...] | None]] = [[None] * 3] * len(self.blocks)
        shapes_are_fixed = self.compiled or torch.compiler.is_compiling()
        by_grid = factors.split([grid.b for grid in grids], dim=2)
        if factors.device.type == "cpu" and not shapes_are_fixed:
            # One entry per block and branch, holding the rows of each grid
            each = list(zip(*map(self._places, by_grid), strict=True))
            # LPI never skips samples, because its BatchNorm must see all of them.
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
        """Return the indices of the samples with non-zero factor, for each block and branch."""
        places = factors.nonzero()[:, 2].to(self.cls_token.device, non_blocking=True)
        return places.split(factors.count_nonzero(dim=2).flatten().tolist())

    def _drop_path(self, b: int, keys: Int64[Tensor, "b"] | None) -> Float[Tensor, "l 3 b"] | None:
        """Draw 0 or 1 / (1 - rate) for each block, branch (XCA, LPI, MLP) and sample.

        The result is on the device of the keys. With keys on the host, the host knows which samples
        to skip.
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
    """The compiled `forward` of all modules of a class, with one graph per image size."""
    return torch.compile(kind.forward, dynamic=False)


@contextlib.contextmanager
def _buffers_kept(part: nn.Module) -> Iterator[None]:
    """Let the recomputation update copies of BatchNorm's running statistics, which are discarded.

    Restoring the buffers' values afterwards would not do: autograd would see an in-place change of
    tensors that the forward pass saved.
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
