"""Bad steps change nothing."""

import copy

import pytest
import torch
from shallow import networks
from test_train import config

from ssl_xcit.dino.train import Pretraining
from ssl_xcit.runtime import distributed
from ssl_xcit.training import engine
from ssl_xcit.training.guard import BatchStatistics, HostCopy
from ssl_xcit.training.task import StepLoss


@pytest.fixture(autouse=True)
def shallow():
    """Use one block, which has every kind of parameter and buffer."""
    with networks(1):
        yield


def everything(task: Pretraining) -> dict[str, torch.Tensor]:
    """Copies of everything that a step may change."""
    state = {f"{name}/{key}": t for name, s in task.tensors().items() for key, t in s.items()}
    for i, moments in task.optimizer.state_dict()["state"].items():
        state |= {f"optimizer/{i}/{key}": value for key, value in moments.items()}
    state["sums"] = task.meters.sums
    return {key: tensor.clone() for key, tensor in state.items()}


class Poisoned(Pretraining):
    """A task with a non-finite loss or gradient at chosen places: (step, micro) -> kind."""

    poison: dict

    def loss(self, batch, step, micro, now):
        found = super().loss(batch, step, micro, now)
        kind = self.poison.get((step, micro))
        if kind == "loss":
            return StepLoss(found.loss * float("nan"), found.means)
        if kind == "infinite loss":
            return StepLoss(found.loss + float("inf"), found.means)
        if kind == "gradient":  # a finite loss with a non-finite gradient
            weight = next(self.bare_model.parameters())
            return StepLoss(found.loss + (weight.flatten()[0] * 0).sqrt(), found.means)
        return found


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("kind", ["loss", "infinite loss", "gradient"])
@pytest.mark.parametrize("bad", [(0, 0), (2, 1)])
def test_a_non_finite_step_changes_nothing_and_the_next_one_continues(
    photos, tmp_path, optimizer, kind, bad
):
    settings = config(
        photos, tmp_path, optimizer=optimizer, batch_size_per_gpu=6, accumulation_steps=2,
        warmup_epochs=0, freeze_last_layer=0,
    )  # fmt: skip
    task = Poisoned(settings, distributed.setup("cpu"))
    task.poison = {bad: kind}
    statistics = BatchStatistics(task.modules())
    task.loader.set_epoch(0, 0)
    batches = iter(task.loader)
    after = everything(task)
    for step in range(4):
        before = after
        stop, in_a_row = engine.train_step(task, batches, step, statistics).tolist()
        after = everything(task)
        assert (stop, in_a_row) == (0, step == bad[0])
        same = {key for key in before if torch.equal(before[key], after[key])}
        if step == bad[0]:
            assert same == before.keys()
        else:
            for name in ("student/head.last_layer.weight_v", "teacher/head.mlp.0.weight"):
                assert name not in same
            assert not {"loss/center", "sums"} & same
            assert "teacher/backbone.blocks.0.local_mp.bn.running_mean" not in same
        assert all(tensor.isfinite().all() for tensor in after.values())
    assert task.meters.skipped.tolist() == [0, 1]
    assert task.meters.sums[-1] == 3
    task.loader.close()


def test_after_too_many_bad_steps_nothing_changes_any_more(photos, tmp_path):
    task = Poisoned(config(photos, tmp_path, max_bad_steps=2), distributed.setup("cpu"))
    task.poison = {(step, 0): "loss" for step in (1, 2)}
    statistics = BatchStatistics(task.modules())
    task.loader.set_epoch(0, 0)
    batches = iter(task.loader)
    engine.train_step(task, batches, 0, statistics)
    before = everything(task)
    counts = [engine.train_step(task, batches, s, statistics)[1].item() for s in (1, 2, 3)]
    assert counts == [1, 2, 3]  # the last step was a good one
    after = everything(task)
    assert all(torch.equal(before[key], after[key]) for key in before)
    task.loader.close()


def test_numbers_from_the_device_are_read_one_step_later():
    copied = HostCopy(2, torch.device("cpu"))
    values = torch.tensor([1.0, 2.0])
    assert copied.exchange(values) == [0.0, 0.0]
    values += 1
    assert copied.exchange(torch.tensor([5.0, 6.0])) == [1.0, 2.0]
    assert copied.exchange(values) == [5.0, 6.0]


def test_only_batchnorms_buffers_are_restored_and_only_after_a_bad_step():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    model.register_buffer("other", torch.zeros(1))
    statistics = BatchStatistics([model])
    for bad in (True, False):
        statistics.remember()
        before = copy.deepcopy(model[1].state_dict())
        model(torch.randn(5, 3))
        model.other += 1
        statistics.restore(torch.tensor(bad))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(model[1].state_dict()[name], before[name]) == bad
    assert model.other == 2
