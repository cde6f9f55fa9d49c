"""Busy neighbours: other processes that compete for the cores of a training on a CPU.

torch's threads wait for each other after every operation. GNU OpenMP lets a waiting thread spin for
milliseconds before it sleeps, which is fastest on idle cores. On a busy core the spinning thread
uses up the time that the thread it waits for needs: on 2 cores, beside two busy processes, a
training ran at a tenth to a quarter of its speed, where half is fair (benchmarks/neighbours.py).

While OpenMP manages more threads than there are cores, it spins only 100 times; it checks this at
every wait. So while the main thread has to wait for a core, we hold idle threads with teams of
their own, and release them when it no longer waits.
"""

import atexit
import functools
import os
import threading
from pathlib import Path

import torch

SPINNING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # the user's own choice, left alone


@functools.cache
def watch() -> None:
    """Watch from here on over the thread that calls this first.

    Linux reports how long a thread has waited for a core (/proc/self/task/*/schedstat). Does
    nothing without that, with one thread, or where SPINNING is set. Other OpenMP libraries are not
    affected.
    """
    neighbours = Neighbours(torch.get_num_threads())
    if neighbours.can_act and not any(map(os.environ.get, SPINNING)):
        watcher = threading.Thread(target=neighbours.watch, name="neighbours", daemon=True)
        watcher.start()
        atexit.register(neighbours.stop, watcher)


class Neighbours:
    """Detects busy neighbours, and holds threads while there are any."""

    INTERVAL = 1.0  # seconds between two checks
    MOST_ROOMS = 16  # more are needed only where this process uses few of the cores anyway
    CROWDED, ALONE = 0.1, 0.03  # share of time waited: 0.00 to 0.01 alone, 0.3 to 0.5 crowded

    def __init__(self, threads: int) -> None:
        """Watches the calling thread, which computes with `threads` threads."""
        self.threads, self.cores = threads, len(os.sched_getaffinity(0))  # as OpenMP counts them
        # Each team, the main thread's too, adds all its threads but one to those OpenMP manages
        self._rooms = (self.cores - threads) // max(1, threads - 1) + 1
        self._record = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
        self._stop, self._release = threading.Event(), threading.Event()
        self.held: list[threading.Thread] = []  # while there are any, waiting threads sleep at once

    @property
    def can_act(self) -> bool:
        """Whether the system reports waiting times, and few held threads suffice."""
        return self.threads > 1 and self._rooms <= self.MOST_ROOMS and self._record.exists()

    def watch(self) -> None:
        """Check once per INTERVAL, until `stop`."""
        waited = self.waited()
        while not self._stop.wait(self.INTERVAL):
            before, waited = waited, self.waited()
            self.decide((waited - before) / self.INTERVAL)

    def stop(self, watcher: threading.Thread) -> None:
        """End all threads before the interpreter exits, which would cut them off inside torch."""
        self._stop.set()
        watcher.join()
        self.decide(0.0)

    def waited(self) -> float:
        """Seconds that the thread was ready to run and had no core."""
        return int(self._record.read_text().split()[1]) / 1e9

    def decide(self, share: float) -> None:
        """Hold or release threads, given the `share` of the last interval spent waiting."""
        if share > self.CROWDED and not self.held:
            self._release.clear()
            self.held = [
                threading.Thread(target=self._hold, name="room", daemon=True)
                for _ in range(self._rooms)
            ]
            for thread in self.held:
                thread.start()
        elif share < self.ALONE and self.held:
            self._release.set()
            for thread in self.held:
                thread.join()
            self.held = []

    def _hold(self) -> None:
        torch.ones(2**20).add_(1)  # large enough for all threads of a team
        self._release.wait()
