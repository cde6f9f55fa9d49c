"""bfloat16 and float16 lose no more accuracy than in the official code.

The oracle is benchmarks/reference_step.py, which does the official operations, under torch's
autocast. The ground truth is the same network in float64. An error is the norm of the difference
from the truth divided by the norm of the truth.
"""

import copy
import math
import sys
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import jaxtyping
import pytest
import torch
from test_train import config
from torch import Tensor, nn

from ssl_xcit.dino.head import DINOHead
from ssl_xcit.dino.loss import DINOLoss
from ssl_xcit.dino.networks import MultiCropWrapper
from ssl_xcit.dino.train import Pretraining
from ssl_xcit.models import xcit
from ssl_xcit.models.variants import ARCHITECTURES
from ssl_xcit.models.xcit import XCABlock, build_xcit
from ssl_xcit.runtime import distributed
from ssl_xcit.training.engine import train_step
from ssl_xcit.training.guard import BatchStatistics

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from reference_step import Network, ReferenceStep

HIDDEN, BOTTLENECK, PROTOTYPES = 1024, 256, 2048  # errors of a narrower head depend on chance
LOCALS, TEACHER_TEMP = 1, 0.04
WORSE = 1.2  # largest allowed ratio to the reference's error
SCALES = {  # loss scales; use the first that keeps the gradients finite, as a scaler would
    torch.bfloat16: (1.0,),
    torch.float16: (2.0**14, 2.0**9, 2.0**4),
}
QUICK = ("xcit_nano_12_p16", "xcit_tiny_24_p16")
LARGE = ("xcit_small_24", "xcit_medium_24", "xcit_large_24")
CASES = [
    pytest.param(arch, dtype, marks=() if arch in QUICK else pytest.mark.long)
    for arch in ARCHITECTURES
    for dtype in (torch.bfloat16, torch.float16)
    # float16 takes minutes on a CPU for these, so patches of 16 pixels stand in for those of 8
    if not (dtype == torch.float16 and arch.startswith(LARGE) and arch.endswith("_p8"))
]


class Outcome(NamedTuple):
    """The results of a forward and backward pass, as vectors."""

    features: Tensor  # output of the backbone
    stream: Tensor  # sum of what the blocks add to the patch tokens
    log_p: Tensor  # per view and prototype; the loss is a weighted sum of them
    gradients: dict[str, Tensor]


def run(
    network: nn.Module,
    crops: list[Tensor],
    targets: Tensor,
    dtype: torch.dtype | None = None,
    scale: float = 1.0,
) -> Outcome:
    """Run both passes. `dtype`: of autocast, None for none. `scale`: of the loss."""
    seen: dict[str, list[Tensor]] = {"in": [], "out": [], "features": []}
    blocks = network.backbone.blocks
    handles = [
        blocks[0].register_forward_pre_hook(lambda _, inputs: seen["in"].append(inputs[0])),
        blocks[-1].register_forward_hook(lambda *call: seen["out"].append(call[2])),
        network.backbone.register_forward_hook(lambda *call: seen["features"].append(call[2])),
    ]
    network.zero_grad()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        logits = network(crops)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = targets.to(logits.dtype)
        loss = DINOLoss(logits.shape[1]).to(logits.dtype)(logits, targets, TEACHER_TEMP)
    (loss * scale).backward()
    log_p = (logits.detach() / 0.1).log_softmax(1)
    for handle in handles:
        handle.remove()
    joined = [torch.cat([part.flatten().double() for part in parts]) for parts in seen.values()]
    gradients = {
        name: p.grad.double() / scale
        for name, p in network.named_parameters()
        if p.grad is not None and not ("cls_attn" in name and name.endswith("qkv.bias"))
    }  # a third of that bias has gradient 0 here and rounding noise there
    return Outcome(joined[2].detach(), (joined[1] - joined[0]).detach(), log_p, gradients)


def finite(outcome: Outcome) -> bool:
    return all(gradient.isfinite().all() for gradient in outcome.gradients.values())


