"""Class attention (CaiT, arXiv:2103.17239)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ssl_xcit.models.layers import MLP


class ClassAttention(nn.Module):
    """Attention whose only query is the cls token (CaiT, section 3.2); softmax in float32 or more.

    With a single query per head there is no need to project every token to a key and a value.
    Projecting the query through the key matrix, and the weighted mean of the tokens through the
    value matrix, gives the same result without an n x d x d product:

        q^T (W_k x_n + b_k)       = (W_k^T q)^T x_n + constant
        sum_n a_n (W_v x_n + b_v) = W_v (sum_n a_n x_n) + b_v

    The constant is the only effect of b_k and cancels in the softmax, so it is omitted. b_k stays
    as an unused third of `qkv.bias`, because the official checkpoints contain it.
    """

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def attention(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b heads n"]:
        """Attention weights of the cls token (the first token) over all tokens; rows sum to 1."""
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
    """Class attention and MLP for the cls token, with the official code's effect on patch tokens.

    There the patch tokens get gamma1 * norm1(x) as a residual, are normalised by norm2 if
    `tokens_norm`, and are doubled by the last residual. The trained weights depend on this.
    """

    def __init__(self, embed_dim: int, num_heads: int, eta: float, tokens_norm: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(embed_dim, eps=1e-6) for _ in range(2))
        self.gamma1, self.gamma2 = (nn.Parameter(torch.full((embed_dim,), eta)) for _ in range(2))
        self.attn = ClassAttention(embed_dim, num_heads)
        self.mlp = MLP(embed_dim)
        self.tokens_norm = tokens_norm

    def normalise(
        self, cls: Float[Tensor, "b d"], patches: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b n+1 d"]:
        """Return the attention's input: norm1 of the cls token, then of the patch tokens."""
        return self.norm1(torch.cat((cls[:, None], patches), dim=1))

    def forward(
        self, cls: Float[Tensor, "b d"], patches: Float[Tensor, "b n d"], cls_only: bool = False
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b n d"]]:
        """Return the new cls and patch tokens; `cls_only` returns the patch tokens unchanged."""
        normed = self.normalise(cls, patches)
        cls = self.norm2(cls + self.gamma1 * self.attn(normed))
        cls = cls + self.gamma2 * self.mlp(cls)
        if not cls_only:
            patches = patches + self.gamma1 * normed[:, 1:]
            patches = 2 * (self.norm2(patches) if self.tokens_norm else patches)
        return cls, patches
