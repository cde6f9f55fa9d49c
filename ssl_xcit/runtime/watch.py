"""A watch over the ranks: when one of them stalls, the others name it and exit.

Collectives and torchrun notice at once when a rank dies. A rank that stalls (a stopped process, a
hanging disk, a deadlock) leaves the others waiting inside a collective, where they can do nothing.
So one thread of each rank exchanges progress reports with the others, and another one judges them
once its own rank has waited too long.
"""

import contextlib
import os
import sys
import threading
import time
from contextlib import AbstractContextManager
from datetime import timedelta

import torch.distributed as dist

from ssl_xcit.runtime.distributed import Distributed

PATIENCE_S = 30.0  # how long the store may take to answer
GOODBYE_S = 5.0  # how long a last report may take: rank 0 may have left, or be stopped


class Watch(AbstractContextManager):
    """Reports this rank's progress, and ends the process when another rank stalls.

    `timeout_s`: how long a rank may wait for another. With 0, or one rank, it does nothing.
    """

    def __init__(self, ranks: Distributed, timeout_s: float) -> None:
        self.ranks, self.timeout_s = ranks, timeout_s
        self._progress, self._since, self._activity = 0, time.monotonic(), "starting"
        self._reports: list[str] = []
        self._heard = time.monotonic()
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Watch":
        if self.ranks.world_size > 1 and self.timeout_s > 0:
            for target in (self._report, self._judge):
                self._threads.append(threading.Thread(target=target, name="watch", daemon=True))
                self._threads[-1].start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        for thread in self._threads:  # one inside torch would abort the interpreter's exit
            thread.join(GOODBYE_S)

    def at(self, progress: int, activity: str) -> None:
        """Note that this rank has reached `progress`, a number that grows alike on all ranks.

        `activity` is for the message: "step 12" or "saving after step 12".
        """
        self._progress, self._activity, self._since = progress, activity, time.monotonic()

    def doing(self, activity: str) -> None:
        """Note that this rank is busy with something that the others do not wait for."""
        self._activity, self._since = activity, time.monotonic()

    def _report(self) -> None:
        """Exchange reports; any call here may block forever when the store's host is stopped."""
        ranks = [str(rank) for rank in range(self.ranks.world_size)]
        with contextlib.suppress(RuntimeError, ValueError):  # no answer: `_judge` sees the silence
            store = self._connect()
            while not self._ended.wait(self._interval):
                store.set(str(self.ranks.rank), f"{self._progress} {self._activity}")
                self._reports = [
                    store.get(rank).decode() if store.check([rank]) else "0 starting"
                    for rank in ranks
                ]
                self._heard = time.monotonic()

    def _judge(self) -> None:
        while not self._ended.wait(self._interval):
            now = time.monotonic()
            if now - self._since < self.timeout_s:
                continue
            if now - self._heard > PATIENCE_S:
                self._end("rank 0, which keeps the ranks' reports and does not answer")
            if self._heard - self._since < self.timeout_s:
                continue  # an old report
            reports = self._reports
            progress = [int(report.split()[0]) for report in reports]
            behind = [rank for rank, count in enumerate(progress) if count < max(progress)]
            if behind and self.ranks.rank not in behind:
                stalled = (f"rank {r} (at {reports[r].split(maxsplit=1)[1]})" for r in behind)
                self._end(f"{', '.join(stalled)} for {self.timeout_s:g} s")

    @property
    def _interval(self) -> float:
        return min(5.0, self.timeout_s / 4)

    def _connect(self) -> dist.Store:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = timedelta(seconds=PATIENCE_S)
        store = dist.TCPStore(host, port, is_master=False, timeout=patience)
        # A restarted attempt must not read its predecessor's reports
        return dist.PrefixStore(f"watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def _end(self, whom: str) -> None:
        rank = self.ranks.rank
        print(f"error: rank {rank} has waited for {whom}; it ends", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread sits in a collective and cannot be woken
