"""Whether this process is a task of a SLURM step, or was typed inside of one.

The shell of `srun -n 4 --pty bash` has the variables of a task of four, and so has whatever is
started there, though nobody starts the other three.
"""

import os
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path


def typed_in(environment: Mapping[str, str]) -> str:
    """What inside of the step has started this process, beside the task itself; "" if nothing has.

    It is the parents that tell, not SLURM_PTY_PORT: an inner `srun` inherits that variable from the
    shell, and its tasks are ranks all the same. Only shells in which somebody types ignore the stop
    key (SIGTSTP) and have a terminal.
    """
    task = environment.get("SLURM_TASK_PID", "")
    if not task.isdigit():
        return ""
    if hasattr(sys, "ps1"):
        return "a Python prompt"
    pid = os.getpid()
    while str(pid) != task:
        try:
            pid = int(_fields(pid)[1])
            words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
            ignored = re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
            terminal = _fields(pid)[4] != "0"
        except (OSError, TypeError):
            return ""  # no /proc, or a container that hides the processes around it
        has_command = any(re.fullmatch("-[a-z]*c", word) for word in words)  # bash -ic "..."
        if terminal and not has_command and int(ignored[1], 16) >> (signal.SIGTSTP - 1) & 1:
            return "an interactive shell"
        # A batch script that was submitted in such a shell inherits its variables
        if str(pid) == task and any(Path(word).name == "slurm_script" for word in words):
            return "a batch script"
    return ""


def _fields(pid: int) -> list[str]:
    """Of /proc/PID/stat, from the state on: state, parent, group, session, terminal, ..."""
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
