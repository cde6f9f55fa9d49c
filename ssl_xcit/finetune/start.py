"""What fine-tuning starts from: the network, how its images are normalised, and what was loaded."""

from typing import NamedTuple

import torch

from ssl_xcit.checkpoints.read import read_weights
from ssl_xcit.evaluation.subject import NO_FACTS, statistics
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

    The classifier is new, unless `keep_head`. Raises UserError for a checkpoint that is no XCiT,
    or for other images, or whose classifier was to be kept and has other classes.
    """
    weights = None if config.from_scratch else read_weights(config.init, config.role, config.arch)
    arch = config.arch if weights is None else weights.arch
    torch.manual_seed(config.seed)  # the same initial weights on every rank
    network = build_xcit(
        arch,
        num_classes=num_classes,
        in_chans=in_chans,
        drop_path_rate=config.model.drop_path_rate,
    )
    if weights is None:
        mean, std = statistics(None, in_chans)
        facts = NO_FACTS | {"source": "random_init", "arch": arch, "seed": config.seed}
        report = [f"start: {arch}, random weights of seed {config.seed}"]
    else:
        loaded, new, unused = _load(network, weights.state, weights.info, config.model.keep_head)
        mean, std = statistics(weights.info, in_chans)
        facts = NO_FACTS | {
            "source": "checkpoint",
            "checkpoint": weights.info["path"],
            "step": weights.info["step"],
            "role": weights.info["role"],
            "arch": arch,
            "seed": config.seed,
            "tensors": {"loaded": loaded, "new": new, "unused": unused},
        }
        ignored = weights.info["ignored"]
        report = [
            f"start: {arch}, {weights.info['role']} of {weights.info['path']}: "
            f"{loaded} tensors loaded",
            f"  new, from seed {config.seed}: {', '.join(new) or 'nothing'}",
            f"  there but not used: {', '.join([*unused, *ignored]) or 'nothing'}",
        ]
    if config.views.mean:
        mean, std = config.views.mean, config.views.std
    if len(mean) != in_chans:
        raise UserError(f"the images have {in_chans} channels, mean and std {len(mean)} numbers")
    return Start(arch, network, mean, std, facts, report)


def _load(
    network: XCiT, state: dict[str, torch.Tensor], info: dict, keep_head: bool
) -> tuple[int, list[str], list[str]]:
    """(tensors loaded, names that stay new, names in `state` that are not used)."""
    own = network.state_dict()
    classifier = ("head.weight", "head.bias")
    if keep_head and info["num_classes"] != network.num_classes:
        raise UserError(
            f"keep_head: {info['path']} has a classifier of {info['num_classes']} classes, the "
            f"images have {network.num_classes}: leave --keep_head out for a new one"
        )
    channels = state["patch_embed.proj.0.0.weight"].shape[1]
    if channels != own["patch_embed.proj.0.0.weight"].shape[1]:
        raise UserError(
            f"{info['path']} takes images of {channels} channels, the data have "
            f"{own['patch_embed.proj.0.0.weight'].shape[1]}: write them again with "
            f"--channels {channels}"
        )
    unused = [] if keep_head else [name for name in classifier if name in state]
    taken = {name: tensor for name, tensor in state.items() if name not in unused}
    new = [name for name in own if name not in taken]
    assert new == ([] if keep_head else list(classifier)), new
    network.load_state_dict(own | taken)
    return len(taken), new, unused
