"""The networks of a pretraining run."""

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor, nn

from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.dino.head import DINOHead
from ssl_xcit.models.xcit import build_xcit


class MultiCropWrapper(nn.Module):
    """Applies backbone and head to views of several resolutions."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(
        self,
        crops: Sequence[Float[Tensor, "_v n c _h _w"]],
        keys: Sequence[Int[Tensor, "_v n"]] | None = None,
        last_layer_frozen: bool = False,
    ) -> Float[Tensor, "m k"]:
        """Return the logits of all views: the n samples of view 0, then those of view 1, ...

        Each entry of `crops` holds the views of one resolution. The backbone gets all of them in
        one call, as a list of image batches, and the head gets all views at once. `keys` are the
        random streams of drop path, one per view and sample; without them the backbone draws from
        torch's generator. `last_layer_frozen`: compute no gradient for the prototypes.
        """
        images = [views.flatten(0, 1) for views in crops]  # (v n, c, h, w)
        streams = None if keys is None else [of_size.flatten() for of_size in keys]
        features = self.backbone(images, streams)
        return self.head(features, frozen=True) if last_layer_frozen else self.head(features)


def dino_network(config: TrainConfig) -> MultiCropWrapper:
    """Build backbone and head, initialised from torch's generator, in training mode."""
    backbone = build_xcit(
        config.arch,
        num_classes=0,
        in_chans=config.model.in_chans,
        drop_path_rate=config.model.drop_path_rate,
    )
    head = DINOHead(
        backbone.embed_dim,
        config.head.out_dim,
        use_bn=config.head.use_bn_in_head,
        norm_last_layer=config.head.norm_last_layer,
        nlayers=config.head.head_layers,
        hidden_dim=config.head.head_hidden_dim,
        bottleneck_dim=config.head.head_bottleneck_dim,
    )
    return MultiCropWrapper(backbone, head).train()
