"""Bad steps: a loss or gradient that is not finite must leave no trace, and must not cost a wait.

Everything stays on the device: the optimiser skips the step by a flag (`found_inf`, torch's fused
optimisers know it), BatchNorm's statistics are put back, and the host reads one step later how many
steps in a row were bad.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


class BatchStatistics:
    """BatchNorm's buffers as they were before a step, to be put back if the step was bad."""

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
        """Before the step."""
        self._before = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def restore(self, bad: Bool[Tensor, ""]) -> None:
        """After the step: as remembered where `bad` is true."""
        if bad.device.type == "cpu" and not bad:
            return
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(torch.where(bad, before, buffer))


class HostCopy:
    """A few numbers of the device that the host reads one step later, when they have long arrived.

    Nothing is waited for: the copy is ordered behind the step's work, and read after the next step
    has been queued.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._host = torch.zeros(size, pin_memory=cuda)
        self._arrived = torch.cuda.Event() if cuda else None

    def exchange(self, values: Float[Tensor, " n"]) -> list[float]:
        """Those of the step before; at first zeros."""
        if self._arrived is not None:
            self._arrived.synchronize()
        earlier = self._host.tolist()
        self._host.copy_(values, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()
        return earlier
