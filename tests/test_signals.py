import os
import signal
import subprocess
import sys
import threading
import time

import forked
import pytest

from ssl_xcit.runtime.signals import EXIT_STOPPED, SIGNALS, Stopped, StopSignals


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
