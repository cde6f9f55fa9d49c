"""The whole step against benchmarks/reference_step.py, which executes the official operations."""

import copy
import itertools
import sys
from pathlib import Path

import pytest
import torch
from test_train import config

from ssl_xcit.dino.train import Pretraining, train
from ssl_xcit.models.variants import VARIANTS
from ssl_xcit.runtime import distributed
from ssl_xcit.training.engine import train_step
from ssl_xcit.training.guard import BatchStatistics
from ssl_xcit.training.metrics import read_metrics

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from reference_step import WIDTHS, ReferenceStep

LR, DECAY, MOMENTUM = 1e-3, 0.04, 0.99


class Pair:
    """Our step and the reference step, from the same weights."""

    def __init__(self, photos: Path, folder: Path, dtype: torch.dtype, **changes) -> None:
        settings = {
            "drop_path_rate": 0, "warmup_epochs": 0, "freeze_last_layer": 0, "epochs": 10_000,
            "norm_last_layer": True, "momentum_teacher": MOMENTUM, "teacher_temp": 0.04,
            "warmup_teacher_temp_epochs": 0, "weight_decay_end": DECAY, "clip_grad": 0.3,
            "lr": LR * 256 / 12, "min_lr": LR, "batch_size_per_gpu": 12,
        }  # fmt: skip
        self.config = config(photos, folder, **settings | changes)
        self.task = Pretraining(self.config, distributed.setup("cpu"))
        for module in (*self.task.modules(), self.task.dino_loss):
            module.to(dtype)
        head = self.config.head
        self.reference = ReferenceStep(
            self.config.arch,
            out_dim=head.out_dim,
            hidden=head.head_hidden_dim,
            bottleneck=head.head_bottleneck_dim,
            drop_path=0.0,
            clip_grad=0.3,
            momentum=MOMENTUM,
        ).to(dtype)
        # Different networks and a non-zero centre: equal ones would hide half of the mistakes.
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.task.teacher.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=dtype)
                parameter += 0.02 * noise * parameter.abs().mean()
            self.task.dino_loss.center.uniform_(-0.1, 0.1, generator=generator)
        self.reference.center = self.task.dino_loss.center.clone()
        weights = self.task.bare_model.state_dict(), self.task.teacher.state_dict()
        self.reference.load(*copy.deepcopy(weights))
        self.statistics = BatchStatistics(self.task.modules())
        self.dtype = dtype

    def step(self, number: int) -> tuple[float, float]:
        """Run one step of both; return (our loss, the reference loss)."""
        generator = torch.Generator().manual_seed(number)
        n, crops = self.config.optim.batch_size_per_gpu, self.config.crops
        sizes = (2, crops.global_crops_size), (crops.local_crops_number, crops.local_crops_size)
        batch = [
            torch.randn(views, n, 3, side, side, generator=generator, dtype=self.dtype)
            for views, side in sizes
        ]
        before = self.task.meters.sums.double().clone()
        train_step(self.task, iter([(*batch, torch.arange(n))]), number, self.statistics)
        ours = (self.task.meters.sums.double() - before)[0].item()
        views = [view for crop in batch for view in crop]
        return ours, self.reference(views, LR, DECAY)


@pytest.mark.usefixtures("nano_blocks")
def test_twenty_steps_in_float32_follow_the_reference(photos, tmp_path, monkeypatch):
    monkeypatch.setitem(WIDTHS, "xcit_nano_12", tuple(VARIANTS["xcit_nano_12"]))
    pair = Pair(photos, tmp_path, torch.float32)
    losses = [pair.step(i) for i in range(20)]
    for ours, theirs in losses:
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert len({round(ours, 3) for ours, _ in losses}) > 10  # it moves


@pytest.mark.parametrize(
    ("arch", "in_turn"),
    [("xcit_nano_12_p16", False), ("xcit_nano_12_p16", True), ("xcit_tiny_12_p8", False)],
)
def test_one_step_in_float64_updates_every_weight_like_the_reference(
    photos, tmp_path, arch, in_turn
):
    """Except the key's third of the class attention's qkv.bias, which has no effect. Its gradient
    is 0 here and rounding noise there, and the sign decides Adam's first step."""
    pair = Pair(photos, tmp_path, torch.float64, arch=arch, crops_in_turn=in_turn)
    before = {name: p.detach().clone() for name, p in pair.task.bare_model.named_parameters()}
    ours, theirs = pair.step(0)
    assert ours == pytest.approx(theirs, rel=1e-6)  # the meters are float32
    moved = 0
    networks = (pair.task.bare_model, pair.reference.student), (
        pair.task.teacher, pair.reference.teacher,
    )  # fmt: skip
    for (a, b), (name, weight) in itertools.product(networks, before.items()):
        x, y = a.get_parameter(name), b.get_parameter(name)
        if name.endswith("attn.qkv.bias") and "cls_attn" in name:
            d = len(x) // 3
            x, y = (torch.cat((bias[:d], bias[2 * d :])) for bias in (x, y))
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
        moved += a is pair.task.bare_model and not torch.equal(a.get_parameter(name), weight)
    assert moved == sum(p.requires_grad for p in pair.task.bare_model.parameters())
    centres = pair.task.dino_loss.center, pair.reference.center
    torch.testing.assert_close(*centres, rtol=0, atol=1e-10)
    for a, b in networks:
        for (name, x), y in zip(a.named_buffers(), dict(b.named_buffers()).values(), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.usefixtures("nano_blocks")
@pytest.mark.parametrize("frozen", [0, 1])
def test_crops_in_turn_changes_no_number_of_the_log(photos, tmp_path, frozen):
    rows = []
    for in_turn in (False, True):
        out = tmp_path / f"{in_turn}"
        changes = {"crops_in_turn": in_turn, "accumulation_steps": 2, "drop_path_rate": 0.2}
        changes |= {"freeze_last_layer": frozen, "epochs": 1}
        train(config(photos, out, batch_size_per_gpu=6, **changes))
        rows.append(read_metrics(out / "metrics.jsonl"))
    for whole, parts in zip(*rows, strict=True):
        for key in whole:
            if key.startswith(("health/", "train/")):
                assert parts[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-5), key
