"""The verdict, on real short trainings made to fail on purpose, and on rows at every threshold."""

import functools
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
import torch
from test_finetune import config as finetune_config
from test_train import ROOT, config, flags, scientific

from ssl_xcit.dino import verdict as module
from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.dino.health import rankme
from ssl_xcit.dino.verdict import recent, verdict
from ssl_xcit.finetune.train import finetune
from ssl_xcit.report.runs import read_verdict
from ssl_xcit.runtime.config import load_config, read_config
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.training.metrics import read_metrics
from ssl_xcit.training.verdict import Verdict

# 56 steps in which the student learns: the spread of the features grows from 0.5 to 0.6
LEARNS = {
    "epochs": 14,
    "warmup_epochs": 4,
    "lr": 0.004,
    "global_crops_scale": "[0.4, 1.0]",
    "local_crops_number": 0,
    "drop_path_rate": 0,
    "out_dim": 64,
    "head_hidden_dim": 64,
    "head_bottleneck_dim": 256,
    "freeze_last_layer": 100,
    "warmup_teacher_temp_epochs": 0,
    "warmup_teacher_temp": 0.04,
    "teacher_temp": 0.04,
    "center_momentum": 0.8,
    "momentum_teacher": 0.9,
}
# One thing wrong each: what the verdict must say, and the option that it must name
FAILURES = {
    "single-prototype collapse": ({"center_momentum": 1}, "--loss.center_momentum"),
    "uniform collapse": ({"teacher_temp": 1, "warmup_teacher_temp": 1}, "--loss.teacher_temp"),
    "diverging": ({"lr": 100}, "--optim.lr"),
    "teacher not moving": ({"momentum_teacher": 1}, "--loss.momentum_teacher"),
}


# main_dino.py whose first argument is how many blocks an xcit_nano_12 has
TRAIN = f"""
import runpy, sys
from ssl_xcit.models.variants import VARIANTS
VARIANTS["xcit_nano_12"] = VARIANTS["xcit_nano_12"]._replace(depth=int(sys.argv.pop(1)))
runpy.run_path({str(ROOT / "main_dino.py")!r}, run_name="__main__")
"""


