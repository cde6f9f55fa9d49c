"""Pretraining: `train(config)`, and the task it gives to the engine, DINO's Algorithm 1."""

import copy
import itertools
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ssl_xcit.checkpoints.folder import StateDict
from ssl_xcit.data.beton import Beton
from ssl_xcit.data.loader import MultiCropLoader
from ssl_xcit.data.views import dino_views
from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.dino.health import batch_means, health, means_size
from ssl_xcit.dino.init_from import init_from
from ssl_xcit.dino.loss import DINOLoss
from ssl_xcit.dino.networks import Part, dino_network, split_crops
from ssl_xcit.dino.probe import Probe
from ssl_xcit.dino.teacher import update_teacher
from ssl_xcit.dino.verdict import recent, verdict
from ssl_xcit.operators.chunked_loss import Temperatures, chunked_loss
from ssl_xcit.runtime import distributed, draws
from ssl_xcit.runtime.distributed import Distributed
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.training import schedules
from ssl_xcit.training.engine import out_of_memory_advice, run_task
from ssl_xcit.training.guard import BatchStatistics
from ssl_xcit.training.metrics import RunningMeans
from ssl_xcit.training.optim import build_optimizer, freeze_last_layer, parameter_groups
from ssl_xcit.training.task import (
    Checked,
    StepLoss,
    Task,
    Verdict,
    distribute,
    keep_gradients,
    share_batch_statistics,
)

METERS = ("train/loss", "train/grad_norm")
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
        with memory_advice(config):
            torch.use_deterministic_algorithms(config.run.deterministic)
            return run_task(Pretraining(config, ranks))
    finally:
        distributed.teardown()


def memory_advice(config: TrainConfig) -> out_of_memory_advice:
    """Around a pretraining: what to change when its memory runs out."""
    crops = config.crops
    # It is of no use without local crops, and refused with BatchNorm in the head
    spares = crops.local_crops_number and not config.head.use_bn_in_head
    savers = ["--crops_in_turn true"] if spares and not crops.crops_in_turn else []
    local = f"--local_crops_number {crops.local_crops_number}"
    return out_of_memory_advice(config, local, savers=savers)


class Comparison(NamedTuple):
    """What came of holding a micro-batch's student against its teacher."""

    loss: Float[Tensor, ""]
    teacher_mean: Float[Tensor, "1 k"]  # of its logits
    student_logits: Iterable[Float[Tensor, "n k"]]  # view by view
    teacher_logits: Iterable[Float[Tensor, "n k"]]


