"""The interface between engine and method: a `Task` defines the loss, the engine does the rest."""

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
    """The loss of a micro-batch, before its backward pass, and other means."""

    loss: Float[Tensor, ""]
    means: Float[Tensor, " m"] | None = None  # `after_update` gets their average over the step


METERS = ("train/loss", "train/grad_norm")


class Task(ABC):
    """What the engine trains. One optimiser step (`engine.train_step`) is:

        loss (per micro-batch), backward -> clip -> before_update -> optimiser -> after_update

    `loss` may already have run the backward pass of a part of the loss. Only `loss` sees
    micro-batches; updates that happen once per step belong in `after_update`. A task uses no random
    generator with a state, and keeps no state between steps except `tensors()`.
    """

    kind: ClassVar[str]  # stored in the run folder
    config: TaskConfig
    precision: Precision  # in use, and why it was chosen
    ranks: Distributed
    loader: MultiCropLoader  # of the training images; an epoch ends after `steps_per_epoch` steps
    model: nn.Module  # wrapped in DistributedDataParallel if there are several ranks
    optimizer: torch.optim.Optimizer
    meters: RunningMeans  # of the loss and the gradient norm

    def configure(self, config: TaskConfig, ranks: Distributed) -> None:
        """Set config (with "auto" precision resolved), precision, ranks and meters."""
        stored = stored_precision(Path(config.out) / "config.yaml")
        self.precision = choose(config.run.precision, ranks, stored)
        run = dataclasses.replace(config.run, precision=self.precision.name)
        self.config, self.ranks = dataclasses.replace(config, run=run), ranks
        self.meters = RunningMeans(METERS, ranks.device)

    @functools.cached_property
    def scaler(self) -> torch.amp.GradScaler:
        """Gradient scaler that keeps float16 gradients in range; disabled in other precisions."""
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
        """Whether `step` gets a row in metrics.jsonl; `loss` computes health metrics only then."""
        done = step + 1
        logged = done % self.config.run.log_every == 0
        return logged or done == self.total_steps or self.evaluated(step)

    def warm_up(self) -> list[str]:
        """Do slow preparations that change no state, before the first step; return log lines."""
        return []

    def initialise(self) -> list[str]:
        """Load initial weights if no checkpoint is resumed; return log lines."""
        return []

    @abstractmethod
    def hyperparameters(self, step: int) -> dict[str, float]:
        """Return the schedules' values at `step`: "lr", "weight_decay" and others for the log.

        It must be a pure function, so that a resumed run needs no replay.
        """

    @abstractmethod
    def loss(
        self, batch: tuple[Tensor, ...], step: int, micro: int, now: dict[str, float]
    ) -> StepLoss:
        """Compute the mean loss of `batch`, which is micro-batch `micro` of `step`.

        `now`: the `hyperparameters` of the step.
        """

    def before_update(self, step: int) -> None:  # noqa: B027 - most tasks need none
        """Hook after gradient clipping and before the optimiser."""

    def after_update(  # noqa: B027 - some tasks need none
        self, now: dict[str, float], means: Float[Tensor, " m"], bad: Bool[Tensor, ""]
    ) -> None:
        """Hook after the optimiser: moving averages, statistics shared over ranks.

        `means`: the `StepLoss.means`, averaged over micro-batches and ranks. If `bad` is true, the
        hook must change nothing.
        """

    def evaluates(self, epoch: int) -> bool:
        """Whether `evaluate` is due at the end of `epoch` (from 0)."""
        return False

    def evaluate(self, check: Callable[[], None]) -> dict[str, float]:
        """Return numbers for the log without changing the training state. All ranks call it.

        `check` ends the evaluation on all ranks after a signal; see `Checked`.
        """
        return {}

    def health(self) -> dict[str, float]:
        """Return health metrics of the last recorded step; the host waits for the device."""
        return {}

    def recent(self, rows: list[dict]) -> list[dict]:
        """Return the rows of metrics.jsonl that a later `verdict` needs."""
        return []

    def verdict(self, rows: list[dict]) -> Verdict | None:
        """Interpret the `recent` rows of metrics.jsonl; None if there is nothing to say."""
        return None

    @abstractmethod
    def modules(self) -> list[nn.Module]:
        """Return all networks whose BatchNorm statistics change in training."""

    def counters(self) -> StateDict:
        """Return the log's running means and counts, and in float16 the gradient scaler's state."""
        found = {"sums": self.meters.sums, "skipped": self.meters.skipped}
        if self.scaler.is_enabled():
            state = self.scaler.state_dict()
            found["scaler"] = torch.tensor([state["scale"], state["_growth_tracker"]])
        return found

    @abstractmethod
    def tensors(self) -> dict[str, StateDict]:
        """Return a checkpoint's state dicts by file name, without optimiser and meters."""

    @abstractmethod
    def load(self, tensors: dict[str, StateDict]) -> None:
        """Load what `tensors` returned."""

    def facts(self) -> dict:
        """Return plain data for state.json, besides step, epoch and versions."""
        return {"arch": self.config.arch}

    @abstractmethod
    def summary(self) -> str:
        """Describe the run in one line."""

    def on_device(self, crop: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        """Move a crop (v, n, c, s, s) to the device and normalise it there if it is uint8."""
        if crop.dtype != torch.uint8:
            return crop
        return normalise(crop.to(self.ranks.device, non_blocking=True), mean, std)

    def autocast(self) -> AbstractContextManager:
        """Autocast context of the configured precision."""
        return autocast(self.ranks.device, self.config.run.precision)


def distribute(model: nn.Module, ranks: Distributed) -> nn.Module:
    """Wrap `model` in DistributedDataParallel if there are several ranks."""
    if ranks.world_size == 1:
        return model
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    distributed_model = DistributedDataParallel(
        model,
        gradient_as_bucket_view=True,
        # Buffers are already equal, see `share_batch_statistics`. The option is renamed in 2.15.
        **{"forward_sync_buffers" if renamed else "broadcast_buffers": False},
    )
    if ranks.device.type == "cpu":
        distributed_model.register_comm_hook(None, mean_in_rank_order)
    return distributed_model


def keep_gradients(model: nn.Module) -> AbstractContextManager:
    """Context without gradient reduction; a step's last backward pass reduces all gradients."""
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def mean_in_rank_order(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average gradients over ranks, summing each element in the order of the ranks.

    gloo's summation order depends on an element's position in its bucket, and
    DistributedDataParallel rebuilds the buckets after a process's first step: with more than two
    ranks, a resumed run would not be bit-for-bit equal.
    """
    gradients = bucket.buffer()
    parts = [torch.empty_like(gradients) for _ in range(dist.get_world_size())]
    work = dist.all_gather(parts, gradients, async_op=True)
    return work.get_future().then(lambda _: torch.stack(parts).mean(dim=0))


class Checked:
    """Wraps a loader to call `check` before each batch, equally often on all ranks."""

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
    """Synchronise BatchNorm over ranks if there are several and `sync_bn` is true."""
    if ranks.world_size > 1 and sync_bn:
        return synchronise_batchnorm(model, ranks.device)
    return model