def train(depth: int, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", TRAIN, str(depth), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return forked.run(command, env=environment, capture_output=True, text=True)


def printed(depth: int, *arguments: str) -> list[str]:
    """The lines of a training that ends well."""
    done = train(depth, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# One block goes wrong as twelve do, in a quarter of the time
@pytest.fixture(scope="module", params=[1, pytest.param(12, marks=pytest.mark.long)])
def depth(request) -> int:
    """How many blocks the networks have."""
    return request.param


def test_a_healthy_run_is_called_healthy_in_log_and_folder_and_its_beginning_too_early(
    photos, tmp_path, depth
):
    out = tmp_path / "run"
    lines = printed(depth, *flags(photos, out, **LEARNS))
    rows, settings = read_metrics(out / "metrics.jsonl"), config(photos, out, **LEARNS)
    names = [verdict(rows[: done + 1], settings).name for done in range(len(rows))]
    early = [row["progress"] < 0.05 for row in rows]
    assert sum(early) == 2
    assert names == ["too early to tell" if first else "healthy" for first in early]
    said = [line for line in lines if line.startswith("verdict: ")]
    assert [line.split(": ")[1] for line in said] == ["too early to tell", "healthy", "healthy"]
    assert said[-1] == lines[-1] == read_verdict(out).text
    assert {1: "spread 0.7", 12: "spread 0.6"}[depth] in said[-1]
    # there is nothing left to do but to say it again
    assert printed(depth, *flags(photos, out, **LEARNS))[-1] == said[-1]


@pytest.fixture(scope="module")
def fail(photos, tmp_path_factory, depth) -> Callable[[str], tuple[Path, list[str]]]:
    """Makes a run fail as named, once: its folder, and what it printed."""

    @functools.cache
    def run(name: str) -> tuple[Path, list[str]]:
        out = tmp_path_factory.mktemp("failed") / "run"
        return out, printed(depth, *flags(photos, out, **LEARNS | FAILURES[name][0]))

    return run


@pytest.mark.parametrize("name", FAILURES)
def test_a_run_made_to_fail_is_called_by_its_name_with_the_option_to_change(fail, name):
    out, lines = fail(name)
    changes, option = FAILURES[name]
    found = read_verdict(out)
    assert found.name == name
    assert found.advice.startswith(option + " ")
    (setting,) = {key for key in changes if not key.startswith("warmup")}
    assert f"{changes[setting]:g}" in found.cause + found.sentence
    assert lines[-1] == found.text
    assert found.cause in found.text
    assert not any("healthy" in line for line in lines[-20:])


def test_loss_that_is_not_finite_is_diverging(photos, tmp_path, depth):
    settings = {"lr": 1e30, "warmup_epochs": 0, "max_bad_steps": 3, "epochs": 3}
    done = train(depth, *flags(photos, tmp_path / "run", **LEARNS | settings))
    assert done.returncode == 2
    assert "not finite" in done.stderr
    assert read_verdict(tmp_path / "run").name == "diverging"


# -- rows ----------------------------------------------------------------------------------------

K = 1024


def settings(**changes) -> TrainConfig:
    given = {"arch": "xcit_nano_12_p8", "data": "a", "out": "b", "out_dim": K, "epochs": 10}
    given |= {"warmup_epochs": 1} | changes
    return load_config(
        TrainConfig,
        argv=[text for key, value in given.items() for text in (f"--{key}", str(value))],
    )


def row(step: int, steps: int = 10_000, **changes) -> dict:
    """A healthy one; `loss` and `entropy` as shares of ln K."""
    given = {"loss": 0.5, "entropy": 0.3, "prototypes": 40.0, "spread": 0.7, "bad": 0, "temp": 0.04}
    given |= changes
    return {
        "step": step,
        "epoch": 10 * step // steps,
        "progress": (step + 1) / steps,
        "train/loss": None if given["loss"] is None else given["loss"] * math.log(K),
        "train/bad_steps": given["bad"],
        "health/teacher_entropy": given["entropy"] * math.log(K),
        "health/kl": 0.2 * math.log(K),
        "health/prototypes": given["prototypes"],
        "health/feature_std": given["spread"],
        "schedule/teacher_temp": given["temp"],
    }


def says(rows: list[dict], **changes) -> str:
    return verdict(rows, settings(**changes)).name


def test_the_first_twentieth_of_a_run_is_too_early_whatever_it_shows():
    dead = {"loss": 1.0, "entropy": 1.0, "spread": 0.0}
    assert says([]) == "too early to tell"
    assert says([row(498, **dead)]) == "too early to tell"
    assert says([row(498, **dead), row(5000)]) == "healthy"
    assert "5.0 %" in verdict([row(498)], settings()).sentence


def test_uniform_outputs_are_a_collapse_once_the_learning_rate_is_warm():
    rows = [row(step, loss=1.0, entropy=0.995) for step in (900, 950, 990)]
    assert says(rows) == "too early to tell"
    assert says([*rows, row(1010, loss=1.0, entropy=0.995)]) == "uniform collapse"
    assert says([row(1010, loss=1.0, entropy=0.985)]) == "healthy"
    # a warm-up as long as the run is no excuse for ever
    assert says([row(1900, entropy=0.995)], warmup_epochs=10) == "too early to tell"
    assert says([row(2100, entropy=0.995)], warmup_epochs=10) == "uniform collapse"


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"teacher_temp": 0.07}, "--loss.teacher_temp 0.04"),
        ({"norm_last_layer": "false"}, "--head.norm_last_layer true"),
        ({"lr": 0.001}, "--optim.lr 0.0005, then --head.out_dim 256"),
    ],
)
def test_the_advice_against_uniform_outputs_is_what_the_configuration_leaves(changes, option):
    found = verdict([row(5000, loss=1.0, entropy=1.0)], settings(**changes))
    assert (found.name, found.advice) == ("uniform collapse", option)


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"center_momentum": 0.999}, "--loss.center_momentum 0.9"),
        ({"teacher_temp": 0.02}, "--loss.teacher_temp 0.04"),
        ({"lr": 0.004}, "--optim.lr 0.001"),
    ],
)
def test_one_prototype_for_all_is_a_collapse(changes, option):
    rows = [row(step, loss=0.01, entropy=0.0, prototypes=1.9) for step in (5000, 5010)]
    found = verdict(rows, settings(**changes))
    assert (found.name, found.advice) == ("single-prototype collapse", option)
    assert says([row(5000, loss=0.01, entropy=0.0, prototypes=2.1)]) == "healthy"


