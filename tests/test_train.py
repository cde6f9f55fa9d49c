"""Whole pretraining runs: the step against a naive one, resuming, repeating, ranks, user errors."""

import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
import torch.nn.functional as F
from conftest import photo_tiles
from shallow import PROGRAM, TINY, networks

from ssl_xcit.checkpoints import folder as checkpoint
from ssl_xcit.data.writer import write_beton
from ssl_xcit.dino import train
from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.dino.train import Pretraining
from ssl_xcit.runtime import distributed, provenance
from ssl_xcit.runtime.config import load_config
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.training import engine, run_folder
from ssl_xcit.training.guard import BatchStatistics
from ssl_xcit.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
SMALL = {  # an xcit_nano_12_p16 on crops of 32 pixels, in float32: 0.2 s per step
    "arch": "xcit_nano_12_p16",
    **TINY,
    "batch_size_per_gpu": 12,
    "epochs": 3,
    "warmup_epochs": 1,
    "freeze_last_layer": 1,
    "teacher_temp": 0.06,
    "warmup_teacher_temp_epochs": 2,
    "precision": "fp32",
    "device": "cpu",
    "num_workers": 2,
    "log_every": 1,
}


def flags(photos: Path, out: Path, **changes) -> list[str]:
    settings = SMALL | {"data": photos, "out": out} | changes
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def config(photos: Path, out: Path, **changes) -> TrainConfig:
    return load_config(TrainConfig, argv=flags(photos, out, **changes))


def command(*arguments: str, run=forked.run, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options |= {"capture_output": True, "text": True, "env": environment}
    return run([sys.executable, *arguments], check=False, **options)


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint, except the log's running means."""
    found, _ = checkpoint.load_latest(out / "checkpoints")
    return {
        f"{group}/{key}": tensor
        for group, state in found.tensors.items()
        for key, tensor in state.items()
        if group != "meters"
    }


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert different == []


def scientific(rows: list[dict]) -> list[dict]:
    """The rows without values that may differ between runs."""
    return [
        {key: value for key, value in row.items() if key.split("/")[0] not in ("speed", "memory")}
        for row in rows
    ]


def build_student(photos: Path, out: Path, **changes) -> dict[str, torch.Tensor]:
    """The student's initial state."""
    run = Pretraining(config(photos, out, **changes), distributed.setup("cpu"))
    return run.bare_model.state_dict()


@pytest.fixture(scope="module", autouse=True)
def shallow():
    """Use two blocks: the depth of the network does not matter here."""
    with networks(2):
        yield


SCRIPT = (PROGRAM, "2", str(ROOT / "main_dino.py"))  # the same for a command


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train.train(config(photos, out))
    return out


@pytest.mark.parametrize("depth", [2, pytest.param(12, marks=pytest.mark.long)])
def test_a_step_follows_the_equations(photos, tmp_path, depth):
    """One SGD step with clipping, written out view by view and tensor by tensor."""
    settings = config(
        photos, tmp_path, optimizer="sgd", drop_path_rate=0, clip_grad=0.05, warmup_epochs=0,
        freeze_last_layer=0, momentum_teacher=0.9, lr=1.0,
    )  # fmt: skip
    with networks(depth):
        run = Pretraining(settings, distributed.setup("cpu"))
    run.loader.set_epoch(0, 0)
    global_crops, local_crops, indices = next(iter(run.loader))
    student = copy.deepcopy(run.bare_model).double().train()
    teacher = copy.deepcopy(run.teacher).double().train()
    # A centre of 0 would hide its sign and the time of its update.
    run.dino_loss.center.uniform_(-0.1, 0.1)
    center = run.dino_loss.center.clone().double()
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    teacher_before = {name: p.detach().clone() for name, p in teacher.named_parameters()}

    batch = (global_crops.clone(), local_crops.clone(), indices.clone())
    engine.train_step(run, iter([batch]), 0, BatchStatistics(run.modules()))

    crops = [batch[0].double(), batch[1].double()]
    n = len(batch[2])
    with torch.no_grad():
        t = teacher.head(teacher.backbone(crops[0].flatten(0, 1))).view(2, n, -1)
    s = [student.backbone(crop.flatten(0, 1)) for crop in crops]
    s = student.head(torch.cat(s)).view(4, n, -1)
    terms = []
    for i in range(2):
        for v in range(4):
            if v == i:
                continue
            q = torch.softmax((t[i] - center) / 0.04, dim=-1)  # first epoch of the warm-up
            terms.append(-(q * F.log_softmax(s[v] / 0.1, dim=-1)).sum(-1).mean())
    assert len(terms) == 6
    loss = sum(terms) / 6
    loss.backward()
    assert run.meters.means()[0].item() == pytest.approx(loss.item(), rel=1e-5)
    lr, momentum, clipped = 1.0 * 12 / 256, 0.9, 0
    for name, parameter in student.named_parameters():
        ours = run.bare_model.get_parameter(name).double()
        if not parameter.requires_grad:
            assert torch.equal(ours, before[name])
            continue
        gradient = parameter.grad
        length = gradient.norm()
        if length > 0.05:
            gradient, clipped = gradient * (0.05 / length), clipped + 1
        decay = 0.0 if name.endswith(".bias") or parameter.ndim == 1 else 0.04
        expected = before[name] - lr * (gradient + decay * before[name])
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-6, msg=name)
        moved = momentum * teacher_before[name] + (1 - momentum) * expected
        theirs = run.teacher.get_parameter(name).double()
        torch.testing.assert_close(theirs, moved, rtol=1e-4, atol=2e-6, msg=name)
    assert 0 < clipped < len(before)  # the bound clips some gradients but not all
    expected = 0.9 * center + 0.1 * t.flatten(0, 1).mean(0)
    torch.testing.assert_close(run.dino_loss.center.double(), expected, rtol=1e-4, atol=1e-6)
    # The teacher's BatchNorm statistics are those of its own forward pass over the global views.
    for name, buffer in teacher.named_buffers():
        torch.testing.assert_close(
            run.teacher.get_buffer(name).to(buffer.dtype), buffer, rtol=1e-4, atol=1e-6
        )


