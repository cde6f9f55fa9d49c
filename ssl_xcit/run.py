"""A pretraining run in memory: its models, loss, optimiser and loader; saved and resumed."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssl_xcit import checkpoint, schedules
from ssl_xcit.augment import dino_views
from ssl_xcit.beton import Beton
from ssl_xcit.config import TrainConfig
from ssl_xcit.dino import DINOHead, DINOLoss, MultiCropWrapper
from ssl_xcit.distributed import Distributed
from ssl_xcit.errors import UserError
from ssl_xcit.loader import MultiCropLoader
from ssl_xcit.metrics import RunningMeans
from ssl_xcit.optim import build_optimizer, parameter_groups
from ssl_xcit.probe import Probe
from ssl_xcit.run_folder import versions
from ssl_xcit.xcit import build_xcit

METERS = ("train/loss", "health/teacher_entropy", "health/kl", "train/grad_norm")


class Hyperparameters(NamedTuple):
    """Everything that is scheduled, at one step."""

    lr: float
    weight_decay: float
    momentum_teacher: float
    teacher_temp: float


@dataclass
class Run:
    """A run in memory."""

    config: TrainConfig
    ranks: Distributed
    loader: MultiCropLoader
    student: nn.Module  # wrapped in DistributedDataParallel when there are several ranks
    teacher: MultiCropWrapper
    dino_loss: DINOLoss
    optimizer: torch.optim.Optimizer
    meters: RunningMeans
    probe: Probe | None

    @property
    def global_batch(self) -> int:
        """Images per optimiser step, over ranks and accumulation."""
        optim = self.config.optim
        return optim.batch_size_per_gpu * optim.accumulation_steps * self.ranks.world_size

    @property
    def bare_student(self) -> MultiCropWrapper:
        """The student without its DistributedDataParallel wrapper."""
        student = self.student
        return student.module if isinstance(student, DistributedDataParallel) else student

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.config.optim.epochs * len(self.loader)


def build(config: TrainConfig, ranks: Distributed) -> Run:
    """Models, loss, optimiser and loader of a run, from scratch."""
    crops, optim, head = config.crops, config.optim, config.head
    cpu = ranks.device.type == "cpu"
    torch.manual_seed(config.seed)  # the same initial weights on every rank
    backbone = build_xcit(
        config.arch,
        num_classes=0,
        in_chans=config.model.in_chans,
        drop_path_rate=config.model.drop_path_rate,
    )
    views = dino_views(**crops.view_arguments())
    beton = Beton(config.data)
    if beton.channels != config.model.in_chans:
        raise UserError(
            f"{config.data} holds images of {beton.channels} channels, model.in_chans is "
            f"{config.model.in_chans}: pass --in_chans {beton.channels}"
        )
    loader = MultiCropLoader(
        beton,
        views,
        optim.batch_size_per_gpu,
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        accumulation_steps=optim.accumulation_steps,
        num_threads=config.run.num_workers,
        # On the CPU the loader's own store pass normalises for less than a torch pass would;
        # for a GPU, bytes are a quarter of the traffic.
        dtype=torch.float32 if cpu else torch.uint8,
        mean=crops.mean,
        std=crops.std,
    )
    student = MultiCropWrapper(
        backbone,
        DINOHead(
            backbone.embed_dim,
            head.out_dim,
            use_bn=head.use_bn_in_head,
            norm_last_layer=head.norm_last_layer,
            nlayers=head.head_layers,
            hidden_dim=head.head_hidden_dim,
            bottleneck_dim=head.head_bottleneck_dim,
        ),
    )
    if ranks.world_size > 1 and not cpu:  # SyncBatchNorm exists for CUDA tensors only
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    # The teacher starts as a copy. It stays in train mode for the whole run: its BatchNorm layers
    # normalise by the statistics of the global views and keep running statistics of their own.
    # Drop path is the student's alone.
    teacher = copy.deepcopy(student).requires_grad_(False)
    teacher.backbone.drop_path_rate = 0.0
    student, teacher = student.to(ranks.device), teacher.to(ranks.device)
    if config.run.compile:
        student.backbone.compile(dynamic=False)
        teacher.backbone.compile(dynamic=False)
    optimizer = build_optimizer(optim.optimizer, parameter_groups(student), fused=not cpu)
    if ranks.world_size > 1:
        student = DistributedDataParallel(
            student,
            device_ids=None if cpu else [ranks.device.index],
            broadcast_buffers=False,  # equal already: SyncBatchNorm, or all_reduce_buffers below
            gradient_as_bucket_view=True,
        )
    dino_loss = DINOLoss(head.out_dim, config.loss.student_temp, config.loss.center_momentum)
    return Run(
        config,
        ranks,
        loader,
        student,
        teacher,
        dino_loss.to(ranks.device),
        optimizer,
        RunningMeans(METERS, ranks.device),
        Probe(config, ranks) if config.probe.every else None,
    )


def hyperparameters(run: Run, step: int) -> Hyperparameters:
    """What the schedules say at `step`: a pure function, so a resumed run needs no replay."""
    optim, loss = run.config.optim, run.config.loss
    per_epoch, total = len(run.loader), run.total_steps
    return Hyperparameters(
        lr=schedules.cosine(
            step,
            schedules.scaled_lr(optim.lr, run.global_batch),
            optim.min_lr,
            total,
            warmup_steps=optim.warmup_epochs * per_epoch,
        ),
        weight_decay=schedules.cosine(step, optim.weight_decay, optim.weight_decay_end, total),
        momentum_teacher=schedules.cosine(step, loss.momentum_teacher, 1.0, total),
        teacher_temp=schedules.teacher_temp(
            step // per_epoch,
            loss.warmup_teacher_temp,
            loss.teacher_temp,
            loss.warmup_teacher_temp_epochs,
            optim.epochs,
        ),
    )


def resume(run: Run, folder: Path) -> int:
    """Load the newest complete checkpoint into `run`; the number of steps it had finished."""
    found, skipped = checkpoint.load_latest(folder)
    if run.ranks.rank == 0:
        for line in skipped:
            print(f"skipped: {line}")
    if found is None:
        return 0
    tensors = found.tensors
    run.bare_student.load_state_dict(tensors["student"])
    run.teacher.load_state_dict(tensors["teacher"])
    run.dino_loss.load_state_dict(tensors["loss"])
    run.meters.sums.copy_(tensors["meters"]["sums"])
    _load_optimizer(run, tensors["optimizer"])
    if run.ranks.rank == 0:
        print(f"resuming {found.path} at step {found.state['step']}")
    return found.state["step"]


def save(run: Run, folder: Path, step: int, keep: bool) -> checkpoint.Saved:
    """Publish the state after `step` finished steps."""
    tensors = {
        "student": run.bare_student.state_dict(),
        "teacher": run.teacher.state_dict(),
        "loss": run.dino_loss.state_dict(),
        "meters": {"sums": run.meters.sums},
        "optimizer": _optimizer_tensors(run),
    }
    state = {"arch": run.config.arch, "epoch": step // len(run.loader), "versions": versions()}
    return checkpoint.save_checkpoint(
        folder, step, tensors, state, keep_last=run.config.run.keep_last, keep=keep
    )


def _optimizer_tensors(run: Run) -> dict[str, Tensor]:
    """The optimiser's state as flat `<parameter>/<moment>` tensors."""
    names = {id(p): name for name, p in run.bare_student.named_parameters()}
    return {
        f"{names[id(parameter)]}/{key}": value
        for parameter, moments in run.optimizer.state.items()
        for key, value in moments.items()
    }


def _load_optimizer(run: Run, tensors: dict[str, Tensor]) -> None:
    """Inverse of `_optimizer_tensors`."""
    order = [p for group in run.optimizer.param_groups for p in group["params"]]
    position = {id(parameter): index for index, parameter in enumerate(order)}
    names = {name: position.get(id(p)) for name, p in run.bare_student.named_parameters()}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, moment = key.rsplit("/", 1)
        state.setdefault(names[name], {})[moment] = value
    groups = run.optimizer.state_dict()["param_groups"]
    run.optimizer.load_state_dict({"state": state, "param_groups": groups})
