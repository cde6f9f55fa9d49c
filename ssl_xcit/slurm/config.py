"""The settings of a job."""

from dataclasses import dataclass, field
from typing import Literal

from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.runtime.config import check
from ssl_xcit.runtime.errors import UserError


@dataclass(frozen=True)
class SlurmConfig:
    """The job"""

    cluster: Literal["slurm", "local", "debug"] = "slurm"
    """slurm; local = processes on this machine; debug = this very process."""
    dry_run: bool = False
    """Print the script for sbatch and every setting; submit nothing."""
    runs: str = "runs"
    """Folder of the run folders without --out; on a disk that all machines share."""
    images: str = ""
    """The .beton to pretrain on without --data."""
    partition: str = ""
    """Partition. Empty: the cluster's default, as for the next three."""
    account: str = ""
    """Account to charge."""
    qos: str = ""
    """Quality of service."""
    constraint: str = ""
    """Features that the nodes must have."""
    nodes: int = 1
    """Number of machines."""
    gpus_per_node: int = 8
    """GPUs per machine, with one process each; 0 = train on the CPU."""
    tasks_per_node: int = 0
    """Processes per machine; 0 = one per GPU, or one on the CPU."""
    cpus_per_task: int = 10
    """Cores per process."""
    mem: float = 0.0
    """Memory per machine, GiB; 0 = the cluster's default."""
    time: float = 48.0
    """Time limit, hours; a job that reaches it saves, is requeued and continues."""
    signal_delay: int = 120
    """Seconds before the time limit at which the job must stop: enough for a step and a save."""
    max_idle_attempts: int = 10
    """Give up after this many attempts in a row that begin at the same step."""
    additional: str = ""
    """Other options of sbatch, such as "nodelist=n[1-4] exclusive"."""
    setup: str = ""
    """Shell commands before the job's processes start, such as "module load cuda"."""
    eval: tuple[str, ...] = ()
    """Evaluations to run after the training: knn, linear, finetune."""
    eval_train: str = ""
    """Their labelled training images; by default --probe_train."""
    eval_test: str = ""
    """Their labelled test images; by default --probe_test."""
    sweep: tuple[str, ...] = ()
    """A job per combination, such as "lr=1e-4,5e-4 local_crops_scale=[0.05,0.4],[0.1,0.4]"; run
    folders and, when all have ended, the table sweep.txt are in --out."""

    def __post_init__(self) -> None:
        check(self, ">= 1", "nodes", "cpus_per_task", "max_idle_attempts")
        check(self, ">= 0", "gpus_per_node", "tasks_per_node", "mem", "signal_delay")
        check(self, "> 0", "time")
        if self.cluster != "slurm" and self.nodes > 1:
            raise UserError(f"nodes must be 1 with cluster {self.cluster}, got {self.nodes}")
        if self.cluster == "slurm" and self.signal_delay >= 3600 * self.time:
            raise UserError(
                f"signal_delay must be < the time limit ({3600 * self.time:g} s), got "
                f"{self.signal_delay}"
            )


@dataclass(frozen=True)
class SubmitConfig(TrainConfig):
    """Submit a pretraining to SLURM, with every option of main_dino.py and those of the job."""

    data: str = ""
    """The .beton file with the images; by default images in configs/slurm.yaml."""
    out: str = ""
    """The run folder, by default RUNS/ARCH; the same command again continues its run."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


@dataclass(frozen=True)
class EvaluationJobConfig:
    """Submit an evaluation to SLURM. The options are those of its own command, and the job's:"""

    slurm: SlurmConfig = field(default_factory=SlurmConfig)
