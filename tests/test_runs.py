"""The list of runs, of folders as the training, the evaluations and the submission leave them."""

import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import shallow
from test_finetune import config as finetune_config
from test_train import config

from ssl_xcit.dino import train
from ssl_xcit.finetune.train import finetune
from ssl_xcit.report import runs
from ssl_xcit.report.runs import read_verdict
from ssl_xcit.runtime.errors import UserError


def write(path: Path, document: dict | list[dict]) -> None:
    """A document as JSON, or several as lines of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = document if isinstance(document, list) else [document]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_run(out: Path, epochs: int, rows: list[dict], **checkpoint: int) -> None:
    write(out / "run.json", {"format": 1, "kind": "pretraining", "global_batch": 12})
    text = f"arch: xcit_nano_12_p8\ndata: a\nout: {out}\noptim: {{epochs: {epochs}}}\n"
    (out / "config.yaml").write_text(text)
    if rows:
        write(out / "metrics.jsonl", rows)
    if checkpoint:
        write(out / f"checkpoints/step_{checkpoint['step']:08d}/state.json", checkpoint)


def row(step: int, epoch: int, loss: float | None, **others: float) -> dict:
    return {"step": step, "epoch": epoch, "train/loss": loss} | others


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """A PATH whose squeue knows these jobs, or one without any."""

    def know(*lines: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        if lines:
            text = "\n".join(lines)
            (folder / "squeue").write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
            (folder / "squeue").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin" if lines else str(folder))

    return know


def cells(root: Path) -> list[list[str]]:
    """The table's cells; columns are two spaces or more apart, and an empty cell is one, too."""
    lines = runs.list_runs(root).splitlines()
    header = lines[0]
    names = header.split()
    starts = [header.index(name) for name in names] + [None]
    bounds = list(itertools.pairwise(starts))
    return [[line[a:b].strip() for a, b in bounds] for line in lines]


def test_a_row_says_how_far_a_run_is_and_how_good(tmp_path, squeue):
    squeue()
    uniform = {"progress": 0.5, "health/teacher_entropy": math.log(65536)}
    probed = [row(3, 0, 3.5, **{"probe/top1_cls": 41.0}), row(7, 1, 3.25, **uniform)]
    make_run(tmp_path / "r/done", 2, probed, step=8, epoch=2)
    make_run(tmp_path / "r/group/half", 4, probed, step=8, epoch=2)
    make_run(tmp_path / "r/new", 4, [])
    make_run(tmp_path / "r/nan", 4, [row(0, 0, None)])
    results = [{"k": 10, "top1": 50.5}, {"k": 20, "top1": 60.25}]
    write(tmp_path / "r/done/eval/knn.json", {"accuracy": results})
    old = time.time() - 7300
    os.utime(tmp_path / "r/done/metrics.jsonl", (old, old))
    table = cells(tmp_path / "r")
    assert table[0] == ["run", "state", "epoch", "steps", "loss", "k-NN", "logged", "verdict"]
    said = "teacher not moving"  # by 16 steps at a momentum of 0.996
    assert table[1] == ["done", "finished", "2/2", "8", "3.2500", "60.25", "2 h ago", said]
    assert table[2][:6] == ["group/half", "unfinished", "2/4", "8", "3.2500", "41.00"]
    assert table[3][:6] == ["nan", "unfinished", "1/4", "1", "not finite", ""]
    assert table[3][7] == "too early to tell"
    assert table[4] == ["new", "not started", "", "", "", "", "", ""]
    assert cells(tmp_path / "r/done")[1][:2] == ["done", "finished"]


