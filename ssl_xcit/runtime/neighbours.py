"""Busy neighbours: other processes that want the cores of a training on a CPU.

torch's threads wait for each other after every operation. GNU OpenMP, which starts them, lets a
thread that waits spin for milliseconds before it sleeps, and nothing is quicker where the cores are
theirs. Where another process wants a core, the thread that spins uses up the time that the thread
it waits for should have had: on 2 cores, beside two busy processes, a training ran at a tenth to a
quarter of its speed, where half is fair (benchmarks/neighbours.py).

OpenMP spins 100 times only, then sleeps, while it manages more threads than there are cores; it
looks at that anew at every wait. So as long as the main thread has to wait for a core, idle threads
are held that have teams of their own; when it need not, they end.
"""

import atexit
import functools
import os
import threading
from pathlib import Path

import torch

SPINNING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # set by somebody who knows better


@functools.cache
def watch() -> None:
    """Make room from here on, for the thread that calls this first.

    Linux says how long a thread has waited for a core (/proc/self/task/*/schedstat). Without that,
    with one thread, or where SPINNING is set, nothing is done. Another OpenMP takes no notice.
    """
    neighbours = Neighbours(torch.get_num_threads())
    if neighbours.can_act and not any(map(os.environ.get, SPINNING)):
        watcher = threading.Thread(target=neighbours.watch, name="neighbours", daemon=True)
        watcher.start()
        atexit.register(neighbours.stop, watcher)


class Neighbours:
    """Whether there are any, and room for them."""

    INTERVAL = 1.0  # seconds between two looks
    MOST_ROOMS = 16  # else this process has few of the cores, and hardly meets anybody there
    CROWDED, ALONE = 0.1, 0.03  # shares of the time; alone it is 0.00 to 0.01, crowded 0.3 to 0.5

    def __init__(self, threads: int) -> None:
        """Of the calling thread, which computes with `threads`."""
        self.threads, self.cores = threads, len(os.sched_getaffinity(0))  # as OpenMP counts them
        # A team adds all its threads but one to those that OpenMP manages, the main thread's too
        self._rooms = (self.cores - threads) // max(1, threads - 1) + 1
        self._record = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
        self._stop, self._release = threading.Event(), threading.Event()
        self._held: list[threading.Thread] = []

    @property
    def can_act(self) -> bool:
        """Whether the system says how long a thread has waited, and a few threads make room."""
        return self.threads > 1 and self._rooms <= self.MOST_ROOMS and self._record.exists()

    @property
    def have_room(self) -> bool:
        """Whether threads that wait sleep at once."""
        return bool(self._held)

    def watch(self) -> None:
        """Look once an INTERVAL, until `stop`."""
        waited = self.waited()
        while not self._stop.wait(self.INTERVAL):
            before, waited = waited, self.waited()
            self.decide((waited - before) / self.INTERVAL)

    def stop(self, watcher: threading.Thread) -> None:
        """End all threads, before the interpreter ends: it would cut them off inside of torch."""
        self._stop.set()
        watcher.join()
        self.decide(0.0)

    def waited(self) -> float:
        """Seconds that the thread was ready to run and had no core."""
        return int(self._record.read_text().split()[1]) / 1e9

    def decide(self, share: float) -> None:
        """Make room, or take it back, after an interval of which that `share` was waited."""
        if share > self.CROWDED and not self._held:
            self._release.clear()
            self._held = [
                threading.Thread(target=self._hold, name="room", daemon=True)
                for _ in range(self._rooms)
            ]
            for thread in self._held:
                thread.start()
        elif share < self.ALONE and self._held:
            self._release.set()
            for thread in self._held:
                thread.join()
            self._held = []

    def _hold(self) -> None:
        torch.ones(2**20).add_(1)  # large enough for all threads of a team
        self._release.wait()
