"""Cost of a pretraining run on a given machine: FLOPs, memory, steps and hours.

A multiply-add counts as two FLOPs. The backward pass costs each product of the forward pass twice,
once for the gradient of each factor, except that images and Fourier features need no gradient.
Activation checkpointing adds the backbone's forward pass. Drop path, which skips XCA and MLP for
some samples, is not counted.
"""

from typing import NamedTuple

import torch

from ssl_xcit.dino.config import PlanConfig, TrainConfig
from ssl_xcit.dino.memory import TrainingMemory, crop_groups, training_memory
from ssl_xcit.dino.networks import dino_network
from ssl_xcit.models.flops import count_parameters, forward_flops
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.runtime.precision import planned


class StepFlops(NamedTuple):
    """FLOPs of one optimiser step on one rank, over all its micro-batches."""

    teacher: int
    student_forward: int
    student_backward: int

    @property
    def total(self) -> int:
        """Of the step; everything but matrix products and convolutions counts as free."""
        return sum(self)


class Plan(NamedTuple):
    """Cost of a pretraining run."""

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
    """The cost of a training.

    Raises UserError if an epoch has fewer images than a step takes.
    """
    optim = config.optim
    global_batch = optim.batch_size_per_gpu * optim.accumulation_steps * config.gpus
    steps_per_epoch = config.images // global_batch  # the rest is dropped
    if steps_per_epoch == 0:
        raise UserError(
            f"a step takes {global_batch:,} images, an epoch has {config.images:,}: lower "
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
    """FLOPs of a step on one rank: teacher on the global views, student on all, with the head."""
    n, accumulation = config.optim.batch_size_per_gpu, config.optim.accumulation_steps
    forward, backward = [], 0
    with torch.device("meta"):
        network = dino_network(config).eval()
        for views, side in crop_groups(config):
            crop = torch.empty(views, n, config.model.in_chans, side, side)
            found = forward_flops(network, [crop])
            positions = found["MultiCropWrapper.backbone.pos_embeder"]
            stem = found["MultiCropWrapper.backbone.patch_embed.proj.0.0"]
            forward.append(found["Global"])
            backward += 2 * found["Global"] - stem - positions
            if config.run.activation_checkpointing:
                backward += found["MultiCropWrapper.backbone"] - positions
    return StepFlops(*(accumulation * part for part in (forward[0], sum(forward), backward)))


def print_plan(config: PlanConfig) -> None:
    """Print the plan."""
    print(describe_plan(config, plan_training(config)))


def describe_plan(config: PlanConfig, plan: Plan) -> str:
    """The plan as lines of text."""
    optim, crops, memory, flops = config.optim, config.crops, plan.memory, plan.flops
    per_image = flops.total / (optim.batch_size_per_gpu * optim.accumulation_steps)
    moments = "moments" if optim.optimizer == "adamw" else "moment"
    resident = [
        ("student", memory.student),
        ("teacher", memory.teacher),
        (f"{optim.optimizer}'s {moments}", memory.optimizer),
        ("centre and images", memory.centre + memory.images),
        ("persistent gradients", memory.gradients),
    ]
    lines = [
        f"{config.arch}: {plan.backbone_parameters / 1e6:.2f} M parameters, head of "
        f"{config.head.out_dim:,} prototypes {plan.head_parameters / 1e6:.2f} M",
        f"{config.gpus} GPUs x {optim.batch_size_per_gpu} images x {optim.accumulation_steps} = "
        f"{plan.global_batch:,} images a step, 2 views of {crops.global_crops_size} and "
        f"{crops.local_crops_number} of {crops.local_crops_size} pixels each, "
        f"{planned(config.run.precision, config.run.device != 'cpu')}",
        "",
        "FLOPs per step and GPU (a multiply-add is 2)",
        *(
            f"  {name:<28}{value / 1e12:>10.3f} T"
            for name, value in (
                ("teacher, forward", flops.teacher),
                ("student, forward", flops.student_forward),
                ("student, backward", flops.student_backward),
                ("total", flops.total),
            )
        ),
        f"  {'per image':<28}{per_image / 1e9:>10.1f} G",
        "",
        "memory per GPU",
        *(f"  {name:<28}{_megabytes(value)}" for name, value in resident if value),
        f"  {'activations and their gradients':<32}{_megabytes(memory.passes, 8)}",
        f"  {'at the peak':<28}{_megabytes(memory.peak)}",
        "  not counted: CUDA itself, NCCL, scratch memory of operators, fragmentation",
        "",
        f"{optim.epochs} epochs x {plan.steps_per_epoch:,} steps = {plan.steps:,} steps, "
        f"{config.images:,} images per epoch",
        f"at {config.utilisation:.0%} of {config.tflops:g} TFLOP/s: {plan.images_per_second:,.0f} "
        f"images/s, {plan.hours:,.1f} hours, {config.gpus * plan.hours:,.0f} GPU hours",
        "the utilisation is an assumption; the log of a training has the measured images/s",
    ]
    return "\n".join(lines)


def _megabytes(size: int, width: int = 12) -> str:
    return f"{size / 1e6:>{width},.1f} MB"
