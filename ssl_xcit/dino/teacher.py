"""The EMA update of the teacher."""

import torch
from jaxtyping import Bool
from torch import Tensor, nn


@torch.no_grad()
def update_teacher(
    student: nn.Module, teacher: nn.Module, momentum: float, skip: Bool[Tensor, ""] | None = None
) -> None:
    """Set teacher = momentum teacher + (1 - momentum) student for all parameters, in place.

    Buffers are not updated, as in DINO: the teacher runs in train mode, normalises with its own
    batches and keeps its own BatchNorm statistics, of global views only. Nothing changes if `skip`
    is true; on a GPU this needs no synchronisation.
    """
    ours, theirs = list(teacher.parameters()), list(student.parameters())
    assert len(ours) == len(theirs)
    if skip is None or skip.device.type == "cpu":
        if skip is None or not skip:
            torch._foreach_lerp_(ours, theirs, 1 - momentum)
        return
    steps = torch._foreach_sub(theirs, ours)
    torch._foreach_mul_(steps, torch.where(skip, 0.0, 1 - momentum))
    torch._foreach_add_(ours, steps)
