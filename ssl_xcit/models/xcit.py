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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssl_xcit.models.class_attention import ClassAttentionBlock
from ssl_xcit.models.layers import MLP, ConvPatchEmbed, FourierPositions
from ssl_xcit.models.variants import ARCHITECTURES, VARIANTS
from ssl_xcit.operators.drop_path import Kept, add_branch
from ssl_xcit.operators.linear import initialise
from ssl_xcit.operators.lpi import LPI
from ssl_xcit.operators.tokens import Grid, join_tokens, split_tokens
from ssl_xcit.operators.xca import XCA
from ssl_xcit.runtime.draws import uniform
from ssl_xcit.runtime.errors import UserError


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
