"""Trainings that are killed, stopped, damaged and starved: real processes, real signals.

The counts are a share of the full ones, which `make soak` runs (SOAK=1).
"""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ssl_xcit import checkpoint
from ssl_xcit.errors import UserError
from ssl_xcit.metrics import read_metrics
from ssl_xcit.replay import replay
from ssl_xcit.signals import EXIT_STOPPED

TESTS = Path(__file__).parent
SOAK = os.environ.get("SOAK") == "1"
KILLS_IN_SAVES, KILLS_ANYWHERE = (25, 25) if SOAK else (10, 5)
SIGNALS, RANK_TRIALS = (20, 20) if SOAK else (6, 6)
DAMAGES = 100

SETTINGS = {  # 40 steps of an xcit_nano_12_p16 on crops of 32 pixels
    "arch": "xcit_nano_12_p16",
    "global_crops_size": 32,
    "local_crops_number": 2,
    "local_crops_size": 16,
    "out_dim": 32,
    "head_hidden_dim": 32,
    "head_bottleneck_dim": 16,
    "batch_size_per_gpu": 12,
    "epochs": 10,
    "warmup_epochs": 1,
    "precision": "fp32",
    "device": "cpu",
    "num_workers": 1,
    "log_every": 1,
    "save_every": 0.005,
    "saveckp_freq": 3,
}


def command(photos: Path, out: Path, **changes) -> list[str]:
    settings = SETTINGS | {"data": photos, "out": out} | changes
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return [sys.executable, str(TESTS / "killed_training.py"), *flags]


def start(arguments: list[str], **environment) -> subprocess.Popen:
    environment = {key: str(value) for key, value in environment.items()}
    return subprocess.Popen(
        arguments,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, timeout: float = 300) -> tuple[int, str, str]:
    try:
        out, error = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return process.returncode, out, error


def train_to_the_end(photos: Path, out: Path, **changes) -> None:
    status, _, error = finish(start(command(photos, out, **changes)))
    assert status == 0, error