def test_the_run_folder_records_what_ran(finished):
    rows = read_metrics(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(12))
    assert rows[0]["schedule/lr"] == 0.0
    assert rows[0]["schedule/teacher_temp"] == 0.04
    assert rows[4]["schedule/teacher_temp"] == 0.06
    for row in rows:
        assert row["train/loss"] == pytest.approx(
            row["health/teacher_entropy"] + row["health/kl"], rel=1e-5
        )
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert (finished / "config.yaml").exists()
    assert not list(finished.glob("checkpoints/.*"))


def test_the_last_layer_is_frozen_in_its_first_epoch_only(photos, tmp_path):
    run = Pretraining(config(photos, tmp_path, drop_path_rate=0), distributed.setup("cpu"))
    layer = run.bare_model.head.last_layer.weight_v
    start = layer.detach().clone()
    for epoch in range(2):
        run.loader.set_epoch(epoch, 0)
        batches = iter(run.loader)
        for step in range(epoch * 4, epoch * 4 + 4):
            engine.train_step(run, batches, step, BatchStatistics(run.modules()))
        assert torch.equal(layer, start) == (epoch == 0)
    run.loader.close()


def test_the_resolved_configuration_repeats_the_run_bit_for_bit(finished, tmp_path):
    again = tmp_path / "again"
    settings = ("--config", str(finished / "config.yaml"))
    result = command(*SCRIPT, *settings, "--out", str(again), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert_same(weights(finished), weights(again))
    third = tmp_path / "third"
    result = command(*SCRIPT, "--config", str(again / "config.yaml"), "--out", str(third))
    assert result.returncode == 0, result.stderr
    assert_same(weights(again), weights(third))
    assert scientific(read_metrics(again / "metrics.jsonl")) == scientific(
        read_metrics(third / "metrics.jsonl")
    )


@pytest.mark.parametrize(
    "script",
    [SCRIPT, pytest.param(SCRIPT[2:], marks=pytest.mark.long)],
    ids=["two blocks", "whole"],
)
def test_kill_9_and_the_same_command_give_the_weights_of_an_uninterrupted_run(
    photos, tmp_path, script
):
    settings = {"epochs": 6, "save_every": 0.001, "log_every": 3}  # kills fall inside an interval
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = command(*script, *flags(photos, whole, **settings))
    assert result.returncode == 0, result.stderr
    kills = 0
    for attempt in range(4):
        process = forked.Popen(
            [sys.executable, *script, *flags(photos, broken, **settings)],
            stdout=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        seen = len(list(broken.glob("checkpoints/step_*")))
        deadline = time.monotonic() + 120
        target = 4 * (attempt + 1) + 1  # in the middle of an epoch
        while process.poll() is None and time.monotonic() < deadline:
            newest = max((int(p.name[5:]) for p in broken.glob("checkpoints/step_*")), default=0)
            if newest >= target:
                break
            time.sleep(0.02)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 3, seen
    result = command(*script, *flags(photos, broken, **settings))
    assert result.returncode == 0, result.stderr
    assert_same(weights(whole), weights(broken))
    rows = read_metrics(broken / "metrics.jsonl")
    assert scientific(rows) == scientific(read_metrics(whole / "metrics.jsonl"))
    assert [row["step"] for row in rows] == list(range(2, 24, 3))


def test_a_finished_run_says_so_and_changes_nothing(photos, finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    train.train(config(photos, finished))
    assert "is finished" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_bytes() == before


def torchrun(world: int, arguments: list[str]) -> None:
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={world}", "--standalone"]
    result = command(*launcher, *arguments[1:], run=subprocess.run)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("start", "depth"),
    [(forked.run_ranks, 2), pytest.param(torchrun, 12, marks=pytest.mark.long)],
)
def test_two_ranks_agree_on_every_parameter_and_equal_two_micro_batches(
    photos, tmp_path, start, depth
):
    """Only ranks x accumulation matters: 2 x 1 and 1 x 2 see the same micro-batches."""
    two, one = tmp_path / "two", tmp_path / "one"
    worker = [PROGRAM, str(depth), str(ROOT / "tests" / "dump_ranks.py")]
    # SGD, because Adam turns rounding noise in vanishing gradients into full-size steps.
    settings = {"batch_size_per_gpu": 6, "drop_path_rate": 0.2, "optimizer": "sgd", "lr": 0.1}
    settings |= {"sync_bn": False}
    start(2, [sys.executable, *worker, *flags(photos, two, **settings)])
    ranks = [torch.load(two / f"rank_{rank}.pt", weights_only=True) for rank in range(2)]
    assert_same(*ranks)
    with networks(depth):
        train.train(config(photos, one, accumulation_steps=2, **settings))
        begun = build_student(photos, tmp_path, **settings)
    ours, theirs = weights(two), weights(one)
    moved = max(
        (ours[f"student/{k}"] - t).abs().max() for k, t in begun.items() if "running" not in k
    )
    assert moved > 1e-2  # the networks have changed, so the agreement below means something
    for name in ours:
        if "running" in name or "num_batches" in name:
            continue  # one process updates them once per micro-batch, two ranks once per step
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)
    for row, other in zip(
        *(read_metrics(out / "metrics.jsonl") for out in (two, one)), strict=True
    ):
        told = {key: value for key, value in row.items() if key.startswith("health/")}
        assert len(told) == 7
        assert told == pytest.approx({key: other[key] for key in told}, rel=1e-3)
    # The folder belongs to the global batch of 12; a different split of it may continue.
    shutil.copytree(one, tmp_path / "moved")
    with networks(depth):
        train.train(config(photos, tmp_path / "moved", **settings | {"batch_size_per_gpu": 12}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arch": "xcit_small_12_p9"}, ["xcit_small_12_p9", "xcit_small_12_p8"]),
        ({"data": "nowhere.beton"}, ["nowhere.beton"]),
        ({"data": "CUT"}, ["cut.beton"]),
        ({"out": "FILE/run"}, ["FILE/run: cannot be written", "choose another place"]),
        ({"batch_size_per_gpu": 49}, ["48", "49"]),
        ({"in_chans": 1, "mean": "[0.5]", "std": "[0.5]"}, ["channels", "--in_chans 3"]),
        ({"probe.every": 1, "probe_train": "no.beton", "probe_test": "no.beton"}, ["no.beton"]),
    ],
)
def test_bad_input_gives_one_clear_line_and_status_2(photos, tmp_path, changes, words):
    (tmp_path / "FILE").write_text("")
    (tmp_path / "cut.beton").write_bytes(photos.read_bytes()[:-30])
    if changes.get("data") == "CUT":
        changes = {"data": tmp_path / "cut.beton"}
    if "out" in changes:
        changes = {"out": tmp_path / changes["out"]}
    arguments = flags(photos, **{"out": tmp_path / "run"} | changes)
    assert_refused(command(str(ROOT / "main_dino.py"), *arguments, cwd=tmp_path), words)
    assert not (tmp_path / "run").exists()


def test_a_new_interpreter_prints_only_the_line_about_bad_input(photos, tmp_path):
    """Imports may print warnings, which forked processes cannot show."""
    arguments = flags(photos, tmp_path / "run", data="nowhere.beton")
    script = str(ROOT / "main_dino.py")
    assert_refused(command(script, *arguments, run=subprocess.run), ["nowhere.beton"])


def assert_refused(result: subprocess.CompletedProcess, words: list[str]) -> None:
    assert result.returncode == 2, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def test_another_configuration_in_the_same_folder_is_refused_and_its_keys_named(photos, finished):
    with pytest.raises(UserError, match=r"optim\.lr: 0\.0005 -> 0\.001.*another --out"):
        train.train(config(photos, finished, lr=0.001))
    with pytest.raises(UserError, match="global batch: 12 -> 24"):
        train.train(config(photos, finished, accumulation_steps=2))
    train.train(config(photos, finished, num_workers=1, log_every=7, save_every=3))


def test_a_loss_that_is_no_longer_finite_stops_the_run_before_it_is_saved(photos, tmp_path):
    with pytest.raises(UserError, match="not finite in 3 steps in a row, from step"):
        train.train(config(photos, tmp_path / "run", lr=1e30, warmup_epochs=0, max_bad_steps=3))
    found, skipped = checkpoint.load_latest(tmp_path / "run" / "checkpoints")
    assert skipped == []
    assert found is None or all(
        torch.isfinite(tensor).all()
        for tensor in found.tensors["student"].values()
        if tensor.is_floating_point()
    )


def test_running_out_of_memory_names_the_options_to_change(photos, tmp_path):
    whole = config(photos, tmp_path)
    named = r"size_per_gpu 12.*--accumulation_steps 1.*, use --crops_in_turn true or --activation_"
    with pytest.raises(UserError, match=named), train.memory_advice(whole):
        torch.empty(2**50)  # raises the allocator's real error
    frugal = config(photos, tmp_path, crops_in_turn=True, activation_checkpointing=True)
    with (
        pytest.raises(UserError, match="the same result, or lower the others"),
        train.memory_advice(frugal),
    ):
        torch.empty(2**50)
    for useless in ({"use_bn_in_head": True}, {"local_crops_number": 0}):
        with (
            pytest.raises(UserError, match="the same result, use --activation_checkpointing true,"),
            train.memory_advice(config(photos, tmp_path, **useless)),
        ):
            torch.empty(2**50)
    with pytest.raises(RuntimeError, match="something else"), train.memory_advice(whole):
        raise RuntimeError("something else")


def test_the_probe_is_logged_and_does_not_change_the_training(photos, finished, tmp_path):
    probed = tmp_path / "probed"
    train.train(
        config(
            photos, probed, **{"probe.every": 1}, probe_train=photos, probe_test=photos,
            probe_k=1, probe_resize=32, probe_crop=32,
        )
    )  # fmt: skip
    rows = [row for row in read_metrics(probed / "metrics.jsonl") if "probe/top1_cls" in row]
    assert [row["step"] for row in rows] == [3, 7, 11]
    # Every image is its own nearest neighbour.
    assert rows[0]["probe/top1_cls"] == rows[0]["probe/top1_patch"] == 100.0
    assert_same(weights(finished), weights(probed))


def test_a_probe_without_labels_is_refused_before_anything_is_written(photos, tmp_path):
    unlabelled = tmp_path / "unlabelled.beton"
    write_beton(photo_tiles(tmp_path / "tiles", 2), unlabelled, labels=False, progress=False)
    probe = {"probe.every": 1, "probe_train": photos, "probe_test": unlabelled}
    with pytest.raises(UserError, match=r"unlabelled\.beton has no labels"):
        train.train(config(photos, tmp_path / "run", **probe))
    assert not (tmp_path / "run").exists()


def test_bf16_training_keeps_float32_weights(photos, tmp_path):
    row = train.train(config(photos, tmp_path / "run", precision="bf16", epochs=1))
    assert math.isfinite(row["train/loss"])
    assert {t.dtype for t in weights(tmp_path / "run").values()} <= {torch.float32, torch.int64}


def test_the_commit_comes_from_git_or_a_code_snapshots_note_and_missing_git_is_no_error(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "ssl_xcit")
    (tmp_path / "ssl_xcit").mkdir()
    assert provenance.commit() is None
    monkeypatch.setenv("PATH", str(tmp_path))  # no git there
    assert provenance.commit() is None
    assert run_folder.versions()["torch"] == torch.__version__
    (tmp_path / "COMMIT").write_text("abc123\n")
    assert provenance.commit() == "abc123"
