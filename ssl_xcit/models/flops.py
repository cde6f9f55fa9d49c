"""Operation counts of an XCiT for one image, by kind of operator, from the sizes of its modules.

Papers and model tables call these FLOPs and count a multiply-add as one:

    convolution, linear, matrix product   1 per multiply-add (biases are free)
    BatchNorm in evaluation, LayerNorm    2 and 5 per element
    everything else                       free: softmax, GELU, norms of q and k, residuals, sines

These are the rules of fvcore and mmengine. They reproduce the 42 published numbers exactly, for the
backbone without its classifier at batch size 1, and with class attention as usually written, which
projects every token to a key and a value. That is `conventional`. Our implementation projects the
query instead, and its last block computes only the cls token, so it needs fewer operations.
"""

from typing import NamedTuple

from torch import nn

from ssl_xcit.models.class_attention import ClassAttention, ClassAttentionBlock
from ssl_xcit.models.xcit import XCA, XCiT


class Operations(NamedTuple):
    """Counts by kind of operator; their sum is what tables call FLOPs."""

    convolution: int = 0
    linear: int = 0
    matmul: int = 0
    batch_norm: int = 0
    layer_norm: int = 0

    @property
    def total(self) -> int:
        """FLOPs as model tables count them."""
        return sum(self)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of convolutions, linear layers and matrix products: half the true FLOPs."""
        return self.convolution + self.linear + self.matmul

    def plus(self, other: "Operations") -> "Operations":
        """Add the counts of each kind."""
        return Operations(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


def count_operations(
    model: XCiT, height: int, width: int, *, conventional: bool = True, classifier: bool = False
) -> Operations:
    """Count the operations of a forward pass in evaluation for one image of height x width pixels.

    `conventional`: count as the published tables do (see above); otherwise count what
    `XCiT.forward` runs. `classifier` adds the model's head. Only sizes are read, so the model may
    be on the meta device.
    """
    stem, patches = _stem(model, height, width)
    positions = patches * _size(model.pos_embeder.token_projection)
    if conventional:
        total = stem.plus(Operations(convolution=positions))  # written as a 1x1 convolution
    else:
        total = stem.plus(Operations(linear=positions))
    for block in model.blocks:
        total = total.plus(_block(block, patches))
    last = len(model.cls_attn_blocks) - 1
    for number, block in enumerate(model.cls_attn_blocks):
        cls_only = number == last and not conventional
        total = total.plus(_class_attention_block(block, patches, conventional, cls_only))
    tokens = patches + 1 if conventional else 1
    total = total.plus(Operations(layer_norm=tokens * _layer_norm(model.norm)))
    if classifier and isinstance(model.head, nn.Linear):
        total = total.plus(Operations(linear=_size(model.head)))
    return total


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, without BatchNorm's running statistics."""
    return sum(parameter.numel() for parameter in model.parameters())


def first_convolution(model: XCiT, height: int, width: int) -> int:
    """Multiply-adds of the first convolution, whose input (the image) needs no gradient."""
    conv = model.patch_embed.proj[0][0]
    return _halved(height) * _halved(width) * _size(conv)


def position_projection(model: XCiT, height: int, width: int) -> int:
    """Multiply-adds of the position projection, done once per batch in our forward pass.

    Its input, the Fourier features, needs no gradient.
    """
    _, patches = _stem(model, height, width)
    return patches * _size(model.pos_embeder.token_projection)


def _stem(model: XCiT, height: int, width: int) -> tuple[Operations, int]:
    """Return (operations of the patch embedding, number of patch tokens)."""
    total = Operations()
    for layer in model.patch_embed.proj:
        if not isinstance(layer, nn.Sequential):
            continue  # GELU
        conv, norm = layer
        height, width = _halved(height), _halved(width)
        pixels = height * width
        total = total.plus(
            Operations(convolution=pixels * _size(conv), batch_norm=pixels * _batch_norm(norm))
        )
    return total, height * width


def _block(block: nn.Module, patches: int) -> Operations:
    norms = (block.norm1, block.norm2, block.norm3)
    lpi, xca = block.local_mp, block.attn
    return Operations(
        convolution=patches * (_size(lpi.conv1) + _size(lpi.conv2)),
        linear=patches * (_size(xca.qkv) + _size(xca.proj) + _mlp(block.mlp)),
        matmul=patches * _cross_covariance(xca),
        batch_norm=patches * _batch_norm(lpi.bn),
        layer_norm=patches * sum(map(_layer_norm, norms)),
    )


def _cross_covariance(xca: XCA) -> int:
    """Multiply-adds per token of q k^T and attention times v: d/heads x d/heads per head, each."""
    embed_dim = xca.proj.in_features
    return 2 * embed_dim * (embed_dim // xca.num_heads)


def _class_attention_block(
    block: ClassAttentionBlock, patches: int, conventional: bool, cls_only: bool
) -> Operations:
    tokens = patches + 1
    normed_again = tokens if block.tokens_norm and not cls_only else 1
    attention = _class_attention(block.attn, tokens, conventional)
    layer_norm = tokens * _layer_norm(block.norm1) + normed_again * _layer_norm(block.norm2)
    return attention.plus(Operations(linear=_mlp(block.mlp), layer_norm=layer_norm))


def _class_attention(attn: ClassAttention, tokens: int, conventional: bool) -> Operations:
    embed_dim, heads = attn.proj.in_features, attn.num_heads
    projection = _size(attn.qkv) // 3  # q, k and v each
    if conventional:
        linear = (1 + 2 * tokens) * projection + _size(attn.proj)
        return Operations(linear=linear, matmul=2 * tokens * embed_dim)
    # One projection each for q, for the query through the key matrix, and for the mean token of
    # each head through the value matrix. Logits and means cost heads x tokens x d each.
    linear = projection + _size(attn.proj)
    return Operations(linear=linear, matmul=2 * projection + 2 * heads * tokens * embed_dim)


def _mlp(mlp: nn.Module) -> int:
    return _size(mlp.fc1) + _size(mlp.fc2)


def _size(layer: nn.Conv2d | nn.Linear) -> int:
    """Multiply-adds of a linear layer per row, or of a convolution per output pixel."""
    return layer.weight.numel()


def _batch_norm(norm: nn.BatchNorm2d) -> int:
    return 2 * norm.num_features


def _layer_norm(norm: nn.LayerNorm) -> int:
    return 5 * norm.normalized_shape[0]


def _halved(size: int) -> int:
    return (size + 1) // 2
