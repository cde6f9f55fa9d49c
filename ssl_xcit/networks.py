"""The networks of a pretraining, as its configuration says."""

from ssl_xcit.config import TrainConfig
from ssl_xcit.dino import DINOHead, MultiCropWrapper
from ssl_xcit.xcit import build_xcit


def dino_network(config: TrainConfig) -> MultiCropWrapper:
    """Backbone and head, freshly initialised from torch's generator, in training mode."""
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
