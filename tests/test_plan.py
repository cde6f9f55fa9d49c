"""The predicted cost of a pretraining run.

Oracles: torch's counters of FLOPs and allocated memory in real steps of the same size, and explicit
arithmetic.
"""

import copy
import dataclasses
import functools
import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ssl_xcit.dino import plan as training_cost
from ssl_xcit.dino.config import IMAGENET, Crops, Head, Optim, PlanConfig, TrainConfig
from ssl_xcit.dino.loss import DINOLoss
from ssl_xcit.dino.memory import LiveBytes, crop_groups, forward_backward, training_memory
from ssl_xcit.dino.networks import dino_network
from ssl_xcit.dino.plan import describe_plan, plan_training, step_flops
from ssl_xcit.models.xcit import build_xcit
from ssl_xcit.runtime.config import load_config, save_config
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.training.config import Run

SMALL = PlanConfig(
    "xcit_nano_12_p16",
    crops=Crops(global_crops_size=64, local_crops_size=48, local_crops_number=3),
    head=Head(out_dim=512, head_hidden_dim=64, head_bottleneck_dim=32),
    optim=Optim(batch_size_per_gpu=2, epochs=3),
    run=Run(precision="fp32", device="cpu"),
    gpus=1,
    images=100,
)


def changed(config, section, **values):
    part = dataclasses.replace(getattr(config, section), **values)
    return dataclasses.replace(config, **{section: part})


def real_step(config, drop_path_rate=0.0, join_sizes=False):
    """Networks, loss and random views of a micro-batch, on the CPU.

    Even without drop path it processes the crop sizes separately, as the recipe's drop path does.
    """
    student = dino_network(config)
    teacher = copy.deepcopy(student).requires_grad_(False)
    student.backbone.drop_path_rate, teacher.backbone.drop_path_rate = drop_path_rate, 0.0
    student.backbone.join_sizes = join_sizes
    student.backbone.activation_checkpointing = config.run.activation_checkpointing
    n = config.optim.batch_size_per_gpu
    crops = [torch.randn(views, n, 3, side, side) for views, side in crop_groups(config)]
    return student, teacher, DINOLoss(config.head.out_dim), crops


pytestmark = pytest.mark.usefixtures("nano_blocks")


@functools.cache
def made_once(blocks, config):
    return training_memory(config, 1, cuda=False)


@pytest.fixture
def planned(nano_blocks):
    """A function from a configuration to the planned memory of one rank."""
    return functools.partial(made_once, nano_blocks)


@pytest.fixture
def memory(planned):
    return planned(SMALL)


def convolution_gradients(grad_shape, x_shape, w_shape, *args, out_shape=None, **kwargs):
    """FLOPs of aten.convolution_backward; torch's formula treats depthwise ones as dense."""
    wanted = args[-1]  # (of the input, of the weight, of the bias)
    return 2 * math.prod(w_shape) * grad_shape[0] * math.prod(grad_shape[2:]) * sum(wanted[:2])


def counter():
    gradients = {torch.ops.aten.convolution_backward: convolution_gradients}
    return FlopCounterMode(display=False, custom_mapping=gradients)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        changed(SMALL, "crops", local_crops_number=0),
        changed(SMALL, "head", use_bn_in_head=True, norm_last_layer=False, head_layers=1),
        changed(SMALL, "run", activation_checkpointing=True),
    ],
    ids=["as it is", "no local views", "other head", "checkpointed"],
)
def test_flops_of_a_step_equal_torchs_count_in_a_real_step(config):
    student, teacher, loss, crops = real_step(config)
    flops = step_flops(config)
    with counter() as all_of_it:
        forward_backward(config, student, teacher, loss, crops)
    assert flops.total == all_of_it.get_total_flops()
    with counter() as forward:
        teacher(crops[:1])
    assert flops.teacher == forward.get_total_flops()
    with counter() as forward:
        student(crops)
    assert flops.student_forward == forward.get_total_flops()


def test_accumulation_multiplies_the_step():
    twice = step_flops(changed(SMALL, "optim", accumulation_steps=2))
    assert twice == tuple(2 * part for part in step_flops(SMALL))


def test_planned_memory_is_close_to_what_a_real_step_allocates(memory):
    """The profiler includes operators' scratch memory, which the plan excludes."""
    peak = allocated(SMALL)
    assert 0.93 * peak < memory.passes <= peak


def allocated(config):
    """Peak bytes allocated by torch in a real step."""
    step = real_step(config)
    forward_backward(config, *step)  # initialises libraries
    step[0].zero_grad(set_to_none=True)
    options = {"profile_memory": True, "acc_events": True}  # torch 2.11 warns without the second
    with profile(activities=[ProfilerActivity.CPU], **options) as profiler:
        forward_backward(config, *step)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_planned_memory_equals_the_results_of_a_real_steps_operators(memory):
    assert memory.passes == pytest.approx(real_passes(SMALL), rel=1e-4)  # a few scalars


def test_checkpointed_activations_are_planned_to_the_byte_and_are_a_fraction(planned, memory):
    config = changed(SMALL, "run", activation_checkpointing=True)
    checkpointed = planned(config)
    assert checkpointed.passes == pytest.approx(real_passes(config), rel=1e-3)
    assert checkpointed.passes < 0.6 * memory.passes  # half of it are gradients of the weights
    assert checkpointed.resident == memory.resident
    peak = allocated(config)  # includes scratch memory of operators
    assert 0.8 * peak < checkpointed.passes <= peak


