"""Pretraining: `train(config)` and the DINO task that the engine runs."""

import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ssl_xcit.checkpoints.folder import StateDict
from ssl_xcit.data.beton import Beton
from ssl_xcit.data.loader import MultiCropLoader
from ssl_xcit.data.views import dino_views
from ssl_xcit.dino.algorithm import Settings, micro_batch
from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.dino.health import health, means_size
from ssl_xcit.dino.init_from import init_from
from ssl_xcit.dino.loss import DINOLoss
from ssl_xcit.dino.networks import dino_network
from ssl_xcit.dino.probe import Probe
from ssl_xcit.dino.teacher import update_teacher
from ssl_xcit.dino.verdict import recent, verdict
from ssl_xcit.runtime import distributed, draws
from ssl_xcit.runtime.distributed import Distributed
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.training import schedules
from ssl_xcit.training.engine import out_of_memory_advice, run_task
from ssl_xcit.training.guard import BatchStatistics
from ssl_xcit.training.optim import build_optimizer, freeze_last_layer, parameter_groups
from ssl_xcit.training.task import Checked, StepLoss, Task, distribute, share_batch_statistics
from ssl_xcit.training.verdict import Verdict


def train(config: TrainConfig) -> dict:
    """Pretrain with `config` in the run folder `config.out`; return the last logged row.

    The weights come from, in this order: 1. the newest complete checkpoint in the run folder;
    2. `init_from`; 3. random initialisation from `config.seed`.

    Raises UserError for what the user can fix: the data, the run folder (see `run_task`), too
    little memory.
    """
    ranks = distributed.setup(config.run.device)
    try:
        with memory_advice(config):
            torch.use_deterministic_algorithms(config.run.deterministic)
            return run_task(Pretraining(config, ranks))
    finally:
        distributed.teardown()


def memory_advice(config: TrainConfig) -> AbstractContextManager[None]:
    """Context of a pretraining that says which options to change if memory runs out."""
    crops = config.crops
    # crops_in_turn needs local crops and excludes BatchNorm in the head.
    spares = crops.local_crops_number and not config.head.use_bn_in_head
    savers = ["--crops_in_turn true"] if spares and not crops.crops_in_turn else []
    local = f"--local_crops_number {crops.local_crops_number}"
    return out_of_memory_advice(config, local, savers=savers)


