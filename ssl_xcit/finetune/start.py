"""The start of fine-tuning: the network, the statistics of its images, and what was loaded."""

from typing import NamedTuple

import torch

from ssl_xcit.checkpoints.formats import CLASSIFIER
from ssl_xcit.checkpoints.read import Weights, read
from ssl_xcit.data.pixels import imagenet_statistics
from ssl_xcit.evaluation.subject import NO_FACTS, origin
from ssl_xcit.finetune.config import FinetuneConfig
from ssl_xcit.models.xcit import XCiT, build_xcit
from ssl_xcit.runtime.errors import UserError


class Start(NamedTuple):
    """A network to be trained, on the CPU, and its origin."""

    arch: str
    network: XCiT
    mean: tuple[float, ...]
    std: tuple[float, ...]
    facts: dict  # as a `Subject`'s, and what was loaded
    report: list[str]  # lines to print


def starting_point(config: FinetuneConfig, num_classes: int, in_chans: int) -> Start:
    """The network that `config` asks for, initialised from config.seed and then from config.init.

    The classifier is new, unless `keep_head`. Raises UserError for a checkpoint that is no XCiT or
    takes other images, and when the classifier to be kept has another number of classes.
    """
    weights = None if config.from_scratch else read(config.init, config.role, config.arch)
    arch = config.arch if weights is None else weights.arch
    torch.manual_seed(config.seed)  # the same initial weights on every rank
    network = build_xcit(
        arch,
        num_classes=num_classes,
        in_chans=in_chans,
        drop_path_rate=config.model.drop_path_rate,
    )
    if weights is None:
        mean, std = imagenet_statistics(in_chans)
        facts = NO_FACTS | {"source": "random_init", "arch": arch, "seed": config.seed}
        report = [f"start: {arch}, random weights of seed {config.seed}"]
    else:
        loaded, new, unused = _load(network, weights, config.model.keep_head)
        mean, std = weights.statistics
        tensors = {"loaded": loaded, "new": new, "unused": unused}
        facts = origin(weights) | {"seed": config.seed, "tensors": tensors}
        left = ", ".join([*unused, *weights.ignored])
        report = [
            f"start: {arch}, {weights.role} of {weights.path}: {loaded} tensors loaded",
            f"  new, from seed {config.seed}: {', '.join(new) or 'nothing'}",
            f"  there but not used: {left or 'nothing'}",
        ]
    if config.views.mean:
        mean, std = config.views.mean, config.views.std
    if len(mean) != in_chans:
        raise UserError(f"the images have {in_chans} channels, mean and std {len(mean)} numbers")
    return Start(arch, network, mean, std, facts, report)


def _load(network: XCiT, weights: Weights, keep_head: bool) -> tuple[int, list[str], list[str]]:
    """(tensors loaded, names that stay new, names in the file that are not used)."""
    own = network.state_dict()
    if keep_head and weights.num_classes != network.num_classes:
        raise UserError(
            f"keep_head: {weights.path} has a classifier of {weights.num_classes} classes, the "
            f"images have {network.num_classes}: leave --keep_head out for a new one"
        )
    channels = own["patch_embed.proj.0.0.weight"].shape[1]
    if weights.in_chans != channels:
        raise UserError(
            f"{weights.path} takes images of {weights.in_chans} channels, the data have "
            f"{channels}: write them again with --channels {weights.in_chans}"
        )
    taken = weights.state if keep_head else weights.backbone
    unused = [name for name in CLASSIFIER if name in weights.state.keys() - taken.keys()]
    new = [name for name in own if name not in taken]
    assert new == ([] if keep_head else list(CLASSIFIER)), new
    network.load_state_dict(own | taken)
    return len(taken), new, unused
