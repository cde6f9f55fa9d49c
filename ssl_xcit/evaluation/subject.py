"""The subject of an evaluation: a frozen backbone and its origin."""

from pathlib import Path
from typing import NamedTuple

import torch

from ssl_xcit.checkpoints.read import Weights, read
from ssl_xcit.data.pixels import imagenet_statistics
from ssl_xcit.models.xcit import XCiT, build_xcit


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
    """The network from which training with this seed would start.

    Raises UserError for an unknown architecture.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = build_xcit(arch, num_classes=0, in_chans=in_chans)
    facts = NO_FACTS | {"source": "random_init", "arch": arch, "seed": seed}
    return Subject(backbone, *imagenet_statistics(in_chans), facts)


def checkpoint_subject(
    checkpoint: str | Path, arch: str = "", role: str = "teacher", prefix: str = ""
) -> Subject:
    """The backbone in `checkpoint`: whatever `ssl_xcit.checkpoints.read.read` reads.

    `arch`, if given, must be what the checkpoint holds. `prefix`: see `read`. Raises UserError for
    a checkpoint that is no backbone, or another one.
    """
    weights = read(checkpoint, role, arch, prefix)
    return Subject(weights.build(classifier=False), *weights.statistics, origin(weights))


def origin(weights: Weights) -> dict[str, str | int | None]:
    """The facts of a `Subject` that was read from a file.

    "statistics": whether the file says by which mean and std its images are normalised. "prefix":
    what was asked for, and absent where nothing was.
    """
    return NO_FACTS | {
        "source": "checkpoint",
        "checkpoint": weights.path,
        "step": weights.step,
        "role": weights.role,
        "arch": weights.arch,
        "statistics": "assumed" if weights.statistics_assumed else "known",
        **({"prefix": weights.prefix} if weights.prefix else {}),
    }