def wait_for_steps(process: subprocess.Popen, count: int = 1) -> list[str]:
    """Lines of the process until `count` steps are logged."""
    lines = []
    while sum("loss" in line for line in lines) < count:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        lines.append(line)
    return lines


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of every file of tensors in the last checkpoint."""
    manifest = json.loads((out / "checkpoints" / "last" / "manifest.json").read_text())
    names = ("student", "teacher", "loss", "optimizer", "meters")
    return {name: manifest["files"][f"{name}.safetensors"]["sha256"] for name in names}


def science(out: Path) -> list[dict]:
    """The log without what may differ from run to run."""
    return [
        {key: value for key, value in row.items() if key.split("/")[0] not in ("speed", "memory")}
        for row in read_metrics(out / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def undisturbed(photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    train_to_the_end(photos, out)
    assert [row["step"] for row in science(out)] == list(range(40))
    return out


def same(a: Path, b: Path) -> None:
    assert digests(a) == digests(b)
    assert science(a) == science(b)


# --- kill -9 -----------------------------------------------------------------------------------


def test_killed_anywhere_and_inside_of_saves_a_run_ends_as_if_undisturbed(
    photos, undisturbed, tmp_path
):
    out, draw = tmp_path / "run", random.Random(0)
    points = [1 + (i * 41) // KILLS_IN_SAVES for i in range(KILLS_IN_SAVES)]  # within two saves
    plan = [("save", point) for point in points] + [("any", 0)] * KILLS_ANYWHERE
    draw.shuffle(plan)
    killed = {"save": 0, "any": 0}
    for kind, point in plan:
        if kind == "save":
            status, _, error = finish(start(command(photos, out), KILL_AT=point))
            assert status == -signal.SIGKILL, error  # else the run was over before
        else:
            process = start(command(photos, out))
            if draw.random() < 0.8:
                wait_for_steps(process)
            time.sleep(draw.uniform(0, 0.3))
            process.kill()
            status, *_ = finish(process)
            assert status == -signal.SIGKILL
        killed[kind] += 1
        found, skipped = checkpoint.load_latest(out / "checkpoints")
        assert skipped == []  # a published checkpoint is complete
        complete = [path for path in (out / "checkpoints").glob("step_*") if path.is_dir()]
        assert len(complete) <= 2 + 1 + 4  # the newest two, one being pruned, those kept for good
    assert killed == {"save": KILLS_IN_SAVES, "any": KILLS_ANYWHERE}
    assert found is not None
    train_to_the_end(photos, out)
    same(out, undisturbed)
    kept = {path.name for path in (out / "checkpoints").glob("step_*")}
    assert kept >= {f"step_{4 * epochs:08d}" for epochs in (3, 6, 9)}


# --- signals -----------------------------------------------------------------------------------


def test_a_signal_at_any_instant_loses_no_finished_step(photos, undisturbed, tmp_path):
    out, draw = tmp_path / "run", random.Random(1)
    # saving is left to the signal; each may take four steps
    settings = {"save_every": 1000, "saveckp_freq": 0}
    if SOAK:
        settings["epochs"] = 30
        undisturbed = tmp_path / "undisturbed"
        train_to_the_end(photos, undisturbed, **settings)
    answered = []
    for trial in range(SIGNALS):
        process = start(command(photos, out, **settings))
        seen = wait_for_steps(process, draw.randrange(1, 3))
        time.sleep(draw.uniform(0, 0.05))
        number = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)[trial % 3]
        process.send_signal(number)
        if trial % 2:
            time.sleep(draw.uniform(0, 0.02))
            process.send_signal(signal.SIGTERM)  # a second one does no harm
        status, text, error = finish(process)
        assert status == EXIT_STOPPED, error
        seen += text.splitlines()
        (line,) = [line for line in seen if line.startswith("stopped by")]
        assert line.startswith(f"stopped by {signal.Signals(number).name} after ")
        rows = read_metrics(out / "metrics.jsonl")
        found, skipped = checkpoint.load_latest(out / "checkpoints")
        assert skipped == []
        steps = found.state["step"]
        # Every finished step is saved; the last one's row may be made up for later
        assert rows[-1]["step"] + 1 <= steps <= rows[-1]["step"] + 2
        answered.append(steps)
    assert answered == sorted(set(answered))
    train_to_the_end(photos, out, **settings)
    assert digests(out) == digests(undisturbed)
    assert science(out) == science(undisturbed)


def test_before_the_first_step_there_is_nothing_to_save_and_a_signal_ends_at_once(photos, tmp_path):
    process = start(command(photos, tmp_path / "run"))
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "config.yaml").exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    status, _, error = finish(process)
    assert status == EXIT_STOPPED, error


def test_a_signal_during_an_evaluation_is_answered_there_and_the_record_is_made_up_for(
    photos, tmp_path
):
    probe = {"probe.every": 5, "probe_train": photos, "probe_test": photos, "probe_k": 1}
    probe |= {"probe_resize": 448, "probe_crop": 448}  # seconds
    settings = {"save_every": 1000, "saveckp_freq": 0, **probe}
    whole = tmp_path / "whole"
    train_to_the_end(photos, whole, **settings)
    out = tmp_path / "run"
    process = start(command(photos, out, **settings))
    wait_for_steps(process, 19)
    time.sleep(0.5)  # the 20th is followed by the probe
    process.send_signal(signal.SIGUSR2)
    status, text, error = finish(process)
    assert status == EXIT_STOPPED, error
    assert "after 20 of 40 steps" in text
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl")] == list(range(19))
    train_to_the_end(photos, out, **settings)
    same(out, whole)
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows if "probe/top1_cls" in row] == [19, 39]


# --- ranks -------------------------------------------------------------------------------------


def start_ranks(arguments: list[str], world: int, **environment) -> list[subprocess.Popen]:
    """One process per rank without torchrun, whose agent would end the others by itself."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sock.getsockname()[1]}
    ranks = [{"RANK": r, "LOCAL_RANK": r, "WORLD_SIZE": world} for r in range(world)]
    return [start(arguments, **place, **rank, **environment) for rank in ranks]


