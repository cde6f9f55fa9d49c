"""A forked process ends as an interpreter of its own would."""

import os
import signal
import subprocess
import sys

import forked
import pytest

WAYS_TO_END = {
    "nothing": "",
    "a status": "import sys; sys.exit(75)",
    "a status beyond a byte": "import sys; sys.exit(-1)",
    "a reason": "import sys; sys.exit('no such file')",
    "success": "import sys; print('done', end=''); sys.exit()",
    "an error": "1 / 0",
    "an interrupt": "raise KeyboardInterrupt",
    "a signal": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "Ctrl-C": "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)",
    "at exit": "import atexit; atexit.register(print, 'last'); print('first', end=' ')",
    "a thread": "import threading, time\n"
    "def late(): time.sleep(0.2); print('late')\n"
    "threading.Thread(target=late).start()\n"
    "import sys; sys.exit(3)",
}


@pytest.mark.parametrize("code", WAYS_TO_END.values(), ids=WAYS_TO_END)
def test_a_process_ends_as_python_does(code):
    # Python's own default, which a background job has lost and would pass on
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{code}"
    command = [sys.executable, "-c", code]
    ours, theirs = (
        run(command, capture_output=True, text=True, timeout=60)
        for run in (forked.run, subprocess.run)
    )
    assert (ours.returncode, ours.stdout) == (theirs.returncode, theirs.stdout)
    assert ours.stderr.splitlines()[-1:] == theirs.stderr.splitlines()[-1:]


def test_it_is_the_callers_child_and_takes_its_input_and_signals():
    code = "import os, sys; said = input(); print(os.getppid(), said, flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with forked.Popen([sys.executable, "-c", code], **pipes) as process:
        print("hello", file=process.stdin, flush=True)
        parent, said = process.stdout.readline().split()
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert int(parent) == os.getpid()
    assert said == "hello"
