"""What the engine trains: a `Task` says what a step's loss is, the engine does all the rest."""

import contextlib
import dataclasses
import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssl_xcit.checkpoints.folder import StateDict
from ssl_xcit.data.loader import MultiCropLoader
from ssl_xcit.data.pixels import normalise
from ssl_xcit.operators.sync_batchnorm import synchronise_batchnorm
from ssl_xcit.runtime import distributed
from ssl_xcit.runtime.distributed import Distributed
from ssl_xcit.runtime.precision import Precision, autocast, choose
from ssl_xcit.training.config import TaskConfig
from ssl_xcit.training.metrics import RunningMeans
from ssl_xcit.training.run_folder import stored_precision
from ssl_xcit.training.verdict import Verdict


class StepLoss(NamedTuple):
    """A micro-batch's loss, still to be differentiated, and what else it found."""

    loss: Float[Tensor, ""]
    means: Float[Tensor, " m"] | None = None  # `after_update` gets them averaged over all of a step


METERS = ("train/loss", "train/grad_norm")


class Task(ABC):
    """What the engine trains. One optimiser step is, see `engine.train_step`:

        loss (per micro-batch), backward -> clip -> before_update -> optimiser -> after_update

    `loss` may have computed the gradients of a part of it already. Only it sees micro-batches; what
    moves once per step moves in `after_update`. A task draws no number from a generator with a
    history, and keeps nothing between steps but `tensors()`.

    Attributes:
        kind: what a run folder of it is called.
        config: the settings; the engine reads out, optim.epochs, batch_size_per_gpu,
            accumulation_steps, clip_grad, clip_mode and all of run.
        precision: that of the settings, and why it is this one.
        loader: the training images; its epochs are cut to `steps_per_epoch`.
        model: what is trained, wrapped in DistributedDataParallel when there are several ranks.
        meters: running means of the loss and of the gradient's norm.
    """

    kind: ClassVar[str]
    config: TaskConfig
    precision: Precision
    ranks: Distributed
    loader: MultiCropLoader
    model: nn.Module
    optimizer: torch.optim.Optimizer
    meters: RunningMeans

    def configure(self, config: TaskConfig, ranks: Distributed) -> None:
        """Set config, with the precision that it means here, precision and ranks."""
        stored = stored_precision(Path(config.out) / "config.yaml")
        self.precision = choose(config.run.precision, ranks, stored)
        run = dataclasses.replace(config.run, precision=self.precision.name)
        self.config, self.ranks = dataclasses.replace(config, run=run), ranks
        self.meters = RunningMeans(METERS, ranks.device)

    @functools.cached_property
    def scaler(self) -> torch.amp.GradScaler:
        """Keeps the gradients of float16 in its range; in another precision it does nothing."""
        device, name = self.ranks.device.type, self.config.run.precision
        return torch.amp.GradScaler(device, enabled=name == "fp16")

    @property
    def bare_model(self) -> nn.Module:
        """The model without its DistributedDataParallel wrapper."""
        model = self.model
        return model.module if isinstance(model, DistributedDataParallel) else model

    @property
    def global_batch(self) -> int:
        """Images per optimiser step, over ranks and accumulation."""
        optim = self.config.optim
        return optim.batch_size_per_gpu * optim.accumulation_steps * self.ranks.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps per epoch."""
        return len(self.loader)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.config.optim.epochs * self.steps_per_epoch

    def evaluated(self, step: int) -> bool:
        """Whether `evaluate` is due after `step`."""
        epochs, rest = divmod(step + 1, self.steps_per_epoch)
        return rest == 0 and self.evaluates(epochs - 1)

    def recorded(self, step: int) -> bool:
        """Whether `step` has a row of its own in metrics.jsonl: only there `loss` may do more."""
        done = step + 1
        logged = done % self.config.run.log_every == 0
        return logged or done == self.total_steps or self.evaluated(step)

    def warm_up(self) -> list[str]:
        """Do what takes a while and changes nothing, before the first step; lines to print."""
        return []

    def initialise(self) -> list[str]:
        """Load what a run starts from, when no checkpoint resumes it; returns lines to print."""
        return []

    @abstractmethod
    def hyperparameters(self, step: int) -> dict[str, float]:
        """What the schedules say at `step`: "lr", "weight_decay" and whatever else the log shows.

        A pure function, so a resumed run needs no replay.
        """

    @abstractmethod
    def loss(
        self, batch: tuple[Tensor, ...], step: int, micro: int, now: dict[str, float]
    ) -> StepLoss:
        """The mean loss of the loader's `batch`, micro-batch number `micro` of `step`.

        `now`: the `hyperparameters` of the step.
        """

    def before_update(self, step: int) -> None:  # noqa: B027 - most tasks need none
        """With all gradients there and clipped, before the optimiser."""

    def after_update(  # noqa: B027 - some tasks need none
        self, now: dict[str, float], means: Float[Tensor, " m"], bad: Bool[Tensor, ""]
    ) -> None:
        """After the optimiser: moving averages, statistics that the ranks share.

        `means`: the losses' means over micro-batches and ranks. Where `bad` is true nothing may
        change anything.
        """

    def evaluates(self, epoch: int) -> bool:
        """Whether `evaluate` is due at the end of `epoch` (from 0)."""
        return False

    def evaluate(self, check: Callable[[], None]) -> dict[str, float]:
        """Numbers for the log; changes nothing of the training. All ranks call it.

        `check` ends the evaluation on all ranks when a signal has come; see `Checked`.
        """
        return {}

    def health(self) -> dict[str, float]:
        """How the last recorded step went, beyond the means; the host waits for the device."""
        return {}

    def recent(self, rows: list[dict]) -> list[dict]:
        """Those of the rows of metrics.jsonl that a later `verdict` rests on."""
        return []

    def verdict(self, rows: list[dict]) -> Verdict | None:
        """What the `recent` rows of metrics.jsonl, in order, say in words; None: nothing."""
        return None

    @abstractmethod
    def modules(self) -> list[nn.Module]:
        """All networks whose BatchNorm statistics move in training."""

    def counters(self) -> StateDict:
        """The running means and counts of the log; in float16 (scale, steps since it changed)."""
        found = {"sums": self.meters.sums, "skipped": self.meters.skipped}
        if self.scaler.is_enabled():
            state = self.scaler.state_dict()
            found["scaler"] = torch.tensor([state["scale"], state["_growth_tracker"]])
        return found

    @abstractmethod
    def tensors(self) -> dict[str, StateDict]:
        """The state dicts of a checkpoint but the optimiser's and the meters', by file name."""

    @abstractmethod
    def load(self, tensors: dict[str, StateDict]) -> None:
        """Inverse of `tensors`."""

    def facts(self) -> dict:
        """Plain data that a checkpoint carries, beside its step, epoch and versions."""
        return {"arch": self.config.arch}

    @abstractmethod
    def summary(self) -> str:
        """What is about to happen, in one line."""

    def on_device(self, crop: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        """(v, n, c, s, s) on the device, normalised there if the loader sent bytes."""
        if crop.dtype != torch.uint8:
            return crop
        return normalise(crop.to(self.ranks.device, non_blocking=True), mean, std)

    def autocast(self) -> AbstractContextManager:
        """Lower precision where the configuration says so."""
        return autocast(self.ranks.device, self.config.run.precision)


def distribute(model: nn.Module, ranks: Distributed) -> nn.Module:
    """`model`, wrapped so that its gradients are means over ranks; itself when there is but one."""
    if ranks.world_size == 1:
        return model
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    distributed_model = DistributedDataParallel(
        model,
        gradient_as_bucket_view=True,
        # The buffers are equal already, see `share_batch_statistics`. Renamed in torch 2.15.
        **{"forward_sync_buffers" if renamed else "broadcast_buffers": False},
    )
    if ranks.device.type == "cpu":
        distributed_model.register_comm_hook(None, mean_in_rank_order)
    return distributed_model


def keep_gradients(model: nn.Module) -> AbstractContextManager:
    """Gradients stay on their rank: they cross the network with a step's last backward pass."""
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def mean_in_rank_order(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The gradients' mean over ranks, each element summed in the order of the ranks.

    gloo's own sum depends on an element's place in its bucket, and DistributedDataParallel sorts
    the buckets anew after a process's first step: more than two ranks would not resume to the bit.
    """
    gradients = bucket.buffer()
    parts = [torch.empty_like(gradients) for _ in range(dist.get_world_size())]
    work = dist.all_gather(parts, gradients, async_op=True)
    return work.get_future().then(lambda _: torch.stack(parts).mean(dim=0))


class Checked:
    """A loader that calls `check` before each batch, equally often on all ranks."""

    def __init__(self, loader: Iterable, check: Callable[[], None]) -> None:
        self._loader, self._check = loader, check

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator:
        batches = iter(self._loader)
        for _ in range(distributed.maximum(len(self._loader))):
            self._check()
            if (batch := next(batches, None)) is not None:
                yield batch


def share_batch_statistics(model: nn.Module, ranks: Distributed, sync_bn: bool) -> nn.Module:
    """`model` with BatchNorm over all ranks' batches, if there are several and `sync_bn`."""
    if ranks.world_size > 1 and sync_bn:
        return synchronise_batchnorm(model, ranks.device)
    return model
