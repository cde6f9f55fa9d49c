"""DINO's Algorithm 1 for one micro-batch: the teacher's targets and the student's loss.

These functions have no state and update no weights. `update_teacher` (teacher.py) and
`DINOLoss.update_center` (loss.py) do that, once per step.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssl_xcit.dino.health import batch_means
from ssl_xcit.dino.loss import DINOLoss
from ssl_xcit.dino.networks import MultiCropWrapper
from ssl_xcit.runtime.precision import autocast
from ssl_xcit.training.task import keep_gradients


class Targets(NamedTuple):
    """The teacher's outputs for the global views, view by view."""

    features: Float[Tensor, "tn d"]  # of the backbone
    logits: Float[Tensor, "tn k"]


class Views(NamedTuple):
    """The views that go through the student in one pass."""

    crops: list[Float[Tensor, "_v n c _h _w"]]  # one tensor per crop size
    keys: list[Int[Tensor, "_v n"]] | None  # random streams of drop path
    numbers: range  # 0 and 1 are the global views
    total: int  # views per image, over all passes


class Settings(NamedTuple):
    """Settings of a micro-batch."""

    teacher_temp: float
    precision: str = "fp32"
    last_layer_frozen: bool = False
    crops_in_turn: bool = False


class MicroBatch(NamedTuple):
    """The results of a micro-batch."""

    loss: Float[Tensor, ""]  # the caller runs the last pass's backward
    teacher_mean: Float[Tensor, " k"]  # of the teacher's logits, for the centre
    health: Float[Tensor, " means"] | None  # see `batch_means`


@torch.no_grad()
def teacher_step(
    teacher: MultiCropWrapper, global_crops: Float[Tensor, "2 n c h w"], precision: str = "fp32"
) -> Targets:
    """Run the teacher on both global views."""
    with autocast(global_crops.device, precision):
        features = teacher.backbone(global_crops.flatten(0, 1))
        return Targets(features, teacher.head(features))


def student_step(
    student: nn.Module, views: Views, targets: Targets, dino_loss: DINOLoss, settings: Settings
) -> tuple[Float[Tensor, ""], Float[Tensor, "vn k"]]:
    """Run the student; return (the part of the loss due to these views, the detached logits)."""
    with autocast(targets.logits.device, settings.precision):
        logits = student(views.crops, views.keys, settings.last_layer_frozen)
        loss = dino_loss(logits, targets.logits, settings.teacher_temp, views.numbers, views.total)
    return loss, logits.detach()


def micro_batch(
    student: nn.Module,
    teacher: MultiCropWrapper,
    dino_loss: DINOLoss,
    crops: list[Float[Tensor, "_v n c _h _w"]],
    keys: list[Int[Tensor, "_v n"]] | None,
    settings: Settings,
    backward: Callable[[Float[Tensor, ""]], None] = Tensor.backward,
    with_health: bool = False,
) -> MicroBatch:
    """Run teacher and student on the views of n images, global views first.

    With `crops_in_turn` the student processes one crop size at a time. `backward` is called on the
    loss of each size but the last, which frees that pass's activations before the next pass. These
    gradients stay on their rank; the caller's last backward pass reduces them over ranks.
    """
    targets = teacher_step(teacher, crops[0], settings.precision)
    *early, last = split_views(crops, keys, settings.crops_in_turn)
    losses, student_logits = [], []
    for views in early:
        with keep_gradients(student):
            loss, logits = student_step(student, views, targets, dino_loss, settings)
            backward(loss)
        losses.append(loss.detach())
        student_logits.append(logits)
    loss, logits = student_step(student, last, targets, dino_loss, settings)
    loss = sum(losses, loss)
    student_logits.append(logits)
    health = None
    if with_health:
        n, temperatures = crops[0].shape[1], (dino_loss.student_temp, settings.teacher_temp)
        by_view = [view for logits in student_logits for view in logits.split(n)]
        health = batch_means(
            loss, by_view, targets.logits.split(n), targets.features, dino_loss.center, temperatures
        )
    return MicroBatch(loss, targets.logits.mean(0), health)


def split_views(
    crops: list[Float[Tensor, "_v n c _h _w"]],
    keys: list[Int[Tensor, "_v n"]] | None,
    in_turn: bool,
) -> list[Views]:
    """Split the views into the student's passes: one per crop size if `in_turn`, else one."""
    total = sum(map(len, crops))
    if not in_turn:
        return [Views(crops, keys, range(total), total)]
    passes, first = [], 0
    for i, crop in enumerate(crops):
        streams = None if keys is None else [keys[i]]
        passes.append(Views([crop], streams, range(first, first + len(crop)), total))
        first += len(crop)
    return passes
