"""The projection head."""

import itertools

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ssl_xcit.operators.linear import Linear, initialise
from ssl_xcit.operators.prototypes import WeightNormLinear


class DINOHead(nn.Module):
    """Projection head: an MLP to `bottleneck_dim`, L2 normalisation, weight-normed prototypes.

    The MLP has `nlayers` Linear layers of width `hidden_dim`; all but the last are followed by
    BatchNorm1d (if `use_bn`) and GELU. With `nlayers` = 1, `mlp` is a single Linear. With
    `norm_last_layer` the norms `weight_g` of the prototypes stay 1; otherwise they are trained,
    which is better but less stable. Keys: `mlp.{0,2,4}` (`mlp.{0,3,6}` with BatchNorm),
    `last_layer.weight_{g,v}`.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ) -> None:
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (nlayers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths[:-1]):
            norm = [nn.BatchNorm1d(after)] if use_bn else []
            layers += [Linear(before, after), *norm, nn.GELU()]
        last = Linear(widths[-2], bottleneck_dim)
        self.mlp = nn.Sequential(*layers, last) if layers else last
        initialise(self.mlp)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, not norm_last_layer)

    def forward(self, x: Float[Tensor, "b d"], frozen: bool = False) -> Float[Tensor, "b k"]:
        """Return the logits of the prototypes; `frozen`: compute no gradient for the prototypes."""
        x = self.mlp(x)
        # At least float32: half precision would round the unit sphere coarsely.
        x = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
        return self.last_layer(x, frozen)
