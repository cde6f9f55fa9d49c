"""Signals that ask a training to stop: they set a flag, and the engine saves and exits.

SIGTERM (preemption on a cluster, `docker stop`), SIGINT (Ctrl-C) and SIGUSR2 (submitit's time
limit) mean the same. Further signals change nothing: the first is already being handled.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)

EXIT_STOPPED = 75
"""Exit status of a training that a signal has stopped (sysexits' EX_TEMPFAIL): its state is saved,
and the same command continues it."""


class Stopped(SystemExit):
    """A signal has stopped the training; uncaught, it becomes the exit status EXIT_STOPPED."""

    def __init__(self, reason: str) -> None:
        super().__init__(EXIT_STOPPED)
        self.reason = reason


class StopSignals(AbstractContextManager):
    """A context in which a stop signal is noted instead of killing the process.

    Python runs signal handlers in the main thread; in any other this context does nothing.

    Attributes:
        received: the name of the first signal, or "".
        eager: while true, a signal raises `Stopped` at once. Meant for the time before the first
            step, when there is nothing to save and a compilation may take minutes.
    """

    def __init__(self, eager: bool = True) -> None:
        self.received, self.eager = "", eager
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        first = not self.received
        self.received = self.received or signal.Signals(number).name
        if self.eager and first:
            raise Stopped(self.received)


@contextmanager
def deferred() -> Iterator[Callable[[], None]]:
    """Hold SIGINT and SIGTERM back until what this yields is called, and their handlers with them.

    A handler that raises can strike a thread pool while it holds a lock; the pool then waits for
    ever. A signal without a handler ends the process by SystemExit, so that contexts are left.
    """
    received: list[int] = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    previous = {n: h for n in numbers if (h := signal.getsignal(n)) not in (signal.SIG_IGN, None)}

    def check() -> None:
        if received:
            number = received.pop()
            if not callable(handler := previous[number]):
                raise SystemExit(128 + number)
            handler(number, None)

    for number in previous:
        signal.signal(number, lambda number, _: received.append(number))
    try:
        yield check
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    check()
