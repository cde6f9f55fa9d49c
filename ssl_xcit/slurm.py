"""Pretraining as a SLURM job, through submitit (the only module that knows it)."""

import os
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from ssl_xcit import options
from ssl_xcit.config import SlurmConfig, SubmitConfig, TrainConfig
from ssl_xcit.errors import UserError


@dataclass(frozen=True)
class PretrainJob:
    """What each of the job's processes runs; submitit pickles it into the run folder."""

    config: TrainConfig

    def __call__(self) -> None:
        """Tell the ranks about each other as torchrun would, then train."""
        from ssl_xcit.train import train  # the submitting machine needs no torch

        # Each process sees all GPUs of its machine and takes the one of its LOCAL_RANK.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        train(self.config)

    def checkpoint(self) -> DelayedSubmission:
        """The job to queue after a preemption or the time limit: the same; its folder resumes."""
        return DelayedSubmission(PretrainJob(self.config))


def submit(config: SubmitConfig) -> None:
    """Submit `config` as one job whose logs are in its run folder, and print where they are.

    Raises UserError when the machine has no SLURM or SLURM refuses the job.
    """
    if config.slurm.dry_run:
        print(options.to_yaml(config), end="")
        return
    if config.slurm.cluster == "slurm" and shutil.which("sbatch") is None:
        raise UserError(
            "no sbatch on this machine: go where SLURM jobs are submitted, or --cluster local"
        )
    logs = Path(config.out).absolute() / "slurm"
    shared = {item.name: getattr(config, item.name) for item in fields(TrainConfig)}
    try:
        executor = submitit.AutoExecutor(
            folder=logs,
            cluster=config.slurm.cluster,
            slurm_max_num_timeout=config.slurm.max_timeouts,
        )
        executor.update_parameters(name=config.arch, **job_parameters(config.slurm))
        job = executor.submit(PretrainJob(TrainConfig(**shared)))
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"SLURM refused the job: {error}") from error
    except OSError as error:
        raise UserError(f"cannot write {logs}: {error.strerror}; choose another --out") from error
    print(f"job {job.job_id}, run folder {config.out}, log {job.paths.stdout}", flush=True)
    if config.slurm.cluster == "debug":
        # exception() runs it now; result() would open a debugger when it fails.
        os.environ.update(job.environ)
        if error := job.exception():
            raise error


def job_parameters(slurm: SlurmConfig) -> dict:
    """The job in the words of submitit.AutoExecutor; None leaves a choice to the cluster."""
    return {
        "nodes": slurm.nodes,
        "tasks_per_node": max(1, slurm.gpus_per_node),
        "gpus_per_node": slurm.gpus_per_node,
        "cpus_per_task": slurm.cpus_per_task,
        "mem_gb": slurm.mem_gb or None,
        "timeout_min": max(1, round(60 * slurm.hours)),
        "slurm_partition": slurm.partition or None,
        "slurm_account": slurm.account or None,
        "slurm_qos": slurm.qos or None,
        "slurm_constraint": slurm.constraint or None,
        "slurm_signal_delay_s": slurm.signal_delay,
        # Where the cluster's default is not to queue again, a preempted job would be lost.
        "slurm_additional_parameters": {"requeue": True},
        # Since SLURM 22.05 srun does not inherit sbatch's cores: one core per process.
        "slurm_setup": ["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"],
        "slurm_srun_args": ["--kill-on-bad-exit=1"],  # one dead rank ends them all
    }
