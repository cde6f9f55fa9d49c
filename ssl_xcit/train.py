"""Pretraining: `train(config)`, and the task it gives to the engine, DINO's Algorithm 1."""

import copy
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ssl_xcit import distributed, draws, schedules
from ssl_xcit.augment import dino_views
from ssl_xcit.beton import Beton
from ssl_xcit.checkpoint import StateDict
from ssl_xcit.config import TrainConfig
from ssl_xcit.dino import DINOLoss, loss_statistics, update_teacher
from ssl_xcit.distributed import Distributed
from ssl_xcit.engine import out_of_memory_advice, run_task
from ssl_xcit.errors import UserError
from ssl_xcit.init_from import init_from
from ssl_xcit.loader import MultiCropLoader
from ssl_xcit.metrics import RunningMeans
from ssl_xcit.networks import dino_network
from ssl_xcit.optim import build_optimizer, freeze_last_layer, parameter_groups
from ssl_xcit.probe import Probe
from ssl_xcit.task import Checked, StepLoss, Task, distribute, share_batch_statistics

METERS = ("train/loss", "health/teacher_entropy", "health/kl", "train/grad_norm")
DROP_PATH_STREAM = 1_000  # drop path draws from views numbered from here: not the crops' numbers


def train(config: TrainConfig) -> dict:
    """Pretrain as `config` says, in the run folder `config.out`, and return the last logged row.

    Order of precedence for the weights: 1. the newest complete checkpoint in the run folder;
    2. `init_from`; 3. random initialisation from `config.seed`.

    Raises UserError for what the user can mend: a wrong architecture, a missing or broken beton,
    a run folder that cannot be written or belongs to another configuration, too little memory,
    a loss that is no longer finite.
    """
    ranks = distributed.setup(config.run.device)
    try:
        with out_of_memory_advice(
            config, f"--local_crops_number {config.crops.local_crops_number}"
        ):
            torch.use_deterministic_algorithms(config.run.deterministic)
            return run_task(Pretraining(config, ranks))
    finally:
        distributed.teardown()


