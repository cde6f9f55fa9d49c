"""Settings that pretraining and fine-tuning share."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ssl_xcit.runtime.config import Device, Precision, check


@dataclass(frozen=True)
class Run:
    """How it runs (no effect on what is learned)"""

    device: Device = "auto"
    """auto uses the GPU if there is one."""
    precision: Precision = "auto"
    """bf16 or fp16 autocast, or float32 throughout; auto takes the fastest on this machine."""
    num_workers: int = 0
    """Loader threads per rank; 0 = this rank's share of the cores."""
    compile: bool = False
    """Compile the backbone (torch.compile)."""
    activation_checkpointing: bool = False
    """Recompute the student's blocks in the backward pass: less memory, a third more time."""
    log_every: int = 10
    """Steps between two log lines."""
    save_every: float = 15.0
    """Minutes between two checkpoints."""
    keep_last: int = 2
    """Number of newest checkpoints to keep."""
    saveckp_freq: int = 20
    """Epochs between two checkpoints that are kept forever; 0 = none."""
    sync_bn: bool = True
    """BatchNorm over the batches of all ranks; false: over each micro-batch."""
    max_bad_steps: int = 10
    """Consecutive steps with a non-finite loss or gradient after which the run stops."""
    stall_timeout: float = 600.0
    """Seconds a rank waits for another before it names that rank and exits; 0 = forever."""
    deterministic: bool = False
    """Bit-for-bit reproducible runs on a GPU too, somewhat slower."""
    tensorboard: bool = False
    """Copy the log to TensorBoard, in the run folder's tensorboard/ (pip install tensorboard)."""
    wandb: str = ""
    """Copy the log to this project of Weights & Biases (pip install wandb)."""

    def __post_init__(self) -> None:
        check(self, ">= 0", "num_workers", "save_every", "saveckp_freq", "stall_timeout")
        check(self, ">= 1", "log_every", "max_bad_steps")
        check(self, ">= 2", "keep_last")


@runtime_checkable
class TaskOptim(Protocol):
    """The optimisation settings that the engine reads."""

    epochs: int
    batch_size_per_gpu: int
    accumulation_steps: int
    clip_grad: float
    clip_mode: str


@runtime_checkable
class TaskConfig(Protocol):
    """The settings that the engine reads."""

    arch: str
    out: str
    optim: TaskOptim
    run: Run