@contextmanager
def ended(processes: list[subprocess.Popen]):
    """Whatever happens, no process stays."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_signal_to_one_rank_stops_all_ranks_after_the_same_step(photos, tmp_path):
    draw = random.Random(2)
    whole = {}
    for world in (2, 4):
        settings = {"batch_size_per_gpu": 12 // world, "save_every": 1000, "saveckp_freq": 0}
        settings["epochs"] = 20 if SOAK else 5
        whole[world] = tmp_path / f"whole_{world}"
        processes = start_ranks(command(photos, whole[world], **settings), world)
        with ended(processes):
            assert [process.wait(timeout=300) for process in processes] == [0] * world
        out = tmp_path / f"run_{world}"
        for trial in range(RANK_TRIALS // 2):
            left = tmp_path / f"left_{world}_{trial}"
            left.mkdir()
            arguments = command(photos, out, **settings)
            processes = start_ranks(arguments, world, LEFT=left)
            with ended(processes):
                wait_for_steps(processes[0], draw.randrange(1, 4))
                processes[draw.randrange(world)].send_signal(signal.SIGTERM)
                status = [process.wait(timeout=120) for process in processes]
            assert status == [EXIT_STOPPED] * world
            steps = {(left / f"left_{rank}").read_text() for rank in range(world)}
            assert len(steps) == 1
            found, _ = checkpoint.load_latest(out / "checkpoints")
            assert str(found.state["step"]) == steps.pop()
        processes = start_ranks(command(photos, out, **settings), world)
        with ended(processes):
            assert [process.wait(timeout=300) for process in processes] == [0] * world
        same(out, whole[world])


def test_a_rank_that_dies_takes_the_others_with_it_and_leaves_nothing_half_written(
    photos, tmp_path
):
    out = tmp_path / "run"
    processes = start_ranks(command(photos, out, batch_size_per_gpu=6), 2)
    with ended(processes):
        wait_for_steps(processes[0], 3)
        processes[1].kill()
        died = time.monotonic()
        assert processes[0].wait(timeout=20) not in (0, None)
        assert time.monotonic() - died < 20
    found, skipped = checkpoint.load_latest(out / "checkpoints")
    assert skipped == []
    assert found is not None


def test_a_rank_that_raises_ends_the_run_with_its_cause_in_the_log(photos, tmp_path):
    """Under torchrun, with a file that only one rank finds damaged."""
    arguments = command(photos, tmp_path / "run", batch_size_per_gpu=6)[1:]
    script = tmp_path / "raise.py"
    script.write_text(
        "import os, runpy, sys\n"
        "from ssl_xcit.train import Pretraining\n"
        "loss = Pretraining.loss\n"
        "def failing(task, batch, step, micro):\n"
        "    if step == 3 and task.ranks.rank == 1:\n"
        "        raise RuntimeError('the cause of it')\n"
        "    return loss(task, batch, step, micro)\n"
        "Pretraining.loss = failing\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    began = start([*launcher, "--nproc-per-node=2", str(script), *arguments])
    status, text, error = finish(began, timeout=120)
    assert status != 0
    assert "the cause of it" in error
    assert "step 4/" not in text


def test_a_rank_that_stalls_is_named_and_the_others_end(photos, tmp_path):
    arguments = command(photos, tmp_path / "run", batch_size_per_gpu=6, stall_timeout=4)
    processes = start_ranks(arguments, 2)
    with ended(processes):
        wait_for_steps(processes[0], 3)
        processes[1].send_signal(signal.SIGSTOP)
        assert processes[0].wait(timeout=60) == 1
        error = processes[0].stderr.read()
    assert re.search(r"error: rank 0 has waited for rank 1 \(at step \d+\) for 4 s; it ends", error)


# --- damaged files and full disks --------------------------------------------------------------


@pytest.fixture(scope="module")
def two_checkpoints(undisturbed, tmp_path_factory) -> Path:
    """A folder of the newest two checkpoints."""
    folder = tmp_path_factory.mktemp("damaged") / "checkpoints"
    for path in sorted((undisturbed / "checkpoints").glob("step_*"))[-2:]:
        shutil.copytree(path, folder / path.name)
    return folder


def test_a_checkpoint_cut_or_altered_anywhere_is_skipped_with_the_reason(two_checkpoints):
    older, newer = sorted(two_checkpoints.iterdir())
    draw = random.Random(3)
    files = sorted(newer.iterdir())
    total = sum(file.stat().st_size for file in files)
    for trial in range(2 * DAMAGES):
        place = draw.randrange(total) if trial % 4 else draw.randrange(files[1].stat().st_size)
        if trial % 4 == 0:  # the small files, too
            file = draw.choice([file for file in files if file.suffix == ".json"])
            place = draw.randrange(file.stat().st_size)
        else:
            for file in files:
                if place < file.stat().st_size:
                    break
                place -= file.stat().st_size
        data = file.read_bytes()
        if trial < DAMAGES:
            file.write_bytes(data[:place])
        else:
            altered = bytearray(data)
            altered[place] ^= 1 << draw.randrange(8)
            file.write_bytes(altered)
        found, skipped = checkpoint.load_latest(two_checkpoints)
        file.write_bytes(data)
        if not skipped:  # a flip in the manifest's white space
            assert file.name == "manifest.json"
            assert trial >= DAMAGES
            assert data[place : place + 1].isspace()
            continue
        assert found.path == older
        (line,) = skipped
        assert str(newer) in line
        assert "\n" not in line


def test_when_all_checkpoints_are_damaged_the_run_is_refused_not_begun_anew(
    photos, undisturbed, tmp_path
):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out, symlinks=True)
    for path in (out / "checkpoints").glob("step_*"):
        (path / "student.safetensors").write_bytes(b"cut")
    before = sorted(path.name for path in (out / "checkpoints").iterdir())
    log = (out / "metrics.jsonl").read_bytes()
    for _ in range(2):
        status, text, error = finish(start(command(photos, out)))
        assert status == 2
        assert "none of the" in error
        assert len(error.splitlines()) == 1
        assert text.count("skipped: ") == len(before) - 1  # `last` is a link
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == before
    assert (out / "metrics.jsonl").read_bytes() == log


@contextmanager
def mounted(folder: Path, options: str):
    """A small filesystem of its own at `folder`."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a small disk here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_ends_in_one_line_keeps_what_is_there_and_continues_when_there_is_room(
    photos, undisturbed, tmp_path
):
    disk = tmp_path / "disk"
    size = sum(f.stat().st_size for f in (undisturbed / "checkpoints" / "last").iterdir())
    with mounted(disk, f"size={int(2.5 * size)}"):
        out = disk / "run"
        status, _, error = finish(start(command(photos, out)))
        assert status == 2
        assert error.splitlines()[-1].startswith(f"error: cannot write the checkpoint {out}")
        assert "No space left" in error
        assert "free some space" in error
        found, skipped = checkpoint.load_latest(out / "checkpoints")
        assert found.state["step"] > 0
        assert skipped == []
        assert not list((out / "checkpoints").glob(".writing*"))
        subprocess.run(["mount", "-o", f"remount,size={20 * size}", str(disk)], check=True)
        train_to_the_end(photos, out)
        same(out, undisturbed)