def test_a_loss_that_was_low_and_is_worse_than_nothing_or_of_dead_features_is_diverging():
    low = [row(step, loss=0.4) for step in (1000, 1010)]
    now = [row(step, loss=1.15) for step in range(5000, 5050, 10)]
    assert says(low + now) == "diverging"
    assert says(now) == "healthy"  # it was never better
    between = [row(step, loss=0.7, spread=0.08) for step in range(5000, 5050, 10)]
    assert says(low + between) == "diverging"
    alive = [row(step, loss=0.7, spread=0.5) for step in range(5000, 5050, 10)]
    assert says(low + alive) == "healthy"
    assert says([row(100, loss=0.1), *between]) == "healthy"  # the early part does not count
    spike = [row(step, loss=0.4) for step in range(5000, 5050, 10)] + [row(5050, loss=1.3)]
    assert says(spike) == "healthy"


def test_a_warmer_teacher_may_have_a_higher_loss():
    rows = [row(1000, loss=0.4, spread=0.05, temp=0.04)]
    rows += [row(step, loss=0.7, spread=0.05, temp=0.07) for step in range(2000, 2050, 10)]
    assert says(rows) == "healthy"
    for late in rows:
        late["schedule/teacher_temp"] = 0.07
    assert says(rows) == "diverging"


def test_bad_steps_are_diverging_when_they_are_many():
    assert says([row(5000, bad=3), row(5010, bad=3)]) == "healthy"
    assert says([row(5000, bad=3), row(5100, bad=14)]) == "diverging"
    assert says([row(5000), row(5010, loss=None)]) == "diverging"


def test_a_teacher_stays_where_it_was_by_the_length_of_the_run_not_by_the_schedules_end():
    assert says([row(9_999)], momentum_teacher=0.996) == "healthy"
    assert says([row(999, steps=1000)], momentum_teacher=0.9995) == "teacher not moving"
    assert says([row(99_999, steps=100_000)], momentum_teacher=0.9995) == "healthy"
    found = verdict([row(299, steps=300)], settings(momentum_teacher=0.996))
    assert (found.name, found.advice) == ("teacher not moving", "--loss.momentum_teacher 0.98")
    # what it says is left is what the schedule multiplies
    kept = math.prod(1 - 0.004 * (1 + math.cos(math.pi * step / 300)) / 2 for step in range(300))
    assert f"{100 * kept:.0f} %" in found.sentence
    assert says([row(299, steps=300)], momentum_teacher=0.99) == "healthy"


def test_features_of_few_directions_are_a_dimensional_collapse():
    torch.manual_seed(0)
    for directions, name in ((4, "dimensional collapse"), (64, "healthy")):
        features = torch.randn(500, directions) @ torch.randn(directions, 128)
        rank = rankme(features).item()
        probed = row(4000) | {"health/rankme": rank, "health/rankme_share": rank / 128}
        probed |= {"probe/top1_cls": 12.5}
        found = verdict([probed, row(5000)], settings())
        assert found.name == name
        assert f"RankMe {rank:.1f}" in found.sentence
        assert "k-NN 12.5 %" in found.sentence
    assert says([row(5000, spread=0.005)]) == "dimensional collapse"
    assert says([row(900, spread=0.005)]) == "healthy"  # warming up


