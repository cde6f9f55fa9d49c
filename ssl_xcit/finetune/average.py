"""A moving average of a network's weights, to be evaluated in its place."""

import copy

import torch
from jaxtyping import Bool
from torch import Tensor, nn


class WeightAverage:
    """average = decay average + (1 - decay) weights, once per step; it starts as a copy.

    Parameters and BatchNorm's running statistics alike, as timm's ModelEma; BatchNorm's counters
    are copied. Nothing corrects for the start: after n steps it still holds decay^n of the weights
    that the training began with, so a decay fits runs of several times 1 / (1 - decay) steps.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.network = copy.deepcopy(network).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, network: nn.Module, skip: Bool[Tensor, ""] | None = None) -> None:
        """Move towards `network`, except where `skip` is true; a GPU is not waited for."""
        if skip is not None and skip.device.type == "cpu":
            if skip:
                return
            skip = None
        ours, theirs = self.network.state_dict(), network.state_dict()
        floats = [name for name, tensor in ours.items() if tensor.is_floating_point()]
        if skip is None:
            weight = 1 - self.decay
            torch._foreach_lerp_([ours[n] for n in floats], [theirs[n] for n in floats], weight)
        else:
            steps = torch._foreach_sub([theirs[n] for n in floats], [ours[n] for n in floats])
            torch._foreach_mul_(steps, torch.where(skip, 0.0, 1 - self.decay))
            torch._foreach_add_([ours[n] for n in floats], steps)
        for name in ours.keys() - set(floats):
            ours[name].copy_(
                theirs[name] if skip is None else torch.where(skip, ours[name], theirs[name])
            )
