"""Precision by what the machine can do: chosen, said, stored, kept; float16's gradient scaler."""

import os
import platform
import shutil
import subprocess
import sys

import pytest
import torch
from test_train import assert_same, config, weights

from ssl_xcit.checkpoints import folder as checkpoint
from ssl_xcit.dino import train
from ssl_xcit.dino.train import Pretraining
from ssl_xcit.runtime import distributed, precision
from ssl_xcit.runtime.distributed import Distributed
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.runtime.precision import Precision, choose, product_time, quickest
from ssl_xcit.slurm.folder import check_run_folder
from ssl_xcit.training import engine
from ssl_xcit.training.guard import BatchStatistics
from ssl_xcit.training.metrics import read_metrics

CPU = Distributed(0, 1, 0, torch.device("cpu"))
GPU = Distributed(0, 1, 0, torch.device("cuda", 0))
LESSER = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


@pytest.fixture
def machine(monkeypatch):
    """machine(name): this machine is one whose quickest precision is that."""

    def be(name: str) -> None:
        monkeypatch.setattr(precision, "quickest", lambda device: Precision(name, "a reason"))
        emulated = {"bf16": "is emulated"} if name == "fp32" else {}
        monkeypatch.setattr(precision, "slowdown", lambda asked, device: emulated.get(asked))

    return be


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((6, 1), "fp32"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((12, 1), "bf16")],
)
def test_a_gpu_is_asked_for_its_compute_capability(monkeypatch, capsys, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = choose("auto", GPU)
    assert found.name == expected
    assert found.reason.startswith("compute capability {}.{}".format(*capability))
    assert choose("bf16", GPU).name == "bf16"
    said = capsys.readouterr().err
    assert said.startswith("warning: bf16 is emulated on this GPU") == (capability < (8, 0))
    assert len(said.splitlines()) == (capability < (8, 0))


@pytest.mark.parametrize(
    ("time", "expected"), [(0.1, "bf16"), (0.5, "bf16"), (0.9, "fp32"), (150.0, "fp32")]
)
def test_a_cpu_is_measured(monkeypatch, time, expected):
    monkeypatch.setattr(precision, "product_time", lambda name: {"bf16": time}[name])
    assert quickest(torch.device("cpu")).name == expected


def test_what_is_measured_is_a_product_of_layers():
    before = torch.get_num_threads()
    assert 0.01 < product_time.__wrapped__("fp32") < 3  # against itself, beside other work
    assert torch.get_num_threads() == before


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the limit is one of x86 processors")
def test_a_processor_without_bfloat16_takes_float32_and_warns_of_bf16_once():
    code = (
        "from ssl_xcit.runtime import distributed, precision\n"
        "ranks = distributed.setup('cpu')\n"
        "print(*precision.choose('auto', ranks))\n"
        "print(precision.choose('bf16', ranks).name)\n"
    )
    environment = os.environ | LESSER
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    _, chosen, asked = done.stdout.splitlines()
    assert chosen.startswith("fp32 bfloat16 products take ")
    assert asked == "bf16"
    (warning,) = done.stderr.splitlines()
    assert warning.startswith("warning: bf16 is emulated on this processor: its products take ")
    assert warning.endswith("; --precision auto is quicker")


def test_float32_means_float32_on_every_gpu():
    torch.backends.cudnn.allow_tf32 = True
    choose("fp32", CPU)
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


def test_ranks_agree_on_the_most_careful_choice(monkeypatch, machine):
    machine("bf16")
    others = iter([1, -1])  # one of them takes fp16, none has found an earlier run
    monkeypatch.setattr(distributed, "maximum", lambda number: max(number, next(others)))
    assert choose("auto", CPU).name == "fp16"


def test_the_choice_is_said_and_stored_and_a_run_keeps_it_on_another_machine(
    photos, tmp_path, machine, capsys
):
    settings = {"precision": "auto", "epochs": 1, "probe.every": 0}
    machine("bf16")
    train.train(config(photos, tmp_path, **settings))
    assert "\nprecision bf16: a reason\n" in capsys.readouterr().out
    assert "precision: bf16" in (tmp_path / "config.yaml").read_text()
    whole = weights(tmp_path)

    shutil.rmtree(tmp_path / "checkpoints")  # from the start again, on a machine without bfloat16
    machine("fp32")
    train.train(config(photos, tmp_path, **settings))
    said = capsys.readouterr()
    assert "\nprecision bf16: as it was begun; here it would be fp32\n" in said.out
    assert "warning: bf16 is emulated; begun anew, fp32 is quicker" in said.err
    assert_same(whole, weights(tmp_path))

    check_run_folder(config(photos, tmp_path, **settings))  # it may be submitted again, too
    with pytest.raises(UserError, match=r"run\.precision: bf16 -> fp32"):
        train.train(config(photos, tmp_path, **settings | {"precision": "fp32"}))


# float16


def half(photos, out, **changes) -> Pretraining:
    settings = {"precision": "fp16", "warmup_epochs": 0, "freeze_last_layer": 0}
    return Pretraining(config(photos, out, **settings | changes), distributed.setup("cpu"))


def steps(task: Pretraining, count: int) -> list[list[float]]:
    """What each step returns: whether to stop, bad steps in a row."""
    statistics = BatchStatistics(task.modules())
    task.loader.set_epoch(0, 0)
    batches = iter(task.loader)
    found = [engine.train_step(task, batches, s, statistics).tolist() for s in range(count)]
    task.loader.close()
    return found


def state(task: Pretraining) -> dict[str, torch.Tensor]:
    found = {f"{name}/{key}": t for name, s in task.tensors().items() for key, t in s.items()}
    return {key: tensor.clone() for key, tensor in found.items()}


def test_a_scale_too_large_is_lowered_by_steps_that_change_nothing_and_do_not_count(
    photos, tmp_path
):
    task = half(photos, tmp_path, max_bad_steps=2)
    before, found = state(task), []  # torch's first scale, 2^16, is too large here
    statistics = BatchStatistics(task.modules())
    task.loader.set_epoch(0, 0)
    batches = iter(task.loader)
    while not found or task.meters.skipped[1] == len(found):
        assert all(torch.equal(tensor, before[key]) for key, tensor in state(task).items())
        found.append(engine.train_step(task, batches, 0, statistics).tolist())
        if len(found) % len(task.loader) == 0:
            batches = iter(task.loader)
    task.loader.close()
    assert len(found) > 3  # more than would make a run give up
    assert all(in_a_row == 0 for _, in_a_row in found)
    assert task.scaler.get_scale() == 2.0 ** (16 - (len(found) - 1))
    assert not torch.equal(state(task)["loss/center"], before["loss/center"])


def test_a_loss_that_is_not_finite_counts_in_float16_too(photos, tmp_path, monkeypatch):
    task = half(photos, tmp_path)
    loss = Pretraining.loss

    def poisoned(self, *arguments):
        found = loss(self, *arguments)
        return found._replace(loss=found.loss * float("nan"))

    monkeypatch.setattr(Pretraining, "loss", poisoned)
    assert [in_a_row for _, in_a_row in steps(task, 3)] == [1, 2, 3]


def test_gradients_that_no_scale_makes_finite_count(photos, tmp_path, monkeypatch):
    task = half(photos, tmp_path)
    task.scaler.load_state_dict(task.scaler.state_dict() | {"scale": 4.0})
    loss = Pretraining.loss

    def poisoned(self, *arguments):
        found = loss(self, *arguments)
        weight = next(self.bare_model.parameters())
        return found._replace(loss=found.loss + (weight.flatten()[0] * 0).sqrt())

    monkeypatch.setattr(Pretraining, "loss", poisoned)
    # excused at the scales 4 and 2, not at 1 and below
    assert [in_a_row for _, in_a_row in steps(task, 4)] == [0, 0, 1, 2]


def test_a_run_in_float16_resumes_to_the_bit_with_its_scale(photos, tmp_path, monkeypatch):
    scaler = torch.amp.GradScaler

    def growing(device, enabled):  # torch's own doubles its scale after 2,000 good steps
        return scaler(device, enabled=enabled, growth_interval=2, init_scale=2.0**7)

    monkeypatch.setattr(torch.amp, "GradScaler", growing)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = {"precision": "fp16", "keep_last": 9, "save_every": 0, "epochs": 2}
    train.train(config(photos, whole, **settings))
    shutil.copytree(whole, broken, symlinks=True)
    steps_of = sorted((broken / "checkpoints").glob("step_*"))
    for folder in steps_of[3:]:
        shutil.rmtree(folder)
    (broken / "checkpoints" / "last").unlink()
    train.train(config(photos, broken, **settings))
    assert_same(weights(whole), weights(broken))
    scales = []
    for out in (whole, broken):
        found, _ = checkpoint.load_latest(out / "checkpoints")
        scales.append(found.tensors["meters"]["scaler"].tolist())
    assert scales[0] == scales[1]
    rows = read_metrics(broken / "metrics.jsonl")
    assert rows[-1]["train/loss_scale"] == scales[0][0]
    assert len({row["train/loss_scale"] for row in rows}) > 2  # it moves


def test_in_other_precisions_there_is_no_scale(photos, tmp_path):
    task = half(photos, tmp_path, precision="fp32")
    assert not task.scaler.is_enabled()
    assert "scaler" not in task.counters()
    task.loader.close()
