"""What an evaluation is about: a frozen backbone, and everything that says where it is from."""

import json
from pathlib import Path
from typing import NamedTuple

import torch

from ssl_xcit.checkpoints.read import read_backbone
from ssl_xcit.data.pixels import IMAGENET_MEAN, IMAGENET_STD
from ssl_xcit.models.xcit import XCiT, build_xcit
from ssl_xcit.runtime.options import read_tree


class Subject(NamedTuple):
    """A backbone, the statistics it normalises images by, and its origin for the result."""

    backbone: XCiT
    mean: tuple[float, ...]
    std: tuple[float, ...]
    facts: dict[str, str | int | None]  # source, checkpoint, step, role, arch, seed

    @property
    def in_chans(self) -> int:
        """Channels of its images."""
        return self.backbone.patch_embed.proj[0][0].in_channels


NO_FACTS = dict.fromkeys(("source", "checkpoint", "step", "role", "arch", "seed"))


def untrained_subject(arch: str, seed: int, in_chans: int = 3) -> Subject:
    """The network that training with this seed would start from.

    Raises UserError for an unknown architecture.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = build_xcit(arch, num_classes=0, in_chans=in_chans)
    facts = NO_FACTS | {"source": "random_init", "arch": arch, "seed": seed}
    return Subject(backbone, *statistics(None, in_chans), facts)


def checkpoint_subject(checkpoint: str | Path, arch: str = "", role: str = "teacher") -> Subject:
    """The backbone in `checkpoint`: whatever `ssl_xcit.checkpoints.read.read_backbone` reads.

    `arch`, if given, must be what the checkpoint holds. Raises UserError for a checkpoint that is
    no backbone, or another one.
    """
    found, state, info = read_backbone(checkpoint, role, arch)
    in_chans = state["patch_embed.proj.0.0.weight"].shape[1]
    backbone = build_xcit(found, num_classes=0, in_chans=in_chans)
    backbone.load_state_dict(state)
    facts = NO_FACTS | {
        "source": "checkpoint",
        "checkpoint": info["path"],
        "step": info["step"],
        "role": info["role"],
        "arch": found,
    }
    return Subject(backbone, *statistics(info, in_chans), facts)


def statistics(info: dict | None, in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the images that a network was trained with.

    `info` is what `read_weights` says of it (None: it is untrained). Those of its run if it is a
    checkpoint of one, else ImageNet's; one value for all channels where there are not three.
    """
    if info is not None and info["step"] is not None:  # else a single file
        checkpoint = Path(info["path"])
        state = json.loads((checkpoint / "state.json").read_text())
        if "mean" in state:  # a fine-tuning's
            return tuple(state["mean"]), tuple(state["std"])
        described = checkpoint.absolute().parent.parent / "config.yaml"
        if described.exists():
            crops = read_tree(described)["crops"]
            return tuple(crops["mean"]), tuple(crops["std"])
    if in_chans == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    return tuple((sum(values) / 3,) * in_chans for values in (IMAGENET_MEAN, IMAGENET_STD))
