"""The demo, in miniature: every stage is the real command on real images."""

import subprocess
from pathlib import Path

import forked
import pytest
import yaml

from ssl_xcit import demo
from ssl_xcit.runtime.errors import UserError

DATASET = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The demo's recipe, cut to one epoch over 128 images."""
    recipe = yaml.safe_load((demo.CONFIGS / "demo.yaml").read_text())
    recipe["optim"]["epochs"] = 1
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(demo, "CONFIGS", tmp_path)
    monkeypatch.setattr(demo, "TRAIN_IMAGES", 128)
    monkeypatch.setattr(demo, "TEST_IMAGES", 40)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize("start", [forked, pytest.param(subprocess, marks=pytest.mark.long)])
@pytest.mark.skipif(not DATASET.exists(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_demo_ends_in_a_table_a_verdict_and_a_report_and_does_nothing_twice(
    small, tmp_path, capsys, monkeypatch, start
):
    monkeypatch.setattr(demo, "subprocess", start)
    out = tmp_path / "out"
    demo.demo(out)
    first = capsys.readouterr().out
    table = first[first.index("top-1 in %") :]
    words = ("raw pixels", "untrained network", "pretrained teacher", "loss", "verdict: ")
    assert all(word in table for word in words)
    report = out / "run/report.html"
    assert table.splitlines()[-1].split() == ["report", str(report)]
    page = report.read_text()
    assert page.count("k-NN, k = 20") == 5
    assert page.count("linear probe, fast") == 2
    assert page.count("head 4") >= 6

    def refuse(*arguments: str) -> None:
        raise AssertionError(f"ran {arguments} again")

    monkeypatch.setattr(demo, "_run", refuse)
    demo.demo(out)
    assert capsys.readouterr().out.strip() == table.strip()

    (out / "notes.txt").write_text("mine")
    demo.forget(out)
    left = {path.name for path in out.iterdir()}
    assert left == {"fashion_train.beton", "fashion_test.beton", "notes.txt"}


def test_a_stage_that_fails_stops_the_demo(monkeypatch, capfd):
    with pytest.raises(UserError, match="ssl-xcit demo --fresh"):
        demo._run("no_such_command")
    assert "no command 'no_such_command'" in capfd.readouterr().err
    interrupted = subprocess.CompletedProcess([], 130)
    monkeypatch.setattr(demo.subprocess, "run", lambda *_, **__: interrupted)
    with pytest.raises(SystemExit) as stopped:
        demo._run("runs")
    assert stopped.value.code == 130