class Pretraining(Task):
    """A student that learns from its own moving average, the teacher.

    `model` is the student, in DistributedDataParallel when there are several ranks.
    """

    kind = "pretraining"

    def __init__(self, config: TrainConfig, ranks: Distributed) -> None:
        """Networks, loss, optimiser and loader of a run, from scratch."""
        self.config, self.ranks = config, ranks
        torch.manual_seed(config.seed)  # the same initial weights on every rank
        student = share_batch_statistics(dino_network(config), ranks, config.run.sync_bn)
        # The teacher starts as a copy. It stays in train mode for the whole run: its BatchNorm
        # layers normalise by the statistics of the global views and keep running statistics of
        # their own. Drop path is the student's alone.
        teacher = copy.deepcopy(student).requires_grad_(False)
        teacher.backbone.drop_path_rate = 0.0
        student, self.teacher = student.to(ranks.device).train(), teacher.to(ranks.device).train()
        self.loader = _loader(config, ranks)
        if config.run.compile:
            student.backbone.compile(dynamic=False)
            self.teacher.backbone.compile(dynamic=False)
        groups = parameter_groups(student)
        self.optimizer = build_optimizer(config.optim.optimizer, groups)
        self.model = distribute(student, ranks)
        self.dino_loss = DINOLoss(
            config.head.out_dim, config.loss.student_temp, config.loss.center_momentum
        ).to(ranks.device)
        self.teacher_mean = torch.zeros_like(self.dino_loss.center)  # of this step's logits
        self.meters = RunningMeans(METERS, ranks.device)
        self.probe = Probe(config, ranks) if config.probe.every else None

    def initialise(self) -> list[str]:
        """Start from `init_from`, if there is one."""
        model = self.config.model
        if not model.init_from:
            return []
        networks = self.bare_model, self.teacher, self.dino_loss
        return init_from(model.init_from, self.config.arch, model.init_parts, *networks)

    def hyperparameters(self, step: int) -> dict[str, float]:
        """What the schedules say at `step`."""
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

    def loss(self, batch: tuple[Tensor, ...], step: int, micro: int) -> StepLoss:
        """DINO's loss of a micro-batch, and its share of the mean teacher logits."""
        config, (global_crops, local_crops, indices) = self.config, batch
        teacher_temp = self.hyperparameters(step)["teacher_temp"]
        mean, std = config.crops.mean, config.crops.std
        crops = [self.on_device(crop, mean, std) for crop in (global_crops, local_crops)]
        crops = [crop for crop in crops if len(crop)]  # local_crops_number may be 0
        keys = drop_path_keys(config, step // self.steps_per_epoch, indices, crops)
        with self.autocast():
            with torch.no_grad():
                teacher_logits = self.teacher(crops[:1])
            student_logits = self.model(crops, keys)
            loss = self.dino_loss(student_logits, teacher_logits, teacher_temp)
        with torch.no_grad():
            if micro == 0:
                self.teacher_mean.zero_()
            accumulation = config.optim.accumulation_steps
            logits = teacher_logits.to(self.teacher_mean.dtype)
            self.teacher_mean += logits.mean(0, keepdim=True) / accumulation
            center = self.dino_loss.center
            statistics = loss_statistics(loss.detach(), teacher_logits, center, teacher_temp)
        return StepLoss(loss, tuple(statistics))

    def before_update(self, step: int) -> None:
        """In the first epoch(s) the prototypes stay as they are."""
        epoch = step // self.steps_per_epoch
        if schedules.last_layer_frozen(epoch, self.config.optim.freeze_last_layer):
            freeze_last_layer(self.bare_model)

    def shared_means(self) -> Float[Tensor, "1 k"]:
        """The mean of the teacher's logits."""
        return self.teacher_mean

    def after_update(self, step: int, shared: Float[Tensor, "1 k"], bad: Bool[Tensor, ""]) -> None:
        """The teacher and the centre move, once per step whatever the accumulation."""
        momentum = self.hyperparameters(step)["momentum_teacher"]
        update_teacher(self.bare_model, self.teacher, momentum, skip=bad)
        self.dino_loss.update_center(shared, skip=bad)
        if not self.config.run.sync_bn:
            distributed.all_reduce_buffers(self.modules())

    def evaluates(self, epoch: int) -> bool:
        """Whether the probe is due."""
        return self.probe is not None and (epoch + 1) % self.config.probe.every == 0

    def evaluate(self, check: Callable[[], None]) -> dict[str, float]:
        """k-NN of the teacher."""
        return self.probe(self.teacher.backbone, lambda loader: Checked(loader, check))

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

    def summary(self) -> str:
        """What is about to happen, in one line."""
        config = self.config
        size = sum(p.numel() for p in self.bare_model.backbone.parameters()) / 1e6
        return (
            f"{config.arch} ({size:.1f} M parameters) on {self.ranks.device} x "
            f"{self.ranks.world_size}, {config.run.precision}: {config.optim.epochs} epochs of "
            f"{self.steps_per_epoch} steps, {self.global_batch} images a step"
        )


def drop_path_keys(
    config: TrainConfig, epoch: int, indices: Int[Tensor, " n"], crops: list[Tensor]
) -> list[Int[Tensor, "v n"]] | None:
    """One random stream per (sample, view), independent of rank, micro-batch and history."""
    if config.model.drop_path_rate == 0:
        return None
    keys, view = [], DROP_PATH_STREAM
    for crop in crops:
        numbers = range(view, view + len(crop))
        streams = [draws.stream(config.seed, epoch, indices, number) for number in numbers]
        keys.append(torch.stack(streams).to(crop.device, non_blocking=True))
        view += len(crop)
    return keys


def _loader(config: TrainConfig, ranks: Distributed) -> MultiCropLoader:
    """Batches of this rank."""
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
        # On the CPU the loader's own store pass normalises for less than a torch pass would;
        # for a GPU, bytes are a quarter of the traffic.
        dtype=torch.float32 if ranks.device.type == "cpu" else torch.uint8,
        mean=crops.mean,
        std=crops.std,
    )
