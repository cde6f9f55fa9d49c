"""Cost of a pretraining on a given machine: operations, memory, steps and hours.

Here a FLOP is the hardware's: a multiply-add is two. The backward pass repeats each product of the
forward pass twice, for the gradient of either factor, except that nothing needs the gradient of the
images or of the fixed Fourier features. With activation checkpointing it repeats the backbone's
forward pass, too. Drop path is not counted: at its rate,
samples are left out of XCA and MLP.
"""

from typing import NamedTuple

import torch

from ssl_xcit.dino.config import PlanConfig, TrainConfig
from ssl_xcit.dino.head import DINOHead
from ssl_xcit.dino.memory import TrainingMemory, crop_groups, training_memory
from ssl_xcit.dino.networks import dino_network
from ssl_xcit.models.flops import (
    count_operations,
    count_parameters,
    first_convolution,
    position_projection,
)
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.runtime.precision import planned


class StepFlops(NamedTuple):
    """FLOPs of one optimiser step on one rank, all its micro-batches together."""

    teacher: int
    student_forward: int
    student_backward: int

    @property
    def total(self) -> int:
        """Of the whole step; loss, optimiser and everything else between the products are free."""
        return sum(self)


class Plan(NamedTuple):
    """What a pretraining costs."""

    backbone_parameters: int
    head_parameters: int
    flops: StepFlops
    memory: TrainingMemory
    global_batch: int
    steps_per_epoch: int
    steps: int
    images_per_second: float  # over all ranks
    hours: float


def plan_training(config: PlanConfig) -> Plan:
    """The cost of training as `config` says.

    Raises UserError when there are fewer images than a step takes.
    """
    optim = config.optim
    global_batch = optim.batch_size_per_gpu * optim.accumulation_steps * config.gpus
    steps_per_epoch = config.images // global_batch  # a rest is left for the next epoch's order
    if steps_per_epoch == 0:
        raise UserError(
            f"a step takes {global_batch:,} images, there are {config.images:,}: lower "
            "--batch_size_per_gpu, --accumulation_steps or --gpus"
        )
    steps = steps_per_epoch * optim.epochs
    flops = step_flops(config)
    seconds = flops.total / (config.tflops * 1e12 * config.utilisation)  # of a step
    with torch.device("meta"):
        network = dino_network(config)
    return Plan(
        backbone_parameters=count_parameters(network.backbone),
        head_parameters=count_parameters(network.head),
        flops=flops,
        memory=training_memory(config, config.gpus, cuda=config.run.device != "cpu"),
        global_batch=global_batch,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        images_per_second=global_batch / seconds,
        hours=steps * seconds / 3600,
    )


def step_flops(config: TrainConfig) -> StepFlops:
    """FLOPs of one step of one rank: teacher on the global views, student on all, head included."""
    with torch.device("meta"):
        network = dino_network(config)
    backbone, head = network.backbone, head_multiply_adds(network.head)
    n, accumulation = config.optim.batch_size_per_gpu, config.optim.accumulation_steps
    passes = [_forward(backbone, n * views, side, head) for views, side in crop_groups(config)]
    forward = sum(multiply_adds for multiply_adds, _ in passes)
    backward = sum(2 * multiply_adds - skipped for multiply_adds, skipped in passes)
    if config.run.activation_checkpointing:
        backward += sum(n * v * _repeated(backbone, side) for v, side in crop_groups(config))
    teacher = passes[0][0]
    return StepFlops(*(2 * accumulation * part for part in (teacher, forward, backward)))


def head_multiply_adds(head: DINOHead) -> int:
    """Multiply-adds of the projection head for one view: every weight matrix once."""
    matrices = [p for p in head.parameters() if p.ndim == 2 and p.shape[1] > 1]  # weight_g is none
    return sum(matrix.numel() for matrix in matrices)


def _forward(backbone: XCiT, views: int, side: int, head: int) -> tuple[int, int]:
    """Multiply-adds of one pass of backbone and head, and those that its gradient spares."""
    positions = position_projection(backbone, side, side)  # once for the whole batch
    per_view = count_operations(backbone, side, side, conventional=False).multiply_adds - positions
    spared = views * first_convolution(backbone, side, side) + positions
    return views * (per_view + head) + positions, spared


def _repeated(backbone: XCiT, side: int) -> int:
    """Multiply-adds for one view of what activation checkpointing computes a second time."""
    per_view = count_operations(backbone, side, side, conventional=False).multiply_adds
    return per_view - position_projection(backbone, side, side)


def print_plan(config: PlanConfig) -> None:
    """The plan as text."""
    print(describe_plan(config, plan_training(config)))


def describe_plan(config: PlanConfig, plan: Plan) -> str:
    """The plan in words, a line for each thing."""
    optim, crops, memory, flops = config.optim, config.crops, plan.memory, plan.flops
    per_image = flops.total / (optim.batch_size_per_gpu * optim.accumulation_steps)
    moments = "moments" if optim.optimizer == "adamw" else "moment"
    resident = [
        ("student", memory.student),
        ("teacher", memory.teacher),
        (f"{optim.optimizer}'s {moments}", memory.optimizer),
        ("centre, images", memory.centre + memory.images),
        ("gradients that stay", memory.gradients),
    ]
    lines = [
        f"{config.arch}: {plan.backbone_parameters / 1e6:.2f} M parameters, head of "
        f"{config.head.out_dim:,} prototypes {plan.head_parameters / 1e6:.2f} M",
        f"{config.gpus} GPUs x {optim.batch_size_per_gpu} images x {optim.accumulation_steps} = "
        f"{plan.global_batch:,} images a step, 2 views of {crops.global_crops_size} and "
        f"{crops.local_crops_number} of {crops.local_crops_size} pixels each, "
        f"{planned(config.run.precision, config.run.device != 'cpu')}",
        "",
        "FLOPs of a step, on each GPU (a multiply-add is 2)",
        *(
            f"  {name:<28}{value / 1e12:>10.3f} T"
            for name, value in (
                ("teacher, forward", flops.teacher),
                ("student, forward", flops.student_forward),
                ("student, backward", flops.student_backward),
                ("together", flops.total),
            )
        ),
        f"  {'for each image':<28}{per_image / 1e9:>10.1f} G",
        "",
        "memory, on each GPU",
        *(f"  {name:<28}{_megabytes(value)}" for name, value in resident if value),
        f"  {'activations and their gradients':<32}{_megabytes(memory.passes, 8)}",
        f"  {'at the peak':<28}{_megabytes(memory.peak)}",
        "  besides: CUDA itself, NCCL, scratch memory of operators, gaps between allocations",
        "",
        f"{optim.epochs} epochs x {plan.steps_per_epoch:,} steps = {plan.steps:,} steps of "
        f"{config.images:,} images an epoch",
        f"at {config.utilisation:.0%} of {config.tflops:g} TFLOP/s: {plan.images_per_second:,.0f} "
        f"images/s, {plan.hours:,.1f} hours, {config.gpus * plan.hours:,.0f} GPU hours",
        "the utilisation is what you assume; the training's log tells the true images/s",
    ]
    return "\n".join(lines)


def _megabytes(size: int, width: int = 12) -> str:
    return f"{size / 1e6:>{width},.1f} MB"