class Pretraining(Task):
    """A student that learns from a teacher, its own exponential moving average.

    `model` is the student, wrapped in DistributedDataParallel if there are several ranks.
    """

    kind = "pretraining"

    def __init__(self, config: TrainConfig, ranks: Distributed) -> None:
        """Build networks, loss, optimiser and loader from scratch."""
        self.configure(config, ranks)
        config = self.config
        torch.manual_seed(config.seed)  # the same initial weights on every rank
        student = share_batch_statistics(dino_network(config), ranks, config.run.sync_bn)
        # The teacher starts as a copy. It stays in train mode for the whole run: its BatchNorm
        # layers normalise with the batch statistics of the global views and keep their own running
        # statistics. Only the student has drop path.
        teacher = copy.deepcopy(student).requires_grad_(False)
        teacher.backbone.drop_path_rate = 0.0
        student.backbone.activation_checkpointing = config.run.activation_checkpointing
        student, self.teacher = student.to(ranks.device).train(), teacher.to(ranks.device).train()
        self.loader = _loader(config, ranks)
        student.backbone.compiled = self.teacher.backbone.compiled = config.run.compile
        groups = parameter_groups(student)
        self.optimizer = build_optimizer(config.optim.optimizer, groups)
        self.model = distribute(student, ranks)
        self.dino_loss = DINOLoss(
            config.head.out_dim, config.loss.student_temp, config.loss.center_momentum
        ).to(ranks.device)
        size = means_size(config.head.out_dim, self.teacher.backbone.embed_dim)
        self.health_means = torch.zeros(size, device=ranks.device)  # of the last recorded step
        self.probe = Probe(config, ranks) if config.probe.every else None

    def warm_up(self) -> list[str]:
        """Compile before the first step, if the configuration asks for it."""
        config, start = self.config, time.monotonic()
        if not config.run.compile:
            return []
        statistics = BatchStatistics(self.modules())
        statistics.remember()
        n, channels, crops = config.optim.batch_size_per_gpu, config.model.in_chans, config.crops
        sizes = (2, crops.global_crops_size), (crops.local_crops_number, crops.local_crops_size)
        batch = [
            torch.zeros(views, n, channels, side, side, device=self.ranks.device)
            for views, side in sizes
        ]
        self.loss((*batch, torch.arange(n)), 0, 0, self.hyperparameters(0)).loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        statistics.restore(torch.tensor(True, device=self.ranks.device))
        return [f"compiled for all crop sizes in {time.monotonic() - start:.0f} s"]

    def initialise(self) -> list[str]:
        """Load the weights of `init_from`, if given."""
        model = self.config.model
        if not model.init_from:
            return []
        networks = self.bare_model, self.teacher, self.dino_loss
        return init_from(
            model.init_from, self.config.arch, model.init_parts, *networks, model.init_prefix
        )

    def hyperparameters(self, step: int) -> dict[str, float]:
        """Values of the schedules at `step`."""
        optim, loss = self.config.optim, self.config.loss
        per_epoch, total = self.steps_per_epoch, self.total_steps
        peak, warmup = schedules.scaled_lr(optim.lr, self.global_batch), optim.warmup_epochs
        return {
            "lr": schedules.cosine(step, peak, optim.min_lr, total, warmup * per_epoch),
            "weight_decay": schedules.cosine(
                step, optim.weight_decay, optim.weight_decay_end, total
            ),
            "momentum_teacher": schedules.cosine(step, loss.momentum_teacher, 1.0, total),
            "teacher_temp": schedules.teacher_temp(
                step // per_epoch,
                loss.warmup_teacher_temp,
                loss.teacher_temp,
                loss.warmup_teacher_temp_epochs,
                optim.epochs,
            ),
            "student_temp": loss.student_temp,
        }

    def loss(
        self, batch: tuple[Tensor, ...], step: int, micro: int, now: dict[str, float]
    ) -> StepLoss:
        """DINO loss of a micro-batch, mean of the teacher's logits, and health means if due."""
        config, (global_crops, local_crops, indices) = self.config, batch
        mean, std = config.crops.mean, config.crops.std
        crops = [self.on_device(crop, mean, std) for crop in (global_crops, local_crops)]
        crops = [crop for crop in crops if len(crop)]  # local_crops_number may be 0
        settings = Settings(
            teacher_temp=now["teacher_temp"],
            precision=config.run.precision,
            last_layer_frozen=self._last_layer_is_frozen(step),
            crops_in_turn=config.crops.crops_in_turn,
        )
        accumulation = config.optim.accumulation_steps
        found = micro_batch(
            self.model,
            self.teacher,
            self.dino_loss,
            crops,
            drop_path_keys(config, step // self.steps_per_epoch, indices, crops),
            settings,
            backward=lambda loss: self.scaler.scale(loss / accumulation).backward(),
            with_health=self.recorded(step),
        )
        means = found.teacher_mean
        if found.health is not None:
            means = torch.cat([means, found.health])
        return StepLoss(found.loss, means)

    def _last_layer_is_frozen(self, step: int) -> bool:
        """Whether the prototypes are frozen at `step`, in the first epochs."""
        return step // self.steps_per_epoch < self.config.optim.freeze_last_layer

    def before_update(self, step: int) -> None:
        """Keep frozen prototypes unchanged, also by weight decay."""
        if self._last_layer_is_frozen(step):
            freeze_last_layer(self.bare_model)

    def after_update(
        self, now: dict[str, float], means: Float[Tensor, " m"], bad: Bool[Tensor, ""]
    ) -> None:
        """Update the teacher and the centre, once per step regardless of the accumulation."""
        update_teacher(self.bare_model, self.teacher, now["momentum_teacher"], skip=bad)
        k = self.dino_loss.center.numel()
        self.dino_loss.update_center(means[None, :k], skip=bad)
        if len(means) > k:  # zeros, not NaN, because checkpoints store them
            self.health_means.copy_(torch.where(bad, 0.0, means[k:]))
        if not self.config.run.sync_bn:
            distributed.all_reduce_buffers(self.modules())

    def evaluates(self, epoch: int) -> bool:
        """Whether the probe is due after `epoch`."""
        return self.probe is not None and (epoch + 1) % self.config.probe.every == 0

    def evaluate(self, check: Callable[[], None]) -> dict[str, float]:
        """Run the k-NN probe on the teacher."""
        return self.probe(self.teacher.backbone, lambda loader: Checked(loader, check))

    def health(self) -> dict[str, float]:
        """Health metrics of the last recorded step, see `dino.health`."""
        found = health(self.health_means, self.dino_loss.center, self.global_batch)
        return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))

    def recent(self, rows: list[dict]) -> list[dict]:
        """Rows that a later verdict needs, see `dino.verdict`."""
        return recent(rows)

    def verdict(self, rows: list[dict]) -> Verdict:
        """Verdict on the recent rows, see `dino.verdict`."""
        return verdict(rows, self.config)

    def counters(self) -> StateDict:
        """Counters of the log, and the health means of the last recorded step."""
        return super().counters() | {"health": self.health_means}

    def modules(self) -> list[nn.Module]:
        """Student and teacher."""
        return [self.bare_model, self.teacher]

    def tensors(self) -> dict[str, StateDict]:
        """Student, teacher and centre."""
        modules = {"student": self.bare_model, "teacher": self.teacher, "loss": self.dino_loss}
        return {name: module.state_dict() for name, module in modules.items()}

    def load(self, tensors: dict[str, StateDict]) -> None:
        """Inverse of `tensors`."""
        self.bare_model.load_state_dict(tensors["student"])
        self.teacher.load_state_dict(tensors["teacher"])
        self.dino_loss.load_state_dict(tensors["loss"])

    def facts(self) -> dict:
        """With the statistics that the images are normalised by: a copy needs no config.yaml."""
        crops = self.config.crops
        return super().facts() | {"mean": crops.mean, "std": crops.std}

    def summary(self) -> str:
        """Describe the run in one line."""
        config = self.config
        size = sum(p.numel() for p in self.bare_model.backbone.parameters()) / 1e6
        return (
            f"{config.arch} ({size:.1f} M parameters) on {self.ranks.device} x "
            f"{self.ranks.world_size}: {config.optim.epochs} epochs of {self.steps_per_epoch} "
            f"steps, {self.global_batch} images a step"
        )


