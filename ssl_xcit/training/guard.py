"""Bad steps: a non-finite loss or gradient must change nothing, without waiting for the device.

Everything stays on the device: a flag makes the optimiser skip the step (`found_inf` of torch's
fused optimisers), BatchNorm's statistics are restored, and the host reads the number of consecutive
bad steps one step later.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


class BatchStatistics:
    """Copies of BatchNorm's buffers from before a step, restored if the step was bad."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._buffers = [
            buffer
            for module in modules
            for part in module.modules()
            if isinstance(part, nn.modules.batchnorm._BatchNorm)
            for buffer in part.buffers(recurse=False)
        ]
        self._before: list[Tensor] = []

    def remember(self) -> None:
        """Copy the buffers, before the step."""
        self._before = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def restore(self, bad: Bool[Tensor, ""]) -> None:
        """Restore the buffers if `bad` is true, after the step."""
        if bad.device.type == "cpu" and not bad:
            return
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(torch.where(bad, before, buffer))


class HostCopy:
    """A few numbers copied from the device, which the host reads one step later.

    The host hardly waits: the copy is queued behind the step's work and read after the next step
    has been queued.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._host = torch.zeros(size, pin_memory=cuda)
        self._arrived = torch.cuda.Event() if cuda else None

    def exchange(self, values: Float[Tensor, " n"]) -> list[float]:
        """Queue a copy of `values`; return those of the previous step (zeros at first)."""
        if self._arrived is not None:
            self._arrived.synchronize()
        earlier = self._host.tolist()
        self._host.copy_(values, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()
        return earlier