def test_a_log_of_an_older_version_is_judged_by_what_it_has():
    old = [
        {"step": 10 * i + 9, "epoch": i // 10, "train/loss": 3.0, "health/teacher_entropy": 2.0}
        for i in range(100)
    ]
    assert says(old) == "healthy"
    bare = [{key: old_row[key] for key in ("step", "epoch", "train/loss")} for old_row in old]
    assert says(bare) == "too early to tell"
    assert "no health figures" in verdict(bare, settings()).sentence


def test_nan_in_memory_and_null_in_the_file_mean_the_same():
    for nothing in (None, math.nan):
        gaps = [row(5000), row(5010) | {"health/feature_std": nothing, "health/kl": nothing}]
        assert says(gaps) == "healthy"
        assert says([row(5000), row(5010) | {"train/loss": nothing}]) == "diverging"


def test_the_few_recent_rows_say_what_all_rows_say():
    draw, facts = random.Random(0), settings(momentum_teacher=0.9)
    for _ in range(20):
        rows, kept, names = [], [], set()
        for step in range(9, 1000, 10):
            new = row(
                step,
                steps=1000,
                loss=draw.choice([0.1, 0.4, 0.8, 1.3]),
                entropy=draw.choice([0.1, 0.995]),
                spread=draw.choice([0.005, 0.05, 0.5]),
                temp=0.04 if step < 300 else 0.07,
            )
            if draw.random() < 0.1:
                share = draw.choice([0.02, 0.3])
                new |= {"health/rankme": 128 * share, "health/rankme_share": share}
            rows.append(new)
            kept = recent([*kept, new])
            assert len(kept) <= 7
            found = verdict(rows, facts)
            assert verdict(kept, facts) == found
            assert verdict(recent(rows), facts) == found
            names.add(found.name)
        assert len(names) >= 3


def test_a_resumed_run_is_judged_by_the_rows_before_too(fail, depth):
    """The loss was low before the stop; alone, the rows after it would look like another thing."""
    out, lines = fail("diverging")
    rows = read_metrics(out / "metrics.jsonl")
    settings = read_config(TrainConfig, out / "config.yaml")
    newest = max((out / "checkpoints").glob("step_*"))
    shutil.rmtree(newest)
    again = printed(depth, "--config", str(out / "config.yaml"))
    begin = next(int(line.split()[-1]) for line in again if line.startswith("resuming"))
    assert 0 < begin < len(rows) == int(newest.name[5:])
    assert again[-1] == lines[-1]
    assert scientific(read_metrics(out / "metrics.jsonl")) == scientific(rows)
    assert verdict(rows[-5:], settings).name != "diverging"


# -- the command ---------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess:
    start = [sys.executable, "-m", "ssl_xcit", "verdict", *arguments]
    return forked.run(start, capture_output=True, text=True, check=False)


def folder(out: Path, rows: list[dict]) -> Path:
    out.mkdir()
    (out / "run.json").write_text('{"format": 1, "kind": "pretraining", "global_batch": 12}\n')
    text = f"arch: xcit_nano_12_p8\ndata: a\nout: {out}\nhead: {{out_dim: {K}}}\n"
    (out / "config.yaml").write_text(text)
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    return out


def test_the_command_prints_one_line_and_needs_no_torch(tmp_path):
    rows = [row(step, loss=1.0, entropy=1.0) for step in range(5000, 5050, 10)]
    done = command(str(folder(tmp_path / "run", rows)))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("verdict: uniform collapse: loss 1.000 ln K, ")
    assert done.stdout.count("\n") == 1
    program = "import sys; import ssl_xcit.report.runs; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_folder_that_is_no_pretraining_is_one_line_and_status_2(photos, tmp_path):
    done = command(str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "not a run folder" in done.stderr
    finetune(finetune_config(photos, tmp_path / "tuned", epochs=1))
    with pytest.raises(UserError, match="got a fine-tuning's"):
        read_verdict(tmp_path / "tuned")


def test_every_name_is_explained_in_the_modules_own_words():
    names = [
        value for key, value in vars(module).items() if key.isupper() and isinstance(value, str)
    ]
    assert len(names) == 7
    assert all(f"\n    {name}  " in module.__doc__ for name in names)
    assert Verdict("healthy", "all is well").text == "verdict: healthy: all is well"
