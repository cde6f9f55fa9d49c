import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque

import forked
import pytest

from ssl_xcit.data.writer import in_order
from ssl_xcit.runtime.signals import EXIT_STOPPED, SIGNALS, Stopped, StopSignals, deferred


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_a_second_one_does_no_harm(number):
    handlers = [signal.getsignal(n) for n in SIGNALS]
    with StopSignals(eager=False) as stop:
        assert stop.received == ""
        os.kill(os.getpid(), number)
        assert stop.received == signal.Signals(number).name
        for other in SIGNALS:
            os.kill(os.getpid(), other)
        assert stop.received == signal.Signals(number).name
    assert [signal.getsignal(n) for n in SIGNALS] == handlers


def test_where_nothing_can_be_lost_a_signal_ends_at_once_but_only_the_first():
    with StopSignals() as stop:
        with pytest.raises(Stopped) as ended:
            os.kill(os.getpid(), signal.SIGTERM)
        assert ended.value.code == EXIT_STOPPED == 75
        assert ended.value.reason == "SIGTERM"
        os.kill(os.getpid(), signal.SIGTERM)  # while the process is leaving
    assert stop.received == "SIGTERM"


def test_in_another_thread_signals_are_left_alone():
    handlers = [signal.getsignal(n) for n in SIGNALS]

    def run():
        with StopSignals():
            seen.extend(signal.getsignal(n) for n in SIGNALS)

    seen = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == handlers


def test_a_process_interrupted_in_a_computation_exits_with_the_documented_status():
    code = (
        "from ssl_xcit.runtime.signals import StopSignals\n"
        "with StopSignals():\n"
        "    print('ready', flush=True)\n"
        "    while True:\n"
        "        sum(range(1000))\n"
    )
    process = forked.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(timeout=60) == EXIT_STOPPED
    process.stdout.close()


@pytest.fixture
def interruptible():
    """Ctrl-C is heeded, as in a terminal's foreground."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_a_pools_owner_between_two_results_and_never_inside_of_the_pool(number):
    """A handler that raises inside of the pool's locks would leave them locked."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    main = threading.main_thread().ident

    def interrupt(i: int) -> int:
        if i == 40:
            signal.pthread_kill(main, number)
        return i

    for _ in range(20):
        with pytest.raises((KeyboardInterrupt, SystemExit)) as ended:
            deque(in_order(interrupt, range(4000), 2, "test", False), maxlen=0)
        assert "check" in [entry.name for entry in ended.traceback][-2:]
        assert {n: signal.getsignal(n) for n in handlers} == handlers
    assert getattr(ended.value, "code", 130) == 128 + number


def test_a_handler_that_only_takes_note_does_not_end_the_work():
    with StopSignals(eager=False) as stop, deferred() as check:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == ""
        check()
        assert stop.received == "SIGTERM"