def test_a_read_only_folder_is_refused_in_one_line_at_the_start_and_in_the_middle(photos, tmp_path):
    disk = tmp_path / "disk"
    with mounted(disk, "size=64m"):
        out = disk / "run"
        process = start(command(photos, out))
        wait_for_steps(process, 2)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=False)
        # Open files keep a filesystem writable: then nothing has happened
        status, _, error = finish(process)
        assert status in (0, 2), error
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        status, _, error = finish(start(command(photos, disk / "other")))
        assert status == 2
        assert re.match(r"error: cannot write the run folder .*Read-only", error)
        assert len(error.splitlines()) == 1


# --- bad numbers -------------------------------------------------------------------------------


def test_a_run_that_diverges_gives_up_and_leaves_what_is_needed_to_see_it_again(photos, tmp_path):
    out = tmp_path / "run"
    settings = {"lr": 1e30, "warmup_epochs": 0, "max_bad_steps": 4}
    status, _, error = finish(start(command(photos, out, **settings)))
    assert status == 2
    assert "not finite in 4 steps in a row, from step" in error
    assert "error: " in error
    assert len(error.splitlines()) == 1
    first = int(re.search(r"from step (\d+) on", error)[1])
    for found, skipped in map(checkpoint.load_latest, (out / "checkpoints", out / "bad_step")):
        assert skipped == []
        assert all(
            tensor.isfinite().all() for group in found.tensors.values() for tensor in group.values()
        )
    assert found.state["step"] == first
    assert len(found.state["images"][0]) == 12
    status, text, error = finish(start([sys.executable, "-m", "ssl_xcit.replay", str(out)]))
    assert status == 0, error
    assert re.search(rf"step {first}, micro-batch 0: loss nan; first output that is not", text)
    assert f"images {', '.join(map(str, found.state['images'][0]))}" in text
    with pytest.raises(UserError, match="holds no bad step: it has not given up"):
        replay(tmp_path)


# --- a known run --------------------------------------------------------------------------------

CURVE = TESTS / "fixtures" / "loss_curve.json"


def test_two_hundred_steps_follow_the_committed_losses(photos, tmp_path):
    """Exact on the torch and processor the curve was made with, within 1e-4 elsewhere."""
    out = tmp_path / "run"
    settings = {"epochs": 50, "save_every": 1000, "saveckp_freq": 0, "lr": 1e-4}
    train_to_the_end(photos, out, **settings)
    losses = [row["train/loss"] for row in science(out)]
    assert len(losses) == 200
    machine = {
        "torch": torch.__version__.split("+")[0],
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    if os.environ.get("WRITE_CURVE") == "1":
        CURVE.write_text(json.dumps({**machine, "losses": losses}) + "\n")
    committed = json.loads(CURVE.read_text())
    assert losses == pytest.approx(committed["losses"], rel=1e-4)
    if machine == {key: committed[key] for key in machine}:
        assert losses == pytest.approx(committed["losses"], rel=1e-6)
