"""metrics.jsonl holds each step once, whatever happens to the process that writes it."""

import json
import math

import torch

from ssl_xcit.runtime.sealed import unseal
from ssl_xcit.training.metrics import MetricsWriter, RunningMeans, read_metrics


def test_rows_after_the_checkpoint_and_an_incomplete_line_are_dropped_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    for step in range(6):
        writer.write({"step": step, "train/loss": 1 / 3 + step})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 6, "train/lo')  # the process died here
    resumed = MetricsWriter(path, first_step=4)
    resumed.write({"step": 4, "train/loss": 0.0})
    resumed.close()
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[2]["train/loss"] == 1 / 3 + 2  # floats are preserved to the last bit
    assert rows[4]["train/loss"] == 0.0


def test_a_run_that_starts_over_begins_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n')
    MetricsWriter(path, first_step=0).close()
    assert path.read_text() == ""


def test_every_line_is_json_in_any_language(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write({"step": 0, "train/loss": math.nan, "train/grad_norm": math.inf})
    writer.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads(path.read_text(), parse_constant=refuse)
    assert unseal(row) == {"step": 0, "train/loss": None, "train/grad_norm": None}


def test_running_means_are_the_means_since_the_reset():
    means, good = RunningMeans(("a", "b"), torch.device("cpu")), torch.tensor(False)
    flags = {"skip": good, "excused": good}
    for value in (1.0, 2.0, 6.0):
        means.add(torch.tensor(value), torch.tensor(-value, dtype=torch.bfloat16), **flags)
    assert means.means().tolist() == [3.0, -3.0]
    means.reset()
    means.add(torch.tensor(5.0), torch.tensor(1.0), **flags)
    assert means.means().tolist() == [5.0, 1.0]