class Pretraining(Task):
    """A student that learns from its own moving average, the teacher.

    `model` is the student, in DistributedDataParallel when there are several ranks.
    """

    kind = "pretraining"

    def __init__(self, config: TrainConfig, ranks: Distributed) -> None:
        """Networks, loss, optimiser and loader of a run, from scratch."""
        self.configure(config, ranks)
        config = self.config
        torch.manual_seed(config.seed)  # the same initial weights on every rank
        student = share_batch_statistics(dino_network(config), ranks, config.run.sync_bn)
        # The teacher starts as a copy. It stays in train mode for the whole run: its BatchNorm
        # layers normalise by the statistics of the global views and keep running statistics of
        # their own. Drop path is the student's alone.
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
        self.teacher_mean = torch.zeros_like(self.dino_loss.center)  # of this step's logits
        size = means_size(config.head.out_dim, self.teacher.backbone.embed_dim)
        self.health_means = torch.zeros(size, device=ranks.device)  # of the last recorded step
        self.meters = RunningMeans(METERS, ranks.device)
        self.probe = Probe(config, ranks) if config.probe.every else None

    def warm_up(self) -> list[str]:
        """Compile, if that is wanted, before the first step and not in it."""
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
        self.loss((*batch, torch.arange(n)), 0, 0).loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        statistics.restore(torch.tensor(True, device=self.ranks.device))
        return [f"compiled for its sizes of crops in {time.monotonic() - start:.0f} s"]

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
        """DINO's loss of a micro-batch, and its share of the mean teacher logits.

        With `crops_in_turn` the gradients of the global crops' part have been added up when it
        returns: what that pass kept for them is free before the local crops' pass.
        """
        config, (global_crops, local_crops, indices) = self.config, batch
        teacher_temp = self.hyperparameters(step)["teacher_temp"]
        mean, std = config.crops.mean, config.crops.std
        crops = [self.on_device(crop, mean, std) for crop in (global_crops, local_crops)]
        crops = [crop for crop in crops if len(crop)]  # local_crops_number may be 0
        keys = drop_path_keys(config, step // self.steps_per_epoch, indices, crops)
        epoch = step // self.steps_per_epoch
        frozen = schedules.last_layer_frozen(epoch, config.optim.freeze_last_layer)
        self.bare_model.head.last_layer.frozen = frozen
        accumulation = config.optim.accumulation_steps
        chunk = config.head.prototype_chunk
        with self.autocast(), torch.no_grad():
            teacher_features = self.teacher.backbone(crops[0].flatten(0, 1))
            head = self.teacher.head.unit_vectors if chunk else self.teacher.head
            teacher_outputs = head(teacher_features)
        compare = self._compare_by_chunks if chunk else self._compare
        *early, last = split_crops(crops, keys, config.crops.crops_in_turn)
        losses, student_logits = [], []
        for part in early:
            with keep_gradients(self.model):
                with self.autocast():
                    found = compare(part, teacher_outputs, teacher_temp)
                self.scaler.scale(found.loss / accumulation).backward()
            losses.append(found.loss.detach())
            student_logits.append(found.student_logits)
        with self.autocast():
            found = compare(last, teacher_outputs, teacher_temp)
        loss = sum(losses, found.loss)
        student_logits.append(found.student_logits)
        with torch.no_grad():
            if micro == 0:
                self.teacher_mean.zero_()
            self.teacher_mean += found.teacher_mean / accumulation
            self.to_share = [self.teacher_mean]
            if self.recorded(step):
                if micro == 0:
                    self.health_means.zero_()
                temperatures = self.dino_loss.student_temp, teacher_temp
                logits = itertools.chain(*student_logits), found.teacher_logits
                center = self.dino_loss.center
                with self.autocast():
                    means = batch_means(loss, *logits, teacher_features, center, temperatures)
                self.health_means += means / accumulation
                self.to_share.append(self.health_means)
        return StepLoss(loss)

    def _compare(
        self, part: Part, teacher_logits: Float[Tensor, "tn k"], teacher_temp: float
    ) -> Comparison:
        """From the logits of all prototypes at once."""
        student_logits = self.model(part.crops, part.keys)
        loss = self.dino_loss(student_logits, teacher_logits, teacher_temp, part.views, part.total)
        n = len(teacher_logits) // 2
        mean = teacher_logits.mean(0, keepdim=True)
        return Comparison(loss, mean, student_logits.detach().split(n), teacher_logits.split(n))

    def _compare_by_chunks(
        self, part: Part, teacher_vectors: Float[Tensor, "tn e"], teacher_temp: float
    ) -> Comparison:
        """The same with `prototype_chunk` prototypes at a time."""
        student_vectors = self.model(part.crops, part.keys, unit_vectors=True)
        layers = self.bare_model.head.last_layer, self.teacher.head.last_layer
        loss, mean = chunked_loss(
            student_vectors,
            layers[0],
            teacher_vectors,
            layers[1],
            self.dino_loss.center,
            Temperatures(self.dino_loss.student_temp, teacher_temp),
            self.config.head.prototype_chunk,
            part.views,
            part.total,
        )
        # For the log, which looks at one view after the other
        vectors = (student_vectors.detach(), teacher_vectors)
        n = len(teacher_vectors) // 2
        logits = (map(layer, v.split(n)) for layer, v in zip(layers, vectors, strict=True))
        return Comparison(loss, mean, *logits)

    def before_update(self, step: int) -> None:
        """In the first epoch(s) the prototypes stay as they are."""
        epoch = step // self.steps_per_epoch
        if schedules.last_layer_frozen(epoch, self.config.optim.freeze_last_layer):
            freeze_last_layer(self.bare_model)

    def shared_means(self) -> Float[Tensor, " means"]:
        """The mean of the teacher's logits; in a recorded step, too, what its health needs."""
        return torch.cat([means.flatten() for means in self.to_share])

    def after_update(self, step: int, shared: Float[Tensor, " m"], bad: Bool[Tensor, ""]) -> None:
        """The teacher and the centre move, once per step whatever the accumulation."""
        momentum = self.hyperparameters(step)["momentum_teacher"]
        update_teacher(self.bare_model, self.teacher, momentum, skip=bad)
        mean, *means = shared.split([part.numel() for part in self.to_share])
        self.dino_loss.update_center(mean[None], skip=bad)
        for part in means:  # zeros, not NaN: a checkpoint holds them
            self.health_means.copy_(torch.where(bad, 0.0, part))
        if not self.config.run.sync_bn:
            distributed.all_reduce_buffers(self.modules())

    def evaluates(self, epoch: int) -> bool:
        """Whether the probe is due."""
        return self.probe is not None and (epoch + 1) % self.config.probe.every == 0

    def evaluate(self, check: Callable[[], None]) -> dict[str, float]:
        """k-NN of the teacher."""
        return self.probe(self.teacher.backbone, lambda loader: Checked(loader, check))

    def health(self) -> dict[str, float]:
        """See `diagnostics.health`."""
        found = health(self.health_means, self.dino_loss.center, self.global_batch)
        return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))

    def recent(self, rows: list[dict]) -> list[dict]:
        """See `ssl_xcit.dino.verdict`."""
        return recent(rows)

    def verdict(self, rows: list[dict]) -> Verdict:
        """See `ssl_xcit.dino.verdict`."""
        return verdict(rows, self.config)

    def counters(self) -> StateDict:
        """The log's, and what the health of the last recorded step needs."""
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

    def summary(self) -> str:
        """What is about to happen, in one line."""
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
    """One random stream per (sample, view), independent of rank, micro-batch and history.

    They stay on the host, which then knows which samples to leave out of a branch's work; a
    compiled graph leaves out none.
    """
    if config.model.drop_path_rate == 0:
        return None
    keys, view = [], DROP_PATH_STREAM
    for crop in crops:
        numbers = range(view, view + len(crop))
        streams = [draws.stream(config.seed, epoch, indices, number) for number in numbers]
        device = crop.device if config.run.compile else indices.device
        keys.append(torch.stack(streams).to(device, non_blocking=True))
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
