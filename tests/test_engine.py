"""The engine with a minimal task: what it calls and when, and what it stores."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ssl_xcit.checkpoints import folder as checkpoint
from ssl_xcit.data.loader import MultiCropLoader
from ssl_xcit.data.views import View
from ssl_xcit.dino import train
from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.finetune.config import FinetuneConfig
from ssl_xcit.runtime import distributed
from ssl_xcit.runtime.config import load_config
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.training.engine import run_task
from ssl_xcit.training.metrics import read_metrics
from ssl_xcit.training.optim import build_optimizer, parameter_groups
from ssl_xcit.training.task import StepLoss, Task


class Brightness(Task):
    """Learns the mean pixel value of the images and records the engine's calls."""

    kind = "fine-tuning"

    def __init__(self, config: FinetuneConfig, steps_per_epoch: int = 4) -> None:
        self.configure(config, distributed.setup("cpu"))
        self.per_epoch, self.calls, self.found = steps_per_epoch, [], []
        self.loader = MultiCropLoader(
            config.data,
            [[View(8, (1.0, 1.0))]],
            config.optim.batch_size_per_gpu,
            accumulation_steps=config.optim.accumulation_steps,
            dtype=torch.float32,
        )
        torch.manual_seed(0)
        self.model = nn.Linear(1, 1)
        self.optimizer = build_optimizer("sgd", parameter_groups(self.model))

    @property
    def steps_per_epoch(self) -> int:
        return self.per_epoch

    def hyperparameters(self, step: int) -> dict[str, float]:
        return {"lr": 0.1, "weight_decay": 0.0, "step": float(step)}

    def loss(self, batch: tuple[Tensor, ...], step: int, micro: int, now: dict) -> StepLoss:
        assert now == self.hyperparameters(step)
        self.calls.append(("loss", step, micro, *sorted(batch[1].tolist())))
        guess = self.model(torch.ones(1, 1)).squeeze()
        found = torch.stack([guess.detach(), batch[1].float().mean()])
        return StepLoss((guess - batch[0].mean()) ** 2, found)

    def before_update(self, step: int) -> None:
        self.calls.append(("before", step))

    def after_update(self, now: dict, means: Tensor, bad: Tensor) -> None:
        self.calls.append(("after", int(now["step"])))
        self.found.append(means.tolist())

    def modules(self) -> list[nn.Module]:
        return [self.model]

    def evaluates(self, epoch: int) -> bool:
        return epoch % 2 == 1

    def evaluate(self, check: Callable[[], None]) -> dict[str, float]:
        self.calls.append(("evaluate",))
        return {"test/bias": self.model.bias.item()}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {"model": self.model.state_dict()}

    def load(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        self.model.load_state_dict(tensors["model"])

    def facts(self) -> dict:
        return {"arch": "none", "colour": "gray"}

    def summary(self) -> str:
        return "brightness"


def config(photos: Path, out: Path, **changes) -> FinetuneConfig:
    settings = {
        "data": photos, "test": photos, "out": out, "from_scratch": True,
        "arch": "xcit_nano_12_p16", "batch_size_per_gpu": 6, "accumulation_steps": 2, "epochs": 4,
        "log_every": 1000, "device": "cpu", "num_workers": 1, "saveckp_freq": 1,
    } | changes  # fmt: skip
    argv = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return load_config(FinetuneConfig, argv=argv)


def test_a_step_runs_its_micro_batches_and_then_each_hook_once(photos, tmp_path):
    task = Brightness(config(photos, tmp_path / "run", epochs=1), steps_per_epoch=2)
    run_task(task)
    kinds = [call[:3] if call[0] == "loss" else call for call in task.calls]
    step = [[("loss", s, 0), ("loss", s, 1), ("before", s), ("after", s)] for s in range(2)]
    assert kinds == [*step[0], *step[1]]


def test_the_update_gets_the_means_of_the_losses_averaged_over_micro_batches(photos, tmp_path):
    task = Brightness(config(photos, tmp_path / "run", epochs=1), steps_per_epoch=2)
    run_task(task)
    images = [call[3:] for call in task.calls if call[0] == "loss"]
    for step, (_, found) in enumerate(task.found):
        assert found == pytest.approx(np.mean([images[2 * step], images[2 * step + 1]]))


def test_an_epoch_may_end_before_the_loaders_epoch_and_the_next_has_a_new_order(photos, tmp_path):
    task = Brightness(config(photos, tmp_path / "run"), steps_per_epoch=3)
    run_task(task)
    images = {}
    for kind, step, *rest in (call for call in task.calls if call[0] == "loss"):
        assert kind == "loss"
        images.setdefault(step, []).extend(rest[1:])
    assert sorted(images) == list(range(12))
    epochs = [[i for step in range(e, e + 3) for i in images[step]] for e in range(0, 12, 3)]
    assert all(len(set(epoch)) == 36 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_log_has_a_row_per_evaluation_with_the_scheduled_values(photos, tmp_path):
    task = Brightness(config(photos, tmp_path / "run"))
    last = run_task(task)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [7, 15]
    assert rows[-1] == last
    assert all({"test/bias", "train/loss", "train/grad_norm"} <= row.keys() for row in rows)
    assert [row["schedule/step"] for row in rows] == [7.0, 15.0]
    assert task.calls.count(("evaluate",)) == 2


def test_a_checkpoint_holds_the_tasks_facts_and_a_run_continues_from_it(photos, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    run_task(Brightness(config(photos, whole)))
    first = Brightness(config(photos, part))
    stop = 9

    def interrupt(step: int) -> None:
        if step == stop:
            raise KeyboardInterrupt

    first.before_update = interrupt
    with pytest.raises(KeyboardInterrupt):
        run_task(first)
    second = Brightness(config(photos, part))
    run_task(second)
    assert second.calls[0][:2] == ("loss", 8)  # the newest checkpoint is from the end of the epoch
    a, b = (checkpoint.load_latest(out / "checkpoints")[0] for out in (whole, part))
    assert (b.state["colour"], b.state["epoch"], b.state["step"]) == ("gray", 4, 16)
    for name, tensor in a.tensors["model"].items():
        assert torch.equal(b.tensors["model"][name], tensor)
    for name, tensor in a.tensors["optimizer"].items():
        assert torch.equal(b.tensors["optimizer"][name], tensor)


def test_the_folder_of_another_kind_of_training_is_refused(photos, tmp_path):
    run_task(Brightness(config(photos, tmp_path / "run", epochs=2)))
    argv = ["--arch", "xcit_nano_12_p16", "--data", str(photos), "--out", str(tmp_path / "run")]
    small = ["--batch_size_per_gpu", "8", "--global_crops_size", "16", "--local_crops_number", "0"]
    pretraining = load_config(
        TrainConfig, argv=[*argv, *small, "--device", "cpu", "--out_dim", "8"]
    )
    with pytest.raises(UserError, match="folder of a fine-tuning, not of a pretraining"):
        train.train(pretraining)


def test_weights_that_are_not_finite_are_never_published(photos, tmp_path):
    class Broken(Brightness):
        def after_update(self, now: dict, means: Tensor, bad: Tensor) -> None:
            if now["step"] == 5:
                self.model.bias.data.fill_(torch.nan)

    task = Broken(config(photos, tmp_path / "run"))
    with pytest.raises(UserError, match="no longer finite"):
        run_task(task)
    found, skipped = checkpoint.load_latest(tmp_path / "run" / "checkpoints")
    assert (found.state["step"], skipped) == (4, [])
    assert found.tensors["model"]["bias"].isfinite().all()
