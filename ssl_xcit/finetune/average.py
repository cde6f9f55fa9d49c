"""A moving average of the weights, evaluated in their place."""

import copy

import torch
from jaxtyping import Bool
from torch import Tensor, nn


class WeightAverage:
    """average = decay average + (1 - decay) weights, once per step; it starts as a copy.

    It covers parameters and BatchNorm's running statistics, as timm's ModelEma does; BatchNorm's
    counters are copied. The start is not corrected for: after n steps decay^n of the initial
    weights remain, so a run should take several times 1 / (1 - decay) steps.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.network = copy.deepcopy(network).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, network: nn.Module, skip: Bool[Tensor, ""]) -> None:
        """Move towards `network`, unless `skip` is true; does not wait for a GPU."""
        ours, theirs = self.network.state_dict(), network.state_dict()
        floats = [name for name, tensor in ours.items() if tensor.is_floating_point()]
        averages, weights = ([state[name] for name in floats] for state in (ours, theirs))
        if skip.device.type != "cpu":
            steps = torch._foreach_sub(weights, averages)
            torch._foreach_mul_(steps, torch.where(skip, 0.0, 1 - self.decay))
            torch._foreach_add_(averages, steps)
        elif not skip:
            torch._foreach_lerp_(averages, weights, 1 - self.decay)
        for name in ours.keys() - set(floats):
            ours[name].copy_(torch.where(skip, ours[name], theirs[name]))