def drop_path_keys(
    config: TrainConfig, epoch: int, indices: Int[Tensor, " n"], crops: list[Tensor]
) -> list[Int[Tensor, "v n"]] | None:
    """Random streams of drop path, one per (sample, view).

    They do not depend on rank, micro-batch or history. They stay on the host, so that the host
    knows which samples skip a branch; a compiled graph skips none and takes them on the device.
    """
    if config.model.drop_path_rate == 0:
        return None
    keys, view = [], draws.DROP_PATH
    for crop in crops:
        numbers = range(view, view + len(crop))
        streams = [draws.stream(config.seed, epoch, indices, number) for number in numbers]
        device = crop.device if config.run.compile else indices.device
        keys.append(torch.stack(streams).to(device, non_blocking=True))
        view += len(crop)
    return keys


def _loader(config: TrainConfig, ranks: Distributed) -> MultiCropLoader:
    """Build the loader of this rank's batches."""
    crops, in_chans = config.crops, config.model.in_chans
    beton = Beton(config.data)
    if beton.channels != in_chans:
        raise UserError(
            f"{config.data} holds images of {beton.channels} channels, model.in_chans is "
            f"{in_chans}: pass --in_chans {beton.channels}"
        )
    return MultiCropLoader(
        beton,
        dino_views(**crops.view_arguments()),
        config.optim.batch_size_per_gpu,
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        accumulation_steps=config.optim.accumulation_steps,
        num_threads=config.run.num_workers,
        # On the CPU the loader normalises while it stores, which is cheaper than a pass by torch.
        # A GPU gets bytes, a quarter of the traffic.
        dtype=torch.float32 if ranks.device.type == "cpu" else torch.uint8,
        mean=crops.mean,
        std=crops.std,
    )
