"""Half an hour of kills, for `make soak` (SOAK=1): nothing grows and hardly a step is repeated."""

import os
import random
import re
import time
from pathlib import Path

import pytest
from test_reliability import REAL, command, finish, start

from ssl_xcit.checkpoints import folder as checkpoint

MINUTES = float(os.environ.get("SOAK_MINUTES", "30"))

pytestmark = pytest.mark.skipif(
    os.environ.get("SOAK") != "1", reason="takes half an hour: make soak"
)


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def memory_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


def test_half_an_hour_of_kills_leaves_memory_files_and_checkpoints_flat(photos, tmp_path):
    out, draw = tmp_path / "run", random.Random(0)
    settings = REAL | {"epochs": 1_000_000, "save_every": 0.02, "saveckp_freq": 0}
    ends = time.monotonic() + 60 * MINUTES
    seen, computed = [], 0
    while time.monotonic() < ends:
        found, skipped = checkpoint.load_latest(out / "checkpoints")
        assert skipped == []
        first = 0 if found is None else found.state["step"]
        process = start(command(photos, out, **settings))
        time.sleep(draw.uniform(20, 40))
        assert process.poll() is None
        facts = (memory_mb(process.pid), open_files(process.pid))
        process.kill()
        status, text, error = finish(process)
        assert status == -9, error
        last = max(map(int, re.findall(r"step (\d+)/", text)), default=first)
        computed += max(0, last - first)
        complete = [path for path in (out / "checkpoints").glob("step_*") if path.is_dir()]
        seen.append((*facts, len(complete)))
    found, _ = checkpoint.load_latest(out / "checkpoints")
    share = found.state["step"] / computed
    print(f"{len(seen)} kills; (MB, open files, checkpoints) {seen}; {share:.1%} of steps kept")
    assert share >= 0.95
    early, late = seen[: len(seen) // 3], seen[-(len(seen) // 3) :]
    for column, slack in ((0, 1.1), (1, 1.0)):
        assert max(row[column] for row in late) <= slack * max(row[column] for row in early)
    assert max(row[2] for row in seen) <= 3  # the newest two, and one that was being pruned
