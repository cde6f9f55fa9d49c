"""One process or several: set-up from torchrun's environment, and the collectives we use.

Alone (no RANK and WORLD_SIZE, or WORLD_SIZE=1) no process group is created and every collective
here returns at once, so the callers need no branch.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ssl_xcit.errors import UserError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Distributed:
    """Who this process is: its rank of `world_size`, its rank on this machine, and its device."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def setup(device: str = "auto", timeout_s: float = 1800.0) -> Distributed:
    """Join the run that torchrun (or submitit, with the same variables) started, or stand alone.

    `device` is "auto" (CUDA where there is any), "cpu" or "cuda". CPU tensors travel by gloo, CUDA
    tensors by NCCL; on CUDA both exist, so features kept in host memory can be gathered too.
    `timeout_s`: seconds that a rank waits for the others, here and in each collective, before it
    fails; rank 0 may evaluate alone that long while the others wait.

    Raises UserError for an unknown or absent device, more ranks than GPUs on this machine, or an
    incomplete environment.
    """
    if not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        return Distributed(0, 1, 0, _prepare(choose_device(device, 0)))
    missing = [name for name in TORCHRUN if name not in os.environ]
    if missing:
        raise UserError(
            f"expected the environment of torchrun ({', '.join(TORCHRUN)}), {', '.join(missing)} "
            "missing: start with torchrun, or unset RANK and WORLD_SIZE to run one process"
        )
    rank, world_size, local_rank = (int(os.environ[name]) for name in TORCHRUN[:3])
    chosen = _prepare(choose_device(device, local_rank))
    if world_size > 1:
        cuda = chosen.type == "cuda"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            timeout=timedelta(seconds=timeout_s),
            device_id=chosen if cuda else None,
        )
    return Distributed(rank, world_size, local_rank, chosen)


def choose_device(device: str, local_rank: int) -> torch.device:
    """The device of the process `local_rank` of this machine.

    A process that sees one GPU takes it: launchers such as `srun --gpus-per-task=1` show each task
    its own as number 0. Raises UserError as `setup` does.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"expected device auto, cpu or cuda, got {device!r}")
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("expected a CUDA GPU for device cuda, torch sees none: use device cpu")
    gpus = torch.cuda.device_count()
    index = 0 if gpus == 1 else local_rank
    if index >= gpus:
        raise UserError(
            f"expected at most {gpus} ranks on this machine (its GPUs), got local rank "
            f"{local_rank}: lower --nproc-per-node"
        )
    return torch.device("cuda", index)


def _prepare(device: torch.device) -> torch.device:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # for kernels launched without naming a device
    return device


def all_reduce_mean(tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Mean over ranks of a contiguous tensor, in place; returns it. Same bits on every rank."""
    if dist.is_initialized():
        dist.all_reduce(tensor)  # gloo has no mean
        tensor /= dist.get_world_size()
    return tensor


def gather_variable(tensor: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "m ..."]:
    """All ranks' rows, in rank order, on every rank; ranks may hold different numbers of rows."""
    if not dist.is_initialized():
        return tensor
    world_size, rank = dist.get_world_size(), dist.get_rank()
    counts = torch.zeros(world_size, dtype=torch.int64, device=tensor.device)
    counts[rank] = len(tensor)
    dist.all_reduce(counts)
    # Broadcasts into slices of the result, because all_gather would need padding and a second copy
    # of what can be gigabytes of features.
    gathered = tensor.new_empty(int(counts.sum()), *tensor.shape[1:])
    for source, rows in enumerate(gathered.split(counts.tolist())):
        if source == rank:
            rows.copy_(tensor)
        if len(rows):
            dist.broadcast(rows, src=source)
    return gathered


@torch.no_grad()
def all_reduce_buffers(modules: Iterable[nn.Module]) -> None:
    """Replace the running means and variances of BatchNorm by their mean over ranks, in place.

    For CPU runs, where SyncBatchNorm does not exist: each rank normalises by the statistics of its
    own batch, and this keeps what the ranks will save and evaluate equal. Both statistics are
    running means over batches, so their mean over ranks runs over all ranks' batches; the variance
    is the one within a rank's batch, without the spread between the ranks' means. All else stays,
    the counters `num_batches_tracked` too. One all-reduce in total.
    """
    statistics = [
        buffer
        for module in modules
        for name, buffer in module.named_buffers()
        if name.rpartition(".")[2] in ("running_mean", "running_var")
    ]
    if not statistics or not dist.is_initialized():
        return
    means = all_reduce_mean(torch.cat(statistics))  # each is a vector over channels
    torch._foreach_copy_(statistics, means.split([len(buffer) for buffer in statistics]))


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def teardown() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
