"""Trainings that are killed, stopped, damaged and starved: real processes, real signals.

`make test` does so a few times to a shallow network, `make test-all` many times to a real one, and
`make soak` (SOAK=1) most often.
"""

import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import forked
import pytest
import torch
from shallow import TINY

from ssl_xcit.checkpoints import folder as checkpoint
from ssl_xcit.report.replay import replay
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.runtime.signals import EXIT_STOPPED
from ssl_xcit.training.metrics import read_metrics

TESTS = Path(__file__).parent
SOAK = os.environ.get("SOAK") == "1"
STEPS = 4  # of an epoch

SETTINGS = {  # 32 steps of a shallow XCiT on crops of 32 pixels
    "arch": "xcit_shallow_p16",
    **TINY,
    "batch_size_per_gpu": 12,
    "epochs": 8,
    "warmup_epochs": 1,
    "precision": "fp32",
    "device": "cpu",
    "num_workers": 1,
    "log_every": 1,
    "save_every": 0.005,
    "saveckp_freq": 3,
}
REAL = {"arch": "xcit_nano_12_p16"}
AT_SIZE = {"few": {}, "many": REAL | {"epochs": 10}, "most": REAL | {"epochs": 30}}
often = pytest.mark.parametrize(
    "often", ["most"] if SOAK else ["few", pytest.param("many", marks=pytest.mark.long)]
)


def command(photos: Path, out: Path, **changes) -> list[str]:
    settings = SETTINGS | {"data": photos, "out": out} | changes
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return [sys.executable, str(TESTS / "killed_training.py"), *flags]


def options(environment: dict) -> dict:
    """Of a process with these variables."""
    variables = {key: str(value) for key, value in environment.items()}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return {"env": os.environ | {"OMP_NUM_THREADS": "1"} | variables, **pipes}


def start(arguments: list[str], **environment) -> forked.Popen:
    return forked.Popen(arguments, **options(environment))


def start_ranks(world: int, arguments: list[str], **environment) -> list[forked.Popen]:
    """One process per rank without torchrun, whose agent would end the others by itself."""
    return forked.start_ranks(world, arguments, **options(environment))


@contextmanager
def ended(processes: list[forked.Popen]) -> Iterator[None]:
    """Whatever happens, no process stays."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


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


def wait_for(process: subprocess.Popen, text: str, count: int = 1) -> list[str]:
    """Lines of the process until `text` stands in `count` of them."""
    lines = []
    while sum(text in line for line in lines) < count:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        lines.append(line)
    return lines


def wait_for_steps(process: subprocess.Popen, count: int = 1) -> list[str]:
    """Lines of the process until `count` steps are logged."""
    return wait_for(process, "loss", count)


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of every file of tensors in the last checkpoint."""
    manifest = json.loads((out / "checkpoints" / "last" / "manifest.json").read_text())
    names = ("student", "teacher", "loss", "optimizer", "meters")
    return {name: manifest["files"][f"{name}.safetensors"]["sha256"] for name in names}


def vendor() -> str | None:
    """Of the processor, as Linux has it."""
    found = re.search(r"vendor_id\s*: (\w+)", Path("/proc/cpuinfo").read_text())
    return found and found[1]


