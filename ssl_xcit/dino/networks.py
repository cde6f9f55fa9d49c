"""The networks of a pretraining, as its configuration says."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn

from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.dino.head import DINOHead
from ssl_xcit.models.xcit import build_xcit


class MultiCropWrapper(nn.Module):
    """Backbone and head over views of several resolutions."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(
        self,
        crops: Sequence[Float[Tensor, "_v n c _h _w"]],
        keys: Sequence[Int[Tensor, "_v n"]] | None = None,
        unit_vectors: bool = False,
    ) -> Float[Tensor, "m k"]:
        """Logits of all views, view by view: the n samples of view 0, then those of view 1, ...

        Each entry of `crops` holds the views of one resolution. The backbone gets all of them in
        one call, as a list of batches of images, and the head sees all views at once. An entry
        without views (no local crops) is skipped. `keys` are the random streams of the samples'
        drop path, one per view and sample; without them the backbone draws from torch's generator.
        With `unit_vectors` the head stops before its prototypes.
        """
        images = [views.flatten(0, 1) for views in crops if len(views)]  # (v n, c, h, w)
        extra = {}
        if keys is not None:
            pairs = zip(crops, keys, strict=True)
            extra = {"keys": [streams.flatten() for views, streams in pairs if len(views)]}
        head = self.head.unit_vectors if unit_vectors else self.head
        return head(self.backbone(images, **extra))


class Part(NamedTuple):
    """The views that the student sees in one pass."""

    crops: list[Float[Tensor, "_v n c _h _w"]]
    keys: list[Int[Tensor, "_v n"]] | None  # of drop path
    views: range  # their numbers
    total: int  # views of a sample, those of other parts included


def split_crops(
    crops: list[Float[Tensor, "_v n c _h _w"]],
    keys: list[Int[Tensor, "_v n"]] | None,
    in_turn: bool,
) -> list[Part]:
    """The student's passes, in order: a size at a time if `in_turn`, else all at once."""
    total = sum(map(len, crops))
    if not in_turn:
        return [Part(crops, keys, range(total), total)]
    parts, first = [], 0
    for i, crop in enumerate(crops):
        streams = None if keys is None else [keys[i]]
        parts.append(Part([crop], streams, range(first, first + len(crop)), total))
        first += len(crop)
    return parts


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
