"""What each process of a SLURM job runs: a pretraining, or an evaluation.

A preemption, the time limit or a lost node may end a job before its work is done. The next attempt
at the same job continues from what the last one saved. After a preemption or at the time limit the
job requeues itself (`_leave`); after the loss of a node SLURM requeues it.
"""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.runtime import processor
from ssl_xcit.runtime.config import PACKAGE
from ssl_xcit.runtime.errors import UserError, exit_on_user_error
from ssl_xcit.runtime.signals import SIGNALS, Stopped, StopSignals

ROOT = PACKAGE.parent
RUN_AGAIN = 144  # exit status by which a job on submitit's local cluster asks to run again


@dataclass(frozen=True)
class Job:
    """The work of a job. submitit pickles it into the job's folder and calls it in each process.

    `code`: the copy of the program to run; "" for whatever is imported. `out`: the run folder.
    """

    code: str
    out: str
    max_idle_attempts: int

    def work(self) -> None:
        """Begin or continue; raises `Stopped` if another attempt has to continue."""
        raise NotImplementedError

    def __call__(self) -> None:
        """Do the work; if a signal ends it early, requeue the job."""
        if "SUBMITIT_EXECUTOR" in os.environ:
            # submitit's handlers exit without saving, and take every signal of a short job for a
            # time-out. Ignored for good: signals after ours are gone must change nothing
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
        try:
            with StopSignals(), exit_on_user_error():
                self._begin()
                self.work()
        except Stopped as stopped:
            _leave(stopped)

    def _begin(self) -> None:
        """Check and record this attempt."""
        if self.code and Path(self.code).resolve() != ROOT:
            raise UserError(
                f"the job was to run the program in {self.code}, but Python imports {ROOT}: keep "
                "PYTHONPATH and PYTHONSAFEPATH as the submission sets them"
            )
        processor.prepare()
        from ssl_xcit.runtime import distributed  # imports torch: a submission does without

        for name in (*distributed.TORCHRUN, "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)  # of the submitting process
        if distributed.find_place(os.environ).rank == 0:
            print(f"job {job_id()}, attempt {attempt()}: program in {ROOT}", flush=True)
            if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
                self._record()

    def _record(self) -> None:
        """Record the attempt beside the logs. Raises UserError after many without a step.

        Whatever ends them (a signal before the first step, a node that reboots), more attempts
        would only waste the machines.
        """
        path = Path(os.environ["SUBMITIT_FOLDER"]) / f"{job_id()}_attempts.jsonl"
        step = newest_step(Path(self.out))
        row = {
            "attempt": attempt(),
            "step": step,
            "host": os.environ.get("SLURMD_NODENAME", socket.gethostname()),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
        if steps[-self.max_idle_attempts - 1 :] == [step] * (self.max_idle_attempts + 1):
            raise UserError(
                f"{self.max_idle_attempts} attempts of job {job_id()} have ended without a step "
                f"after {step}, see {path}: give it more --time, or a partition where it is "
                "preempted less, and submit again"
            )


@dataclass(frozen=True)
class PretrainJob(Job):
    """A pretraining."""

    config: TrainConfig

    def work(self) -> None:
        """Train in the run folder, or continue there."""
        from ssl_xcit.dino.train import train

        train(self.config)


@dataclass(frozen=True)
class ScriptJob(Job):
    """An evaluation: the name of its command, and its arguments."""

    script: str
    arguments: tuple[str, ...]

    def work(self) -> None:
        """Run the command."""
        sys.argv = ["ssl-xcit", self.script, *self.arguments]
        runpy.run_module("ssl_xcit", run_name="__main__")


def job_id() -> str:
    """The job's id, "12_3" for array members; "" outside of a job."""
    environment = os.environ
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID", environment.get("SUBMITIT_LOCAL_JOB_ID", ""))


def attempt() -> int:
    """How many times the job has been requeued."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def newest_step(out: Path) -> int:
    """Finished steps in the newest checkpoint of a run folder; 0 without a checkpoint."""
    numbers = [path.name.removeprefix("step_") for path in out.glob("checkpoints/step_*")]
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def _leave(stopped: Stopped) -> NoReturn:
    """End this process, after saving; rank 0 first requeues the job.

    A cancelled job is not requeued: it gets the same signal, but SLURM no longer calls it running.
    """
    executor = os.environ.get("SUBMITIT_EXECUTOR")
    if executor == "local" and stopped.reason == "SIGUSR2":
        raise SystemExit(RUN_AGAIN)
    if executor == "slurm" and stopped.reason != "SIGINT":
        if os.environ["SLURM_PROCID"] != "0":
            raise SystemExit(0)  # any other status makes srun kill rank 0 before it requeues
        state = _slurm("squeue", "--noheader", "--jobs", job_id(), "--format", "%T")
        if state == "RUNNING":
            print(f"{stopped.reason}: job {job_id()} is requeued", flush=True)
            _slurm("scontrol", "requeue", job_id())
        else:
            print(f"{stopped.reason}: not requeued, the job is {state}", flush=True)
    raise stopped


def _slurm(*command: str) -> str:
    """Run a SLURM command and return its output; its errors go to the log."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120, check=False)
    return done.stdout.strip()
