"""One process or several: who is who, and the collectives we use.

The environment tells who started the processes; checked in this order: torchrun (or anything that
sets its variables), submitit, plain SLURM (`srun python ...`), nobody. A single process creates no
process group, and every collective here returns at once, so callers need no branch.
"""

import functools
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ssl_xcit.runtime import interactive, neighbours, rendezvous
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.runtime.options import as_text

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
STEP = ("JOB_ID", "STEP_ID", "PROCID", "LOCALID", "NODEID", "STEP_NUM_TASKS")
STEP = tuple(f"SLURM_{name}" for name in (*STEP, "STEP_TASKS_PER_NODE", "STEP_NODELIST"))
# How many processes MPI's launchers have started: Open MPI's; those of MPICH and Intel
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS")


@dataclass(frozen=True)
class Distributed:
    """Who this process is: its rank of `world_size`, its rank on this machine, and its device."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


@dataclass(frozen=True)
class Place:
    """What a launcher's variables say about this process.

    `address` and `port`: where rank 0 waits for the others. `own_gpu`: the launcher shows each
    process the GPUs that are meant for it alone. `job`: tells its ranks from those of others.
    """

    launcher: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str = "localhost"
    port: int = 0
    own_gpu: bool = False
    job: str = ""


def setup(device: str = "auto", timeout_s: float = 1800.0) -> Distributed:
    """Join the ranks that a launcher started, or run alone, and print which.

    `device` is "auto" (CUDA if available), "cpu" or "cuda". CPU tensors travel by gloo, CUDA
    tensors by NCCL; on CUDA both exist, so features in host memory can be gathered too.
    `timeout_s`: seconds that a rank waits for the others, here and in each collective, before it
    fails. Rank 0 may evaluate alone for that long while the others wait.

    Raises UserError for an unknown or absent device, more ranks than GPUs on this machine, an
    environment that is incomplete or makes no sense, and ranks that do not meet.
    """
    place = find_place(os.environ)
    chosen = choose_device(device, 0 if place.own_gpu else place.local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # for kernels launched without naming a device
    else:
        neighbours.watch()
    if place.world_size > 1:
        # Other code finds torchrun's variables, whatever the launcher
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = place.address, str(place.port)
        os.environ["LOCAL_WORLD_SIZE"] = str(place.local_world_size)
    # torchrun and srun mix the ranks' output; submitit keeps a log per rank
    if place.rank == 0 or place.launcher == "submitit":
        print(_describe(place, chosen), flush=True)
    if place.world_size > 1:
        cuda = chosen.type == "cuda"
        slurms = "SLURM_STEP_ID" if "SLURM_STEP_ID" in os.environ else "SUBMITIT_EXECUTOR"
        alone = "RANK -u WORLD_SIZE" if place.launcher == "torchrun" else slurms
        meeting = (place.address, place.port, place.rank, place.world_size, place.job)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=rendezvous.meet(*meeting, alone, timeout_s),
            timeout=timedelta(seconds=timeout_s),
            rank=place.rank,
            world_size=place.world_size,
            device_id=chosen if cuda else None,
        )
    return Distributed(place.rank, place.world_size, place.local_rank, chosen)


def find_place(environment: Mapping[str, str]) -> Place:
    """Who this process is, by its launcher's variables.

    Raises UserError when only some of them are set, when they make no sense, and for a launcher
    whose processes cannot meet.
    """
    if {"RANK", "WORLD_SIZE"} & environment.keys():
        return _torchrun_place(environment)
    if environment.get("SUBMITIT_EXECUTOR") == "local":
        job, tasks = environment["SUBMITIT_LOCAL_JOB_ID"], int(environment["SUBMITIT_LOCAL_NTASKS"])
        rank, port = int(environment["SUBMITIT_LOCAL_GLOBALID"]), rendezvous_port(job)
        return Place("submitit", rank, tasks, rank, tasks, "localhost", port, job=job)
    for name in MPI_SIZES:  # before SLURM, since mpirun starts its helpers by srun
        if (count := environment.get(name, "1")) != "1":
            raise UserError(
                f"expected torchrun or srun, got {count} processes of mpirun, each of which would "
                f"run alone: start with torchrun --nproc-per-node {count}, or unset {name} if that "
                "is what you want"
            )
    # A batch script has SLURM's variables too, but only a step has several processes
    if {"SLURM_STEP_ID", "SLURM_PROCID"} <= environment.keys():
        return _slurm_place(environment)
    return Place("no launcher")


def _torchrun_place(environment: Mapping[str, str]) -> Place:
    advice = "start with torchrun, or unset RANK and WORLD_SIZE to run one process"
    _expect(environment, "torchrun", TORCHRUN, advice)
    number = functools.partial(_integer, environment, advice)
    world_size = number("WORLD_SIZE", 1)
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Place(
        "torchrun",
        number("RANK", 0, world_size - 1),
        world_size,
        number("LOCAL_RANK"),
        number("LOCAL_WORLD_SIZE", 1) if "LOCAL_WORLD_SIZE" in environment else 1,
        environment["MASTER_ADDR"],
        number("MASTER_PORT", 1, 65535),
        job=f"{environment.get('TORCHELASTIC_RUN_ID', '')}.{attempt}",
    )


def _slurm_place(environment: Mapping[str, str]) -> Place:
    advice = "start with srun, or unset SLURM_STEP_ID to run one process"
    _expect(environment, "srun", STEP, advice)
    number = functools.partial(_integer, environment, advice)
    world_size = number("SLURM_STEP_NUM_TASKS", 1)
    step = f"{environment['SLURM_JOB_ID']}.{environment['SLURM_STEP_ID']}"
    if world_size > 1 and (where := interactive.typed_in(environment)):
        return Place(f"{where} in SLURM, whose {world_size} tasks need srun")
    counts = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    if sum(counts) != world_size:
        raise UserError(
            f"SLURM_STEP_TASKS_PER_NODE must have the sum SLURM_STEP_NUM_TASKS ({world_size}), got "
            f"{as_text(environment['SLURM_STEP_TASKS_PER_NODE'])}: {advice}"
        )
    attempt = number("SLURM_RESTART_COUNT") if "SLURM_RESTART_COUNT" in environment else 0
    return Place(
        "submitit" if environment.get("SUBMITIT_EXECUTOR") == "slurm" else "SLURM",
        number("SLURM_PROCID", 0, world_size - 1),
        world_size,
        number("SLURM_LOCALID"),
        counts[number("SLURM_NODEID", 0, len(counts) - 1)],
        first_host(environment["SLURM_STEP_NODELIST"]),
        rendezvous_port(step, attempt),
        own_gpu="SLURM_GPUS_PER_TASK" in environment,
        job=f"{step}.{attempt}",
    )


def _expect(
    environment: Mapping[str, str], launcher: str, names: Sequence[str], advice: str
) -> None:
    """Raise UserError unless all names are set."""
    if missing := [name for name in names if not environment.get(name)]:
        raise UserError(
            f"expected the environment of {launcher} ({', '.join(names)}), {', '.join(missing)} "
            f"missing: {advice}"
        )


def _integer(
    environment: Mapping[str, str], advice: str, name: str, low: int = 0, high: int | None = None
) -> int:
    """The variable's value. Raises UserError unless it is an integer from `low` to `high`."""
    text = environment[name]
    if re.fullmatch(r"-?[0-9]+", text):
        value = int(text)
        if low <= value and (high is None or value <= high):
            return value
    bounds = f">= {low}" if high is None else f"in [{low}, {high}]"
    raise UserError(f"{name} must be an integer {bounds}, got {as_text(text)}: {advice}")