def test_a_sweep_shows_the_values_and_slurm_the_states(tmp_path, squeue):
    squeue("12_0 RUNNING", "12_1 PENDING", "99 RUNNING")
    for number, (lr, name) in enumerate([(0.001, "a"), (0.002, "b"), (0.003, "c")]):
        facts = {"job": f"12_{number}", "sweep": {"optim.lr": lr}}
        write(tmp_path / "s" / name / "slurm/submission.json", facts)
    make_run(tmp_path / "s/a", 4, [row(0, 0, 3.0)], step=1, epoch=0)
    make_run(tmp_path / "s/other", 4, [row(0, 0, 3.0)])
    table = [line[:4] for line in cells(tmp_path / "s")]
    assert table == [
        ["run", "optim.lr", "state", "epoch"],
        ["a", "0.001", "running", "1/4"],
        ["b", "0.002", "pending", ""],
        ["c", "0.003", "not started", ""],
        ["other", "", "unfinished", "1/4"],
    ]


def test_the_table_of_a_sweep_has_the_results_and_what_has_failed(tmp_path, squeue):
    squeue("12_1 FAILED", "12_2 COMPLETED", "14_0 FAILED", "13_1 CANCELLED", "14_1 CANCELLED")
    for number, name in enumerate("abc"):
        evaluations = {"knn": f"13_{number}", "linear": f"14_{number}"}
        facts = {"job": f"12_{number}", "sweep": {"seed": number}, "evaluations": evaluations}
        write(tmp_path / "s" / name / "slurm/submission.json", facts)
    for name in "ac":
        make_run(tmp_path / "s" / name, 1, [row(0, 0, 3.0)], step=1, epoch=1)
    write(tmp_path / "s/a/eval/knn.json", {"accuracy": [{"k": 10, "top1": 50.5}]})
    fast, official = {"top1": 61.5}, {"top1": 62.25}
    write(tmp_path / "s/c/eval/linear/result.json", {"fast": fast, "official": official})
    write(tmp_path / "s/c/eval/finetune/result.json", {"top1": 70.0, "epochs": 1})
    command = [sys.executable, "-m", "ssl_xcit", "runs", str(tmp_path / "s"), "--out"]
    done = forked.run([*command, str(tmp_path / "s/sweep.txt")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "s/sweep.txt").read_text() == done.stdout
    table = [line[:9] for line in cells(tmp_path / "s")]
    head = ["run", "seed", "state", "epoch", "steps", "loss", "k-NN", "linear", "fine-tuning"]
    assert table == [
        head,
        ["a", "0", "finished", "1/1", "1", "3.0000", "50.50", "failed", ""],
        ["b", "1", "failed", "", "", "", "cancelled", "cancelled", ""],
        ["c", "2", "finished", "1/1", "1", "3.0000", "", "62.25", "70.00"],
    ]


def test_a_real_run_and_a_real_fine_tuning_are_listed(photos, tmp_path, squeue):
    out = tmp_path / "r/a"
    with shallow.networks():
        last = train.train(config(photos, out, epochs=1))
        finetune(finetune_config(photos, out / "eval/finetune", epochs=1))
    squeue()
    table = cells(tmp_path / "r")
    assert table[1][:5] == ["a", "finished", "1/1", "4", f"{last['train/loss']:.4f}"]
    assert table[2][:3] == ["a/eval/finetune", "finished", "1/1"]
    said = table[0].index("verdict")
    assert [line[said] for line in table[1:]] == [read_verdict(out).name, ""]


def test_a_line_that_is_being_written_is_left_out(tmp_path, squeue):
    squeue()
    make_run(tmp_path / "a", 4, [row(0, 0, 3.0)])
    with (tmp_path / "a/metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "ep')
    assert cells(tmp_path)[1][3] == "1"


def test_a_folder_without_runs_is_one_line_and_status_2(tmp_path):
    with pytest.raises(UserError, match="no run folder at or below"):
        runs.list_runs(tmp_path)
    command = [sys.executable, "-m", "ssl_xcit", "runs", str(tmp_path / "nowhere")]
    done = forked.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_the_list_needs_no_torch(tmp_path):
    program = "import sys; import ssl_xcit.report.runs; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
