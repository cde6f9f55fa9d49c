"""The start of fine-tuning: the network, the statistics of its images, and what was loaded."""

from typing import NamedTuple

import torch

from ssl_xcit.checkpoints.formats import CLASSIFIER, StateDict, Statistics
from ssl_xcit.checkpoints.read import Weights, read
from ssl_xcit.data.pixels import imagenet_statistics
from ssl_xcit.evaluation.subject import NO_FACTS, origin
from ssl_xcit.finetune.config import FinetuneConfig
from ssl_xcit.models.xcit import XCiT, build_xcit
from ssl_xcit.runtime.errors import UserError


class Start(NamedTuple):
    """A network to be trained, on the CPU, and its origin."""

    network: XCiT
    statistics: Statistics  # mean and standard deviation of its images
    facts: dict  # as a `Subject`'s, and what was loaded
    report: list[str]  # lines to print


def starting_point(config: FinetuneConfig, num_classes: int, in_chans: int) -> Start:
    """The network that `config` asks for, initialised from config.seed and then from config.init.

    The classifier is new, unless `keep_head`. Raises UserError for a checkpoint that is no XCiT or
    takes other images, and when the classifier to be kept has another number of classes.
    """
    weights = None
    if not config.from_scratch:
        weights = read(config.init, config.role, config.arch, config.prefix)
    arch = config.arch if weights is None else weights.arch
    torch.manual_seed(config.seed)  # the same initial weights on every rank
    network = build_xcit(
        arch,
        num_classes=num_classes,
        in_chans=in_chans,
        drop_path_rate=config.model.drop_path_rate,
    )
    if weights is None:
        statistics = imagenet_statistics(in_chans)
        facts = NO_FACTS | {"source": "random_init", "arch": arch, "seed": config.seed}
        report = [f"start: {arch}, random weights of seed {config.seed}"]
    else:
        taken = _taken(weights, config.model.keep_head, num_classes, in_chans)
        network.load_state_dict(network.state_dict() | taken)
        new = [name for name in CLASSIFIER if name not in taken]
        unused = [name for name in new if name in weights.state]
        statistics = weights.statistics
        tensors = {"loaded": len(taken), "new": new, "unused": unused}
        facts = origin(weights) | {"seed": config.seed, "tensors": tensors}
        left = ", ".join([*unused, *weights.ignored])
        report = [
            f"start: {arch}, {weights.role} of {weights.path}: {len(taken)} tensors loaded",
            f"  new, from seed {config.seed}: {', '.join(new) or 'nothing'}",
            f"  there but not used: {left or 'nothing'}",
        ]
        if weights.statistics_assumed and not config.views.mean:
            report.append("  mean and std: ImageNet's, since the file states none")
    if config.views.mean:
        statistics = config.views.mean, config.views.std
    if (count := len(statistics[0])) != in_chans:
        raise UserError(f"the images have {in_chans} channels, mean and std {count} numbers")
    return Start(network, statistics, facts, report)


def _taken(weights: Weights, keep_head: bool, num_classes: int, in_chans: int) -> StateDict:
    if keep_head and weights.num_classes != num_classes:
        raise UserError(
            f"keep_head: {weights.path} has a classifier of {weights.num_classes} classes, the "
            f"images have {num_classes}: leave --keep_head out for a new one"
        )
    if weights.in_chans != in_chans:
        raise UserError(
            f"{weights.path} takes images of {weights.in_chans} channels, the data have "
            f"{in_chans}: write them again with --channels {weights.in_chans}"
        )
    return weights.state if keep_head else weights.backbone
