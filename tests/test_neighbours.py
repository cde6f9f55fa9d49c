"""Room for other processes: noticed by what Linux counts, made by what OpenMP does."""

import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.skipif(
        not os.path.exists("/proc/self/schedstat"), reason="the system does not count waiting"
    ),
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core"),
]

MEASURE = """
import time, torch
from ssl_xcit.runtime.neighbours import Neighbours

torch.set_num_threads(2)
neighbours = Neighbours(2)
x = torch.ones(2**20)

def spun():
    # the time of the thread that waits, between operations of this one
    start = time.process_time()
    for _ in range(30):
        x.add_(1)
        time.sleep(0.004)
    return time.process_time() - start

spun()
found = []
for share in (0.5, 0.0, 0.5, 0.05, 0.0):
    neighbours.decide(share)
    found.append((bool(neighbours.held), spun()))
print(*(f"{room}:{seconds:.4f}" for room, seconds in found))
"""

NOTICE = """
import sys, threading, time, torch
from ssl_xcit.runtime import neighbours

torch.set_num_threads(2)
made = []
decide = neighbours.Neighbours.decide

def told(self, share):
    decide(self, share)
    made.append((share, bool(self.held)))

neighbours.Neighbours.decide = told
neighbours.Neighbours.INTERVAL = 0.3
neighbours.watch()
a = torch.ones(512, 512)
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end and not any(room for _, room in made):
    a @ a
print(any(room for _, room in made), max(share for share, _ in made))
"""


def python(code: str, *arguments: str, **variables: str) -> list[str]:
    removed = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {k: v for k, v in os.environ.items() if k not in removed} | variables
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.fixture
def busy():
    """Twice as many busy processes as there are cores."""
    cores = len(os.sched_getaffinity(0))
    loop = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(loop) for _ in range(2 * cores)]
    yield
    for process in processes:
        process.kill()
        process.wait()


def test_threads_that_wait_sleep_at_once_while_there_is_room_and_spin_again_after():
    found = [entry.split(":") for entry in python(MEASURE)]
    assert [room == "True" for room, _ in found] == [True, False, True, True, False]
    seconds = [float(text) for _, text in found]
    spinning, sleeping = min(seconds[1], seconds[4]), max(seconds[0], seconds[2], seconds[3])
    assert sleeping < 0.6 * spinning, seconds


def test_busy_neighbours_are_noticed(busy):
    noticed, share = python(NOTICE, "60")
    assert noticed == "True"
    assert float(share) > 0.1


@pytest.mark.parametrize("variable", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_a_users_own_setting_is_left_alone(variable):
    code = "import threading\nfrom ssl_xcit.runtime import neighbours\nneighbours.watch()\n"
    code += "print([t.name for t in threading.enumerate()])"
    value = {"GOMP_SPINCOUNT": "1000", "OMP_WAIT_POLICY": "passive"}[variable]
    assert "neighbours" not in " ".join(python(code, OMP_NUM_THREADS="2", **{variable: value}))
    assert "neighbours" in " ".join(python(code, OMP_NUM_THREADS="2"))
    assert "neighbours" not in " ".join(python(code, OMP_NUM_THREADS="1"))