def science(out: Path) -> list[dict]:
    """The log without what may differ from run to run."""
    return [
        {key: value for key, value in row.items() if key.split("/")[0] not in ("speed", "memory")}
        for row in read_metrics(out / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def undisturbed(photos, tmp_path_factory) -> Callable[..., Path]:
    """The folder of an undisturbed run with these settings, each trained once."""

    @functools.cache
    def run(**changes) -> Path:
        out = tmp_path_factory.mktemp("undisturbed") / "run"
        train_to_the_end(photos, out, **changes)
        epochs = (SETTINGS | changes)["epochs"]
        assert [row["step"] for row in science(out)] == list(range(STEPS * epochs))
        return out

    return run


def same(a: Path, b: Path) -> None:
    assert digests(a) == digests(b)
    assert science(a) == science(b)


# --- kill -9 -----------------------------------------------------------------------------------


@often
def test_killed_anywhere_and_inside_of_saves_a_run_ends_as_if_undisturbed(
    photos, undisturbed, tmp_path, often
):
    in_saves, anywhere = {"few": (4, 2), "many": (10, 5), "most": (25, 25)}[often]
    out, draw, settings = tmp_path / "run", random.Random(0), AT_SIZE[often]
    arguments = command(photos, out, **settings)
    epochs = (SETTINGS | settings)["epochs"]
    kept = {STEPS * epoch for epoch in range(3, epochs + 1, 3)}  # for good, by saveckp_freq
    points = [1 + (i * 41) // in_saves for i in range(in_saves)]  # within two saves
    plan = [("save", point) for point in points] + [("any", 0)] * anywhere
    draw.shuffle(plan)
    killed = {"save": 0, "any": 0}
    for kind, point in plan:
        if kind == "save":
            status, _, error = finish(start(arguments, KILL_AT=point))
            assert status == -signal.SIGKILL, error  # else the run was over before
        else:
            process = start(arguments)
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
        assert len(complete) <= 2 + 1 + len(kept)  # the newest two, one being pruned, those kept
    assert killed == {"save": in_saves, "any": anywhere}
    assert found is not None
    train_to_the_end(photos, out, **settings)
    same(out, undisturbed(**settings))
    names = {path.name for path in (out / "checkpoints").glob("step_*")}
    assert names >= {f"step_{step:08d}" for step in kept}


# --- signals -----------------------------------------------------------------------------------


@often
def test_a_signal_at_any_instant_loses_no_finished_step(photos, undisturbed, tmp_path, often):
    out, draw = tmp_path / "run", random.Random(1)
    # saving is left to the signal; each may take four steps
    settings = AT_SIZE[often] | {"save_every": 1000, "saveckp_freq": 0}
    answered = []
    for trial in range({"few": 3, "many": 6, "most": 20}[often]):
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
    same(out, undisturbed(**AT_SIZE[often]))


def test_before_the_first_step_there_is_nothing_to_save_and_a_signal_ends_at_once(photos, tmp_path):
    process = start(command(photos, tmp_path / "run"))
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "config.yaml").exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    status, _, error = finish(process)
    assert status == EXIT_STOPPED, error
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_signal_during_an_evaluation_is_answered_there_and_the_record_is_made_up_for(
    photos, tmp_path
):
    probe = {"probe.every": 1, "probe_train": photos, "probe_test": photos, "probe_k": 1}
    probe |= {"probe_resize": 64, "probe_crop": 64}
    settings = {"save_every": 1000, "saveckp_freq": 0, "epochs": 2, **probe}
    whole = tmp_path / "whole"
    train_to_the_end(photos, whole, **settings)
    out = tmp_path / "run"
    process = start(command(photos, out, **settings), HOLD_EVALUATION=1)
    wait_for(process, "half-way through an evaluation")
    process.send_signal(signal.SIGUSR2)
    status, text, error = finish(process)
    assert status == EXIT_STOPPED, error
    assert "after 4 of 8 steps" in text
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl")] == list(range(3))
    train_to_the_end(photos, out, **settings)
    same(out, whole)
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows if "probe/top1_cls" in row] == [3, 7]


# --- ranks -------------------------------------------------------------------------------------


@often
@pytest.mark.parametrize("world", [2, 4])
def test_a_signal_to_one_rank_stops_all_ranks_after_the_same_step(photos, tmp_path, world, often):
    draw = random.Random(world)
    few = {2: (2, 4), 4: (1, 2)}[world]
    trials, epochs = {"few": few, "many": (3, 5), "most": (10, 20)}[often]
    settings = AT_SIZE[often] | {"batch_size_per_gpu": 12 // world, "epochs": epochs}
    settings |= {"save_every": 1000, "saveckp_freq": 0}

    def train_ranks_to_the_end(out: Path) -> None:
        processes = start_ranks(world, command(photos, out, **settings))
        with ended(processes):
            assert [process.wait(timeout=300) for process in processes] == [0] * world

    whole, out = tmp_path / "whole", tmp_path / "run"
    train_ranks_to_the_end(whole)
    for trial in range(trials):
        left = tmp_path / f"left_{trial}"
        left.mkdir()
        processes = start_ranks(world, command(photos, out, **settings), LEFT=left)
        with ended(processes):
            wait_for_steps(processes[0], draw.randrange(1, 4))
            processes[(trial + 1) % world].send_signal(signal.SIGTERM)
            status = [process.wait(timeout=120) for process in processes]
        assert status == [EXIT_STOPPED] * world
        steps = {(left / f"left_{rank}").read_text() for rank in range(world)}
        assert len(steps) == 1
        found, _ = checkpoint.load_latest(out / "checkpoints")
        assert str(found.state["step"]) == steps.pop()
    train_ranks_to_the_end(out)
    same(out, whole)


def test_a_rank_that_dies_takes_the_others_with_it_and_leaves_nothing_half_written(
    photos, tmp_path
):
    out = tmp_path / "run"
    processes = start_ranks(2, command(photos, out, batch_size_per_gpu=6))
    with ended(processes):
        wait_for(processes[0], "saved ")
        processes[1].kill()
        died = time.monotonic()
        assert processes[0].wait(timeout=20) not in (0, None)
        assert time.monotonic() - died < 20
    found, skipped = checkpoint.load_latest(out / "checkpoints")
    assert skipped == []
    assert found is not None


def test_a_rank_that_raises_ends_all_ranks_with_its_cause_in_the_log(photos, tmp_path):
    """Such as for a file that only one rank finds damaged."""
    processes = start_ranks(
        2, command(photos, tmp_path / "run", batch_size_per_gpu=6), RAISE_AT_STEP=3
    )
    with ended(processes):
        (first, text, _), (second, _, error) = (finish(process, 60) for process in processes)
    assert 0 not in (first, second)
    assert "the cause of it" in error
    assert "step 4/" not in text


@pytest.mark.long
def test_under_torchrun_a_rank_that_raises_ends_the_run_with_its_cause_in_the_log(photos, tmp_path):
    arguments = command(photos, tmp_path / "run", batch_size_per_gpu=6)[1:]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    began = subprocess.Popen(
        [*launcher, "--nproc-per-node=2", *arguments], **options({"RAISE_AT_STEP": 3})
    )
    status, text, error = finish(began, timeout=120)
    assert status != 0
    assert "the cause of it" in error
    assert "step 4/" not in text


def test_a_rank_that_stalls_is_named_and_the_others_end(photos, tmp_path):
    changes = {"batch_size_per_gpu": 6, "stall_timeout": 4, "epochs": 1000}
    processes = start_ranks(2, command(photos, tmp_path / "run", **changes))
    with ended(processes):
        wait_for_steps(processes[0], 3)
        time.sleep(2)  # where they are they tell each other once a second
        processes[1].send_signal(signal.SIGSTOP)
        assert processes[0].wait(timeout=60) == 1
        error = processes[0].stderr.read()
    assert re.search(r"error: rank 0 has waited for rank 1 \(at step \d+\) for 4 s; it ends", error)


# --- damaged files and full disks --------------------------------------------------------------


@pytest.fixture(scope="module")
def two_checkpoints(undisturbed, tmp_path_factory) -> Path:
    """A folder of the newest two checkpoints."""
    folder = tmp_path_factory.mktemp("damaged") / "checkpoints"
    for path in sorted((undisturbed() / "checkpoints").glob("step_*"))[-2:]:
        shutil.copytree(path, folder / path.name)
    return folder


@often
def test_a_checkpoint_cut_or_altered_anywhere_is_skipped_with_the_reason(two_checkpoints, often):
    damages = 25 if often == "few" else 100
    older, newer = sorted(two_checkpoints.iterdir())
    draw = random.Random(3)
    files = sorted(newer.iterdir())
    total = sum(file.stat().st_size for file in files)
    for trial in range(2 * damages):
        if trial % 4 == 0:  # the small files, too
            file = draw.choice([file for file in files if file.suffix == ".json"])
            place = draw.randrange(file.stat().st_size)
        else:
            place = draw.randrange(total)
            for file in files:
                if place < file.stat().st_size:
                    break
                place -= file.stat().st_size
        data = file.read_bytes()
        if trial < damages:
            file.write_bytes(data[:place])
        else:
            altered = bytearray(data)
            altered[place] ^= 1 << draw.randrange(8)
            file.write_bytes(altered)
        found, skipped = checkpoint.load_latest(two_checkpoints)
        file.write_bytes(data)
        if not skipped:  # a flip in the manifest's white space
            assert file.name == "manifest.json"
            assert trial >= damages
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
    shutil.copytree(undisturbed(), out, symlinks=True)
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
    size = sum(f.stat().st_size for f in (undisturbed() / "checkpoints" / "last").iterdir())
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
        same(out, undisturbed())


def test_a_read_only_folder_is_refused_in_one_line_at_the_start_and_in_the_middle(photos, tmp_path):
    disk, out = tmp_path / "disk", tmp_path / "run"
    with mounted(disk, "size=1g"):
        out.mkdir()
        # The log, open all the time, would keep its own filesystem writable
        (out / "checkpoints").symlink_to(disk)
        process = start(command(photos, out))
        wait_for_steps(process)
        read_only = ["mount", "-o", "remount,ro", str(disk)]
        while subprocess.run(read_only, capture_output=True, check=False).returncode:
            assert process.poll() is None  # it is being written to
        status, _, error = finish(process)
        assert status == 2
        (line,) = [line for line in error.splitlines() if "error: " in line]
        assert line.startswith(f"error: cannot write the checkpoint {out}")
        assert "Read-only" in line
        status, _, error = finish(start(command(photos, disk / "other")))
        assert status == 2
        assert re.match(r"error: .*other: cannot be written: Read-only", error)
        assert len(error.splitlines()) == 1


# --- bad numbers -------------------------------------------------------------------------------


def test_a_run_that_diverges_gives_up_and_leaves_what_is_needed_to_see_it_again(photos, tmp_path):
    out = tmp_path / "run"
    settings = REAL | {"lr": 1e30, "warmup_epochs": 0, "max_bad_steps": 4}
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
    status, text, error = finish(start([sys.executable, "-m", "ssl_xcit", "replay", str(out)]))
    assert status == 0, error
    assert re.search(rf"step {first}, micro-batch 0: loss nan; first output that is not", text)
    assert f"images {', '.join(map(str, found.state['images'][0]))}" in text
    with pytest.raises(UserError, match="holds no bad step: it has not given up"):
        list(replay(tmp_path))


# --- a known run --------------------------------------------------------------------------------

CURVE = TESTS / "fixtures" / "loss_curve.json"


@often
def test_the_steps_of_a_run_follow_the_committed_losses(photos, tmp_path, often):
    """Exact on the torch and processor the curve was made with, within 1e-4 elsewhere."""
    out, steps = tmp_path / "run", 12 if often == "few" else 200
    settings = REAL | {"epochs": 50, "save_every": 1000, "saveckp_freq": 0, "lr": 1e-4}
    if often == "few":  # the beginning of the same run
        process = start(command(photos, out, **settings))
        wait_for(process, f"step {steps}/")
        process.kill()
        finish(process)
    else:
        train_to_the_end(photos, out, **settings)
    losses = [row["train/loss"] for row in science(out)][:steps]
    assert len(losses) == steps
    machine = {
        "torch": torch.__version__.split("+")[0],
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "vendor": vendor(),  # oneDNN sums in another order on another one's processors
    }
    if os.environ.get("WRITE_CURVE") == "1" and often != "few":
        CURVE.write_text(json.dumps({**machine, "losses": losses}) + "\n")
    committed = json.loads(CURVE.read_text())
    expected = committed["losses"][:steps]
    assert losses == pytest.approx(expected, rel=1e-4)
    if machine == {key: committed[key] for key in machine}:
        assert losses == pytest.approx(expected, rel=1e-6)
