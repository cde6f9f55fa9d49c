"""TensorBoard and Weights & Biases receive the rows of metrics.jsonl, each step once."""

import json
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
from test_health import set_depth
from test_train import ROOT, config, flags

from ssl_xcit.dino import train
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.training.metrics import read_metrics
from ssl_xcit.training.sinks import open_sinks

FAKE = """
import json, pathlib
class errors:
    class Error(Exception): pass
class Run:
    def __init__(self, **arguments):
        self.file = pathlib.Path(arguments["dir"]) / "calls.jsonl"
        self.note({"init": arguments})
    def note(self, call):
        with self.file.open("a") as file:
            file.write(json.dumps(call) + chr(10))
    def log(self, values, step): self.note({"step": step, "values": values})
    def finish(self): self.note({"finish": True})
def init(**arguments):
    if arguments["project"] == "locked":
        raise errors.Error("api_key not configured")
    return Run(**arguments)
"""


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    """Use networks with one block."""
    set_depth(monkeypatch, 1)


def scalars(out: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars that TensorBoard itself reads from a run folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    shown.Reload()
    names = shown.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in shown.Scalars(name)] for name in names}


@pytest.fixture
def fake_wandb(tmp_path, monkeypatch):
    """A fake wandb package that records its calls."""
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "wandb.py").write_text(FAKE)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield
    sys.modules.pop("wandb", None)


def calls(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "calls.jsonl").read_text().splitlines()]


def test_no_sink_is_opened_unless_requested(photos, tmp_path):
    before = set(sys.modules)  # other tests may have imported them
    assert open_sinks(config(photos, tmp_path), 0, True) == []
    assert {"torch.utils.tensorboard", "wandb"}.isdisjoint(set(sys.modules) - before)


def test_tensorboard_shows_the_values_of_metrics_jsonl(photos, tmp_path):
    out = tmp_path / "a"
    train.train(config(photos, out, epochs=1, tensorboard="true"))
    rows, shown = read_metrics(out / "metrics.jsonl"), scalars(out)
    numbers = {key for row in rows for key, value in row.items() if value is not None} - {"step"}
    assert shown.keys() == numbers
    for name, points in shown.items():
        expected = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        np.testing.assert_allclose(points, expected, rtol=1e-6)


def test_tensorboard_shows_each_step_once_after_a_kill_and_a_resume(photos, tmp_path):
    settings = config(photos, tmp_path, tensorboard="true")
    (killed,) = open_sinks(settings, 0, True)
    for step in range(6):
        killed.write({"step": step, "train/loss": float(step), "train/bad": None})
    (resumed,) = open_sinks(settings, 3, True)
    for step in range(3, 8):
        resumed.write({"step": step, "train/loss": 100.0 + step})
    resumed.close()
    before = [(step, float(step)) for step in range(3)]
    assert scalars(tmp_path) == {
        "train/loss": before + [(step, 100.0 + step) for step in range(3, 8)]
    }


def test_wandb_is_told_that_a_resumed_run_is_the_same_one(fake_wandb, photos, tmp_path):
    out = tmp_path / "a"
    settings = config(photos, out, wandb="birds")
    out.mkdir()
    for first in (0, 3):
        (sink,) = open_sinks(settings, first, True)
        sink.write({"step": first, "train/loss": 2.5, "train/bad": None})
        sink.close()
    made = calls(out)
    starts = [call["init"] for call in made if "init" in call]
    assert len(starts) == 2
    assert starts[0] == starts[1]
    assert (starts[0]["project"], starts[0]["resume"], starts[0]["name"]) == ("birds", "allow", "a")
    assert starts[0]["config"]["optim.batch_size_per_gpu"] == 12
    logged = [(call["step"], call["values"]) for call in made if "step" in call]
    assert logged == [(0, {"train/loss": 2.5}), (3, {"train/loss": 2.5})]
    assert [call for call in made if "finish" in call] == [{"finish": True}] * 2
    other = tmp_path / "b"
    other.mkdir()
    open_sinks(config(photos, other, wandb="birds"), 0, True)
    assert calls(other)[0]["init"]["id"] != starts[0]["id"]


def test_a_training_sends_its_rows_to_wandb(fake_wandb, photos, tmp_path):
    out = tmp_path / "a"
    train.train(config(photos, out, epochs=1, wandb="birds"))
    rows = read_metrics(out / "metrics.jsonl")
    sent = [{"step": call["step"]} | call["values"] for call in calls(out) if "step" in call]
    assert sent == rows
    assert calls(out)[-1] == {"finish": True}


def test_other_ranks_open_nothing(fake_wandb, photos, tmp_path):
    assert open_sinks(config(photos, tmp_path, wandb="birds"), 0, False) == []


def test_the_real_wandb_takes_rows_offline(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for first in (0, 3):
        (sink,) = open_sinks(config(photos, tmp_path, wandb="birds"), first, True)
        sink.write({"step": first, "train/loss": 2.5})
        sink.close()
    identity = json.loads((tmp_path / "wandb.json").read_text())["id"]
    folders = list((tmp_path / "wandb").glob("offline-run-*"))
    assert folders
    # Two starts within a second: wandb appends a number to the second folder, after the id.
    assert all(f"-{identity}" in folder.name for folder in folders)


def run_without(package: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run main_dino.py without an installed package."""
    program = (
        f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv = {['x', *arguments]!r}; "
        f"runpy.run_path({str(ROOT / 'main_dino.py')!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", program]
    return forked.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("package", "value"), [("tensorboard", "true"), ("wandb", "birds")])
def test_a_missing_package_is_reported_in_one_line_before_training_starts(
    package, value, photos, tmp_path
):
    out = tmp_path / "a"
    done = run_without(package, *flags(photos, out, **{package: value}))
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert f"pip install {package}" in done.stderr
    assert "epoch" not in done.stdout
    assert not (out / "metrics.jsonl").exists()


def test_an_error_of_wandb_is_reported_in_one_line(fake_wandb, photos, tmp_path):
    with pytest.raises(UserError, match="api_key not configured; log in"):
        open_sinks(config(photos, tmp_path, wandb="locked"), 0, True)


def test_adding_a_sink_does_not_make_it_another_run(photos, tmp_path, fake_wandb):
    out = tmp_path / "a"
    train.train(config(photos, out, epochs=1))
    last = train.train(config(photos, out, epochs=1, wandb="birds"))
    assert last["step"] == 3