@pytest.mark.parametrize("checkpointing", [False, True])
def test_crops_in_turn_are_planned_to_the_byte_and_need_less(planned, checkpointing):
    whole = changed(SMALL, "run", activation_checkpointing=checkpointing)
    in_turn = changed(whole, "crops", crops_in_turn=True)
    passes = planned(in_turn).passes
    assert passes == pytest.approx(real_passes(in_turn), rel=1e-3)
    assert passes < planned(whole).passes


def test_crops_in_turn_need_the_activations_of_one_size(planned):
    """The recipe's local crops cause half of the activations, which dominate at this batch size."""
    recipe = dataclasses.replace(SMALL, crops=Crops(), optim=Optim(batch_size_per_gpu=32))
    in_turn = planned(changed(recipe, "crops", crops_in_turn=True)).passes
    alone = planned(changed(recipe, "crops", local_crops_number=0)).passes
    assert in_turn < 1.05 * alone < 0.65 * planned(recipe).passes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_drop_path_needs_hardly_more_memory_than_planned_or_less(planned, precision):
    config = changed(SMALL, "run", precision=precision)
    passes = planned(config).passes
    torch.manual_seed(0)
    assert real_passes(config, drop_path_rate=0.5) < 0.97 * passes
    assert real_passes(config, drop_path_rate=0.05) < 1.03 * passes


def real_passes(config, drop_path_rate=0.0, as_on_two_gpus=False):
    student, teacher, loss, crops = real_step(config, drop_path_rate, join_sizes=as_on_two_gpus)
    held = [*student.parameters(), *student.buffers(), *teacher.parameters(), *teacher.buffers()]
    if as_on_two_gpus:  # gradients stay in the buckets
        for parameter in filter(lambda p: p.requires_grad, student.parameters()):
            parameter.grad = torch.zeros_like(parameter)
            held.append(parameter.grad)
    with LiveBytes([*held, loss.center, *crops]) as live:
        forward_backward(config, student, teacher, loss, crops)
    return live.peak


def test_resident_memory_agrees_with_a_count_by_hand(memory):
    backbone = build_xcit("xcit_nano_12_p16", num_classes=0)
    head = 128 * 64 + 64 + 64 * 64 + 64 + 64 * 32 + 32 + 512 * 32 + 512
    parameters = sum(p.numel() for p in backbone.parameters()) + head
    statistics = sum(b.numel() * b.element_size() for b in backbone.buffers())
    assert memory.student == memory.teacher == 4 * parameters + statistics
    trained = parameters - 512  # weight_g stays 1
    # moments in float32, and AdamW's count of steps for each of its tensors
    assert 0 <= memory.optimizer - 2 * 4 * trained < 4 * 1000
    assert memory.centre == 4 * 512
    assert memory.images == 4 * 2 * 3 * (2 * 64**2 + 3 * 48**2)
    assert memory.gradients == 0
    assert 4 * trained <= memory.update < 4 * trained + 100_000  # plus the norms for clipping


def test_several_gpus_keep_gradients_and_bytes_and_bf16_needs_less(memory):
    config = changed(SMALL, "run", precision="bf16")
    several = training_memory(config, 2, cuda=True)
    assert several.gradients == pytest.approx(memory.student, rel=0.02)
    assert several.images == memory.images * 5 // 4
    assert several.resident == memory.resident + several.gradients + memory.images // 4
    assert several.passes == pytest.approx(real_passes(config, as_on_two_gpus=True), rel=2e-3)
    assert several.passes < memory.passes
    assert several.peak == several.resident + several.passes
    assert several.update >= memory.student - memory.centre - 20_000  # the teacher update


def test_a_real_forward_pass_after_a_plan_has_real_positions(memory):
    out = build_xcit("xcit_nano_12_p16", num_classes=0).eval()(torch.zeros(1, 3, 64, 64))
    assert math.isfinite(out.detach().sum().item())


def test_hours_are_flops_divided_by_throughput(memory, monkeypatch):
    monkeypatch.setattr(training_cost, "training_memory", lambda *args, **kwargs: memory)
    plan = plan_training(dataclasses.replace(SMALL, tflops=2.0, utilisation=0.25))
    assert (plan.global_batch, plan.steps_per_epoch, plan.steps) == (2, 50, 150)
    seconds = step_flops(SMALL).total / 0.5e12
    assert plan.hours == pytest.approx(150 * seconds / 3600)
    assert plan.images_per_second == pytest.approx(2 / seconds)
    text = describe_plan(SMALL, plan)
    assert "3 epochs x 50 steps = 150 steps" in text
    assert f"{plan.memory.peak / 1e6:,.1f} MB" in text


def test_a_plan_uses_recipes_and_a_runs_own_configuration(tmp_path):
    files = ["pretrain/{arch}.yaml"]
    config = load_config(PlanConfig, files, ["--arch", "xcit_small_12_p8", "--gpus", "64"])
    assert (config.optim.batch_size_per_gpu, config.optim.epochs) == (16, 300)  # the recipe's
    assert (config.gpus, config.images) == (64, IMAGENET)
    save_config(TrainConfig("xcit_nano_12_p8", "a.beton", "runs/a"), tmp_path / "config.yaml")
    config = load_config(PlanConfig, files, ["--config", str(tmp_path / "config.yaml")])
    assert (config.arch, config.data) == ("xcit_nano_12_p8", "a.beton")


def test_a_plan_that_is_impossible_is_refused_with_advice():
    with pytest.raises(UserError, match="a step takes 2 images, an epoch has 1: lower"):
        plan_training(dataclasses.replace(SMALL, images=1))
    with pytest.raises(UserError, match=r"utilisation must be in \(0, 1\]"):
        dataclasses.replace(SMALL, utilisation=0.0)
    with pytest.raises(UserError, match="gpus must be >= 1"):
        dataclasses.replace(SMALL, gpus=0)
