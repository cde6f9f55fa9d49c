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
    """Print the script that sbatch would be given and every setting; submit nothing."""
    runs: str = "runs"
    """Folder of run folders where --out does not say otherwise; all machines must share it."""
    images: str = ""
    """The .beton to pretrain on where --data does not say otherwise."""
    partition: str = ""
    """Partition; by default the cluster's own choice, as for the next three."""
    account: str = ""
    """Account that pays."""
    qos: str = ""
    """Quality of service."""
    constraint: str = ""
    """Kind of node."""
    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 8
    """GPUs per machine, one process for each; 0 = on the CPU."""
    tasks_per_node: int = 0
    """Processes per machine; 0 = one for each GPU, or one on the CPU."""
    cpus_per_task: int = 10
    """Cores per process."""
    mem: float = 0.0
    """Memory per machine, GiB; 0 = the cluster's default."""
    time: float = 48.0
    """Time limit, hours; a job that reaches it saves, is queued again and goes on."""
    signal_delay: int = 120
    """Seconds before the limit at which the job is told to save and stop: a step and a save."""
    max_idle_attempts: int = 10
    """Attempts in a row that may begin at the same step; then the job gives up."""
    additional: str = ""
    """Any other option of sbatch, as "nodelist=n[1-4] exclusive"."""
    setup: str = ""
    """Lines of shell before the job's processes start, such as "module load cuda"."""
    eval: tuple[str, ...] = ()
    """Evaluations to submit, too, once the training has ended: knn, linear, finetune."""
    eval_train: str = ""
    """Labelled images to learn from in these; by default --probe_train."""
    eval_test: str = ""
    """Labelled images to classify in these; by default --probe_test."""
    sweep: tuple[str, ...] = ()
    """A job for each combination, as "optim.lr=2.5e-4,5e-4 seed=0,1"; --out holds their folders."""

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
    """Submit the pretraining of an XCiT to SLURM; every option of main_dino.py, and the job's."""

    data: str = ""
    """The .beton file with the images, by default that of configs/slurm.yaml."""
    out: str = ""
    """The run folder, by default RUNS/ARCH; the same command again continues the run in it."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


@dataclass(frozen=True)
class EvaluationJobConfig:
    """Submit an evaluation to SLURM. The options are those of its own command, and the job's:"""

    slurm: SlurmConfig = field(default_factory=SlurmConfig)
