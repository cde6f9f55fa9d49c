"""Learning rate, weight decay, teacher momentum and teacher temperature as functions of the step.

They have no state, so a resumed run needs no replay. The values equal the tables of
`cosine_scheduler` and `DINOLoss` in facebookresearch/dino.
"""

import math


def cosine(
    step: int,
    base: float,
    final: float,
    total_steps: int,
    warmup_steps: int = 0,
    start: float = 0.0,
) -> float:
    """Value at `step` (from 0) of a linear warm-up from `start` to `base`, then a half cosine.

    With W = min(warmup_steps, total_steps) and N = total_steps - W:

        step < W:   start + (base - start) step / (W - 1)       (`start` if W is 1)
        step >= W:  final + (base - final) (1 + cos(pi (step - W) / N)) / 2

    The warm-up includes both ends: the first value is exactly `start`, `base` occurs twice, at
    W - 1 and at W, and the cosine stops one step short of `final`. A warm-up as long as the run or
    longer is shortened to the run: it rises faster, reaches `base` at the last step, and no cosine
    follows (upstream raises an AssertionError if it is longer).
    """
    assert 0 <= step < total_steps, f"step {step} is outside the run of {total_steps} steps"
    warmup = min(warmup_steps, total_steps)
    if step < warmup:
        return _ramp(step, start, base, warmup)
    progress = math.pi * (step - warmup) / (total_steps - warmup)
    return final + 0.5 * (base - final) * (1 + math.cos(progress))


def teacher_temp(
    epoch: int, warmup_temp: float, temp: float, warmup_epochs: int, epochs: int
) -> float:
    """Teacher temperature in `epoch` (from 0): linear from `warmup_temp` to `temp`, then `temp`.

    It is constant within an epoch. The ramp includes both ends: epoch 0 has `warmup_temp`, and
    epoch warmup_epochs - 1 already has `temp` (a single warm-up epoch has `warmup_temp`). A warm-up
    longer than the run of `epochs` is shortened to it and reaches `temp` in the last epoch.
    Upstream's `DINOLoss.teacher_temp_schedule` is the same table, but fails if it is longer.
    """
    warmup = min(warmup_epochs, epochs)
    return _ramp(epoch, warmup_temp, temp, warmup) if epoch < warmup else temp


def scaled_lr(lr: float, global_batch: int) -> float:
    """Peak learning rate for a global batch, scaled linearly from `lr`, which is for 256 images.

    The global batch includes all ranks and accumulated micro-batches. `min_lr` is not scaled.
    """
    return lr * global_batch / 256


def _ramp(index: int, start: float, stop: float, count: int) -> float:
    """Element `index` of numpy's linspace(start, stop, count), with the same rounding."""
    if index == 0:
        return start
    if index == count - 1:
        return stop
    return index * ((stop - start) / (count - 1)) + start
