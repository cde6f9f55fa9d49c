"""Pretraining that starts from weights: what is loaded, what is said, what is refused."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import shallow
import torch
from test_train import config, flags

from ssl_xcit.checkpoints.folder import load_latest, save_checkpoint
from ssl_xcit.dino import train
from ssl_xcit.dino.train import Pretraining
from ssl_xcit.runtime import distributed
from ssl_xcit.runtime.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def _shallow_networks():
    with shallow.networks():
        yield


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "a"
    train.train(config(photos, out, epochs=1))
    return out


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = {"capture_output": True, "text": True, "env": environment, "cwd": cwd}
    return forked.run([sys.executable, *arguments], **options)


def started(photos, tmp_path, source, **changes) -> tuple[Pretraining, list[str]]:
    settings = config(photos, tmp_path / "new", seed=5, **{"init_from": source} | changes)
    task = Pretraining(settings, distributed.setup("cpu"))
    return task, task.initialise()


def same(module: torch.nn.Module, state: dict, prefix: str = "") -> bool:
    own = module.state_dict()
    stored = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
    assert own.keys() == stored.keys()
    return all(torch.equal(own[key], stored[key]) for key in own)


def test_a_run_gives_student_teacher_and_centre_each_its_own(photos, finished, tmp_path):
    task, lines = started(photos, tmp_path, finished)
    found, _ = load_latest(finished / "checkpoints")
    assert same(task.bare_model, found.tensors["student"])
    assert same(task.teacher, found.tensors["teacher"])
    assert same(task.dino_loss, found.tensors["loss"])
    assert not same(task.teacher, found.tensors["student"])
    assert found.tensors["loss"]["center"].abs().max() > 0
    assert re.fullmatch(
        r"student: backbone and head of .*step_00000004 \(student\) loaded", lines[0]
    )
    assert re.fullmatch(
        r"teacher: backbone and head of .*step_00000004 \(teacher\) loaded", lines[1]
    )
    assert lines[2] == "center: loaded"


def test_dinos_full_checkpoint_is_read_with_its_prefixes_and_weight_norm(
    photos, finished, tmp_path
):
    found, _ = load_latest(finished / "checkpoints")
    content = {
        role: {f"module.{key}": tensor for key, tensor in found.tensors[role].items()}
        for role in ("student", "teacher")
    }
    content |= {"dino_loss": found.tensors["loss"], "epoch": 3, "args": argparse.Namespace(a=1)}
    torch.save(content, tmp_path / "dino.pth")
    task, _ = started(photos, tmp_path, tmp_path / "dino.pth")
    assert same(task.bare_model, found.tensors["student"])
    assert same(task.teacher, found.tensors["teacher"])
    assert same(task.dino_loss, found.tensors["loss"])


def test_a_backbone_starts_both_networks_and_head_and_centre_are_fresh(photos, finished, tmp_path):
    found, _ = load_latest(finished / "checkpoints")
    teacher = found.tensors["teacher"]
    backbone = {k.removeprefix("backbone."): t for k, t in teacher.items() if k[:9] == "backbone."}
    torch.save(backbone, tmp_path / "backbone.pth")
    fresh = Pretraining(config(photos, tmp_path, seed=5), distributed.setup("cpu"))
    for source, changes in (
        (tmp_path / "backbone.pth", {}),
        (finished, {"init_parts": "backbone"}),
    ):
        task, lines = started(photos, tmp_path, source, **changes)
        student = teacher if not changes else found.tensors["student"]
        assert same(
            task.bare_model.backbone,
            {k: t for k, t in student.items() if k[:9] == "backbone."},
            "backbone.",
        )
        assert same(
            task.teacher.backbone,
            {k: t for k, t in teacher.items() if k[:9] == "backbone."},
            "backbone.",
        )
        assert same(task.bare_model.head, fresh.bare_model.head.state_dict())
        assert task.dino_loss.center.abs().max() == 0
        left = " (the file's is left out)" if changes else ""
        assert all(line.endswith(f"loaded, head fresh{left}") for line in lines[:2])
        assert lines[2] == f"center: 0{left}"


def test_what_does_not_fit_is_refused_and_named(photos, finished, tmp_path):
    with pytest.raises(
        UserError,
        match=r"head does not fit .* other shapes of last_layer.weight_.*--init_parts backbone",
    ):
        started(photos, tmp_path, finished, out_dim=64)
    started(photos, tmp_path, finished, out_dim=64, init_parts="backbone")
    with pytest.raises(UserError, match="is a xcit_nano_12_p16, this run trains a xcit_nano_12_p8"):
        started(photos, tmp_path, finished, arch="xcit_nano_12_p8")
    found, _ = load_latest(finished / "checkpoints")
    tensors = dict(found.tensors)
    tensors["student"] = {k: t for k, t in tensors["student"].items() if "mlp.2.bias" not in k}
    save_checkpoint(tmp_path / "lacking" / "checkpoints", 4, tensors, {"arch": "xcit_nano_12_p16"})
    with pytest.raises(UserError, match=r"head does not fit this run \(lacks mlp.2.bias\)"):
        started(photos, tmp_path, tmp_path / "lacking")
    with pytest.raises(UserError, match="nowhere"):
        started(photos, tmp_path, tmp_path / "nowhere")


def test_the_command_says_what_was_loaded_once_and_a_resumed_run_needs_the_file_no_more(
    photos, finished, tmp_path
):
    source = tmp_path / "moved"
    finished.rename(source)
    try:
        arguments = flags(photos, tmp_path / "new", init_from=source, epochs=1, seed=5)
        script = [shallow.PROGRAM, "2", str(ROOT / "main_dino.py")]
        done = command(*script, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "center: loaded" in done.stdout
    finally:
        source.rename(finished)
    again = command(*script, *arguments, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "loaded" not in again.stdout


UNTRAINED = ("--random_init", "--arch", "xcit_nano_12_p16")
PICKLES = {
    "main_dino.py": ["--init_from", "{evil}"],
    "eval/knn.py": ["--checkpoint", "{evil}"],
    "eval/linear.py": ["--checkpoint", "{evil}"],
    "eval/linear.py --evaluate": [
        "--evaluate",
        "{evil}",
        "--random_init",
        "--arch",
        "xcit_nano_12_p16",
    ],
    "eval/finetune.py": ["--init", "{evil}"],
    "eval/finetune.py --teacher": ["--from_scratch", "--distill", "soft", "--teacher", "{evil}"],
    "eval/supervised.py": ["--checkpoint", "{evil}", "--resolution", "224"],
    "-m ssl_xcit checkpoint info": ["{evil}"],
}


@pytest.mark.parametrize("entry", PICKLES)
def test_a_pickle_offered_to_a_command_is_refused_and_never_runs(photos, tmp_path, entry):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    evil = tmp_path / "evil.pth"
    torch.save({"teacher": Payload(), "student": Payload(), "state_dict": Payload()}, evil)
    options = [text.format(evil=evil) for text in PICKLES[entry]]
    script, *_ = entry.split(" --")
    start = script.split() if script.startswith("-m") else [str(ROOT / script)]
    data = {
        "main_dino.py": flags(photos, tmp_path / "run"),
        "eval/finetune.py": [
            *("--data", str(photos), "--test", str(photos), "--arch", "xcit_nano_12_p16"),
            *("--out", str(tmp_path / "out"), "--device", "cpu"),
        ],
        "eval/supervised.py": ["--data", str(photos), "--device", "cpu"],
        "eval/knn.py": ["--train", str(photos), "--test", str(photos), "--device", "cpu"],
        "eval/linear.py": [
            *("--test", str(photos), "--device", "cpu"),
            *(("--train", str(photos), "--out", str(tmp_path / "out")) * ("evaluate" not in entry)),
        ],
    }.get(script, [])
    done = command(*start, *options, *data, cwd=tmp_path)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert str(evil) in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "ran").exists()