def error(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


def networks(arch: str, random_gains: bool, seed: int) -> tuple[nn.Module, nn.Module]:
    """Our network and the reference's, with the same weights."""
    torch.manual_seed(seed)
    backbone = build_xcit(arch, num_classes=0)
    head = DINOHead(backbone.embed_dim, PROTOTYPES, hidden_dim=HIDDEN, bottleneck_dim=BOTTLENECK)
    ours = MultiCropWrapper(backbone, head).train()
    if random_gains:
        with torch.no_grad():
            for name, parameter in ours.named_parameters():
                if "gamma" in name:
                    parameter.uniform_(0.0, 2.0)
    reference = Network(arch, PROTOTYPES, HIDDEN, BOTTLENECK, 0.0).train()
    reference.load_state_dict(ours.state_dict())
    return ours, reference


def compared(arch: str, random_gains: bool, dtype: torch.dtype, seeds: int) -> dict:
    """Return {quantity: (our error, the reference's error)}, root mean squares over the seeds."""
    squares: dict[str, Tensor] = {}
    for seed in range(seeds):
        ours, reference = networks(arch, random_gains, seed)
        sides = [48] * 2 + [32] * LOCALS
        samples = 2 if arch.startswith(LARGE) else 4
        views = [torch.randn(samples, 3, side, side) for side in sides]
        crops = [torch.stack(views[:2]), torch.stack(views[2:])]
        targets = torch.randn(2 * samples, PROTOTYPES) * 0.2
        exact = copy.deepcopy(reference).double()
        truth = run(exact, [view.double() for view in views], targets.double())
        del exact
        for scale in SCALES[dtype]:
            of_ours = run(ours, crops, targets, dtype, scale)
            of_theirs = run(reference, views, targets, dtype, scale)
            if all(finite(outcome) for outcome in (of_ours, of_theirs)):
                break
        for what in ("features", "stream", "log_p"):
            pair = [error(getattr(o, what), getattr(truth, what)) for o in (of_ours, of_theirs)]
            squares[what] = squares.get(what, 0) + torch.tensor(pair) ** 2
        of_tensors = torch.tensor(
            [
                [error(o.gradients[name], gradient) for o in (of_ours, of_theirs)]
                for name, gradient in truth.gradients.items()
            ]
        )
        assert len(of_tensors) > 200
        # The median, because the errors of a few small tensors depend on chance.
        squares["gradients"] = squares.get("gradients", 0) + of_tensors.median(0).values.square()
    return {what: (square / seeds).sqrt().tolist() for what, square in squares.items()}


def check(errors: dict) -> None:
    for what, (ours, theirs) in errors.items():
        assert math.isfinite(ours)
        assert 0 < ours <= WORSE * theirs, f"{what}: {ours:.3g}, the reference's {theirs:.3g}"


def seeds_of(arch: str) -> int:
    """Number of seeds; small networks have fewer values to average over and need more."""
    return {"nano": 2}.get(arch.split("_")[1], 1)


@pytest.mark.parametrize("random_gains", [False, True])
@pytest.mark.parametrize(("arch", "dtype"), CASES)
def test_lower_precision_errs_no_more_than_the_reference_under_autocast(arch, random_gains, dtype):
    check(compared(arch, random_gains, dtype, seeds_of(arch)))


def test_a_residual_stream_that_is_rounded_on_purpose_is_detected(monkeypatch):
    add_branch = xcit.add_branch

    def rounded(*arguments):
        return add_branch(*arguments).bfloat16()

    monkeypatch.setattr(xcit, "add_branch", rounded)
    errors = compared("xcit_tiny_24_p16", False, torch.bfloat16, 1)
    assert errors["stream"][0] > 0.9  # with gains of 1e-5, the branches are rounded away
    with pytest.raises(AssertionError, match="stream"):
        check(errors)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # caused by Dynamo
@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"join_sizes": True},
        {"join_sizes": False},
        {"activation_checkpointing": True},
        {"drop_path_rate": 0.3},
        {"drop_path_rate": 0.3, "join_sizes": True},
        {"training": False},
        {"compiled": True},
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_residual_stream_is_float32_in_every_path(monkeypatch, dtype, setting):
    if "compiled" in setting:  # traced only: Inductor takes minutes, and Dynamo rejects jaxtyping
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        torch._dynamo.reset()
        compiled = partial(torch.compile, dynamic=False, fullgraph=True, backend="aot_eager")
        monkeypatch.setattr(xcit, "_compiled_forward", cache(lambda kind: compiled(kind.forward)))
    model = build_xcit("xcit_nano_12_p16", num_classes=0)
    for name, value in setting.items():
        setattr(model, name, value)
    model.train(setting.get("training", True))
    seen = []
    for block in model.blocks:
        assert isinstance(block, XCABlock)
        block.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    norm = model.cls_attn_blocks[0].norm1.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].dtype)
    )
    crops = [torch.randn(2, 3, 32, 32), torch.randn(4, 3, 16, 16)]
    with torch.autocast("cpu", dtype):
        model(crops).float().sum().backward()
    norm.remove()
    assert len(seen) > (0 if model.compiled else 12)  # compiled blocks call no hooks
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_training_step_in_lower_precision_errs_no_more_than_the_reference(
    photos, tmp_path, precision
):
    """Compares the changes of student and teacher in the step, and the centre.

    The reference has no gradient scaler, which float16 needs. Hence both precisions are compared
    with its bfloat16, which is coarser.
    """
    settings = {
        "drop_path_rate": 0, "warmup_epochs": 0, "freeze_last_layer": 0, "epochs": 1000,
        "momentum_teacher": 0.9, "teacher_temp": 0.04, "warmup_teacher_temp_epochs": 0,
        "weight_decay_end": 0.04, "lr": 1e-3 * 256 / 12, "min_lr": 1e-3, "batch_size_per_gpu": 12,
    }  # fmt: skip
    run_config = config(photos, tmp_path, **settings | {"precision": precision})
    task = Pretraining(run_config, distributed.setup("cpu"))
    head, crops = run_config.head, run_config.crops
    sizes = (2, crops.global_crops_size), (crops.local_crops_number, crops.local_crops_size)
    batch = [torch.randn(views, 12, 3, side, side) for views, side in sizes]
    views = [view for crop in batch for view in crop]
    weights = copy.deepcopy((task.bare_model.state_dict(), task.teacher.state_dict()))

    def reference(dtype: torch.dtype, lower: torch.dtype | None) -> ReferenceStep:
        step = ReferenceStep(
            run_config.arch, out_dim=head.out_dim, hidden=head.head_hidden_dim,
            bottleneck=head.head_bottleneck_dim, drop_path=0.0, momentum=0.9, autocast=lower,
        )  # fmt: skip
        step.load(*weights)
        step.to(dtype)([view.to(dtype) for view in views], 1e-3, 0.04)
        return step

    truth = reference(torch.float64, None)
    theirs = reference(torch.float32, torch.bfloat16)
    if precision == "fp16":  # a scale at which the first step is not skipped
        task.scaler.load_state_dict(task.scaler.state_dict() | {"scale": 64.0})
    train_step(task, iter([(*batch, torch.arange(12))]), 0, BatchStatistics(task.modules()))

    def moved(student: nn.Module, teacher: nn.Module, center: Tensor) -> dict[str, Tensor]:
        found = {"centre": center.double()}
        pairs = zip(("student", "teacher"), (student, teacher), weights, strict=True)
        for role, network, before in pairs:
            found[role] = torch.cat(
                [
                    (p.double() - before[name].double()).flatten()
                    for name, p in network.named_parameters()
                    if not ("cls_attn" in name and name.endswith("qkv.bias"))
                ]
            ).detach()
        return found

    exact, other, ours = (
        moved(*networks)
        for networks in (
            (truth.student, truth.teacher, truth.center),
            (theirs.student, theirs.teacher, theirs.center),
            (task.bare_model, task.teacher, task.dino_loss.center),
        )
    )
    check({what: [error(o[what], exact[what]) for o in (ours, other)] for what in exact})
