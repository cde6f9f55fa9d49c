"""Settings that every training has, however it learns."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ssl_xcit.runtime.config import Device, Precision, check


@dataclass(frozen=True)
class Run:
    """How it runs (no science)"""

    device: Device = "auto"
    """auto takes the GPU if there is one."""
    precision: Precision = "auto"
    """bf16 or fp16 autocast, or float32 throughout; auto takes the quickest of this machine."""
    num_workers: int = 0
    """Loader threads per rank; 0 = this rank's share of the cores."""
    compile: bool = False
    """Compile the backbone (torch.compile)."""
    activation_checkpointing: bool = False
    """Compute the student's blocks again in the backward pass: less memory, a third more time."""
    log_every: int = 10
    """Steps between two log lines."""
    save_every: float = 15.0
    """Minutes between two checkpoints."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    saveckp_freq: int = 20
    """Epochs between two checkpoints that are kept for good; 0 = none."""
    sync_bn: bool = True
    """BatchNorm over the batches of all ranks; false: over each micro-batch."""
    max_bad_steps: int = 10
    """Steps in a row with a loss or gradient that is not finite before the run gives up."""
    stall_timeout: float = 600.0
    """Seconds that a rank waits for another before it says which one and ends; 0 = for ever."""
    deterministic: bool = False
    """The same bits on every run of a GPU too, at some cost of speed."""
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
    """What the engine reads of a task's optimisation."""

    epochs: int
    batch_size_per_gpu: int
    accumulation_steps: int
    clip_grad: float
    clip_mode: str


@runtime_checkable
class TaskConfig(Protocol):
    """What the engine reads of a task's configuration."""

    arch: str
    out: str
    optim: TaskOptim
    run: Run
