"""The watch over the ranks: real processes, of which one is stopped or dies."""

import re
import signal
import subprocess
import sys
import threading
import time

import forked
import pytest
import torch

from ssl_xcit.runtime.distributed import Distributed
from ssl_xcit.runtime.watch import Watch

RANK = """
import sys, time, torch
import torch.distributed as dist
from ssl_xcit.runtime import distributed, watch

watch.PATIENCE_S = 3
ranks = distributed.setup("cpu", timeout_s=300)
stalled = int(sys.argv[1])
with watch.Watch(ranks, float(sys.argv[2])) as seen:
    for step in range(int(sys.argv[3])):
        seen.at(step, f"step {step}")
        dist.all_reduce(torch.zeros(1))
        if step == 3 and ranks.rank == stalled:
            print("stalls", flush=True)
            time.sleep(600)
        time.sleep(0.05)
    seen.at(step + 1, "the end")
print(f"rank {ranks.rank} is done", flush=True)
distributed.teardown()
"""


def start_ranks(world, stalled=-1, timeout=2.0, steps=10):
    """One process per rank without torchrun, whose agent would end the others by itself."""
    command = [sys.executable, "-c", RANK, str(stalled), str(timeout), str(steps)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return forked.start_ranks(world, command, **pipes)


def end(processes):
    for process in processes:
        process.kill()
    return [process.communicate(timeout=60) for process in processes]


def test_ranks_that_come_on_are_left_alone():
    processes = start_ranks(2, timeout=5.0)
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    for rank, (out, _) in enumerate(results):
        assert out.endswith(f"rank {rank} is done\n")


@pytest.mark.parametrize("stalled", [0, 1, 2])
def test_a_rank_that_stalls_is_named_and_the_others_end(stalled):
    processes = start_ranks(3, stalled)
    others = [process for rank, process in enumerate(processes) if rank != stalled]
    try:
        for process in others:
            assert process.wait(timeout=90) == 1
        assert processes[stalled].poll() is None
    finally:
        results = end(processes)
    said = [line for _, error in results for line in error.splitlines() if "has waited" in line]
    # The first one that ends breaks the connection of those that would say it a moment later
    assert said
    for line in said:
        expected = rf"error: rank \d has waited for rank {stalled} \(at step \d\) for 2 s; it ends"
        assert re.fullmatch(expected, line)
    assert "has waited" not in results[stalled][1]


def test_a_rank_whose_process_is_stopped_is_named_even_if_it_keeps_the_reports():
    for stopped in (0, 1):
        processes = start_ranks(2, stopped)
        while (line := processes[stopped].stdout.readline()) != "stalls\n":
            assert line
        processes[stopped].send_signal(signal.SIGSTOP)
        try:
            assert processes[1 - stopped].wait(timeout=90) == 1
        finally:
            results = end(processes)
        assert f"has waited for rank {stopped}" in results[1 - stopped][1]


def test_alone_or_without_a_timeout_there_is_no_thread():
    cpu = torch.device("cpu")
    for ranks, timeout in ((Distributed(0, 1, 0, cpu), 1.0), (Distributed(0, 2, 0, cpu), 0.0)):
        with Watch(ranks, timeout) as watch:
            watch.at(1, "step 1")
            assert "watch" not in [thread.name for thread in threading.enumerate()]


def test_no_thread_outlives_the_watch(monkeypatch):
    """One inside torch when the interpreter ends would abort the process."""

    class SlowStore(dict):
        """Answers as a store on a loaded machine does."""

        def set(self, key, value):
            time.sleep(0.3)
            self[key] = value.encode()

        def check(self, keys):
            return all(key in self for key in keys)

    monkeypatch.setattr(Watch, "_connect", lambda self: SlowStore())
    with Watch(Distributed(0, 2, 0, torch.device("cpu")), timeout_s=0.04) as watch:
        watch.at(1, "step 1")
        time.sleep(0.1)  # the first report is under way
    assert not [thread for thread in threading.enumerate() if thread.name == "watch"]