def rendezvous_port(job: str, attempt: int = 0) -> int:
    """The port where the ranks of an attempt meet, computed alike by all of them.

    Each attempt at a job has a port of its own, so a stale rank of an earlier attempt on a lost
    node cannot join it. Below 32768, where systems begin to assign ports by themselves.
    """
    return 10_000 + (zlib.crc32(job.encode()) + attempt) % 20_000


def first_host(nodes: str) -> str:
    """The first of SLURM's list of nodes: "gpu[03-04,7]-ib,login1" -> "gpu03-ib"."""
    first = re.match(r"(?:[^,\[]|\[[^]]*\])+", nodes).group()
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first)


def tasks_per_node(counts: str) -> list[int]:
    """SLURM's "2(x3),1" -> [2, 2, 2, 1]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def _describe(place: Place, device: torch.device) -> str:
    if place.world_size == 1:
        return f"one process ({place.launcher}) on {device}"
    return (
        f"rank {place.rank} of {place.world_size} ({place.launcher}), local rank "
        f"{place.local_rank} of {place.local_world_size}, on {device}; rank 0 is at "
        f"{place.address}:{place.port}"
    )


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


def all_reduce_mean(tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Mean over ranks of a contiguous tensor, in place; returns it. The same bits on every rank."""
    if dist.is_initialized():
        dist.all_reduce(tensor)  # gloo has no mean
        tensor /= dist.get_world_size()
    return tensor


def maximum(value: int) -> int:
    """The largest value of any rank; the ranks wait for each other."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor(value)  # on the CPU: gloo carries it, without waiting for a GPU
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def any_rank(flag: bool) -> bool:
    """Whether it is true on any rank; the ranks wait for each other."""
    return maximum(int(flag)) > 0


def gather_variable(tensor: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "m ..."]:
    """All ranks' rows in rank order, on every rank; ranks may hold different numbers of rows."""
    if not dist.is_initialized():
        return tensor
    world_size, rank = dist.get_world_size(), dist.get_rank()
    counts = torch.zeros(world_size, dtype=torch.int64, device=tensor.device)
    counts[rank] = len(tensor)
    dist.all_reduce(counts)
    # Broadcasts into slices of the result: all_gather would need padding and a second copy of what
    # can be gigabytes of features.
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

    For CPU runs, where SyncBatchNorm does not exist: each rank normalises by its own batch's
    statistics, and this keeps what the ranks save and evaluate equal. Both statistics are running
    means over batches, so their mean over ranks covers all ranks' batches; the variance is that
    within a rank's batch, without the spread between the ranks' means. Other buffers, such as
    `num_batches_tracked`, are not touched. One all-reduce in total.
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
