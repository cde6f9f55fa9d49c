"""Pretraining: `train(config)` builds a run, resumes it if its folder holds one, and loops.

The state of a run is its tensors and the number of finished steps. Data order, crops and drop path
are pure functions of (seed, epoch, sample index, view), so nothing else needs to be saved, and a
run that was killed continues as if nothing had happened.
"""

import contextlib
import resource
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssl_xcit import distributed, draws, schedules
from ssl_xcit.config import TrainConfig
from ssl_xcit.dino import loss_statistics, update_teacher
from ssl_xcit.errors import UserError
from ssl_xcit.features import normalise
from ssl_xcit.metrics import MetricsWriter, Progress, read_metrics
from ssl_xcit.optim import clip_gradients, freeze_last_layer, set_hyperparameters
from ssl_xcit.run import METERS, Run, build, hyperparameters, resume, save
from ssl_xcit.run_folder import claim_folder

DROP_PATH_STREAM = 1_000  # drop path draws from views numbered from here: not the crops' numbers


def train(config: TrainConfig) -> dict:
    """Pretrain as `config` says, in the run folder `config.out`, and return the last logged row.

    Order of precedence for the weights: 1. the newest complete checkpoint in the run folder;
    2. random initialisation from `config.seed`.

    Raises UserError for what the user can mend: a wrong architecture, a missing or broken beton,
    a run folder that cannot be written or belongs to another configuration, too little memory,
    a loss that is no longer finite.
    """
    ranks = distributed.setup(config.run.device)
    try:
        with out_of_memory_advice(config):
            return _train(config, ranks)
    finally:
        distributed.teardown()


def _train(config: TrainConfig, ranks: distributed.Distributed) -> dict:
    torch.use_deterministic_algorithms(config.run.deterministic)
    run = build(config, ranks)
    out = Path(config.out)
    if ranks.rank == 0:
        claim_folder(out, config, run.global_batch)
    distributed.barrier()
    first_step = resume(run, out / "checkpoints")
    if first_step >= run.total_steps:
        if ranks.rank == 0:
            print(f"{out} is finished: {run.total_steps} steps")
        return read_metrics(out / "metrics.jsonl")[-1]
    with contextlib.closing(run.loader), contextlib.closing(Log(run, out, first_step)) as log:
        return _loop(run, log, out, first_step)


def train_step(run: Run, batches: Iterator, step: int) -> None:
    """One optimiser step: DINO's Algorithm 1, over `accumulation_steps` micro-batches.

    The centre and the teacher move once per step, whatever the accumulation.
    """
    config, device = run.config, run.ranks.device
    epoch, accumulation = step // len(run.loader), config.optim.accumulation_steps
    now = hyperparameters(run, step)
    set_hyperparameters(run.optimizer, now.lr, now.weight_decay)
    teacher_mean = torch.zeros_like(run.dino_loss.center)
    means = torch.zeros(3, device=device)
    for micro in range(accumulation):
        global_crops, local_crops, indices = next(batches)
        crops = [_to_device(crop, config, device) for crop in (global_crops, local_crops)]
        crops = [crop for crop in crops if len(crop)]  # local_crops_number may be 0
        keys = drop_path_keys(config, epoch, indices, crops)
        with _reduce_gradients_at_end(run.student, micro == accumulation - 1):
            with torch.autocast(device.type, torch.bfloat16, config.run.precision == "bf16"):
                with torch.no_grad():
                    teacher_logits = run.teacher(crops[:1])
                student_logits = run.student(crops, keys)
                loss = run.dino_loss(student_logits, teacher_logits, now.teacher_temp)
            (loss / accumulation).backward()
        with torch.no_grad():
            teacher_mean += teacher_logits.float().mean(0, keepdim=True) / accumulation
            entropy, kl = loss_statistics(
                loss.detach(), teacher_logits, run.dino_loss.center, now.teacher_temp
            )
            means += torch.stack([loss.detach(), entropy, kl]) / accumulation
    parameters = list(run.bare_student.parameters())
    grad_norm = clip_gradients(parameters, config.optim.clip_grad, config.optim.clip_mode)
    if schedules.last_layer_frozen(epoch, config.optim.freeze_last_layer):
        freeze_last_layer(run.bare_student)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    update_teacher(run.bare_student, run.teacher, now.momentum_teacher)
    run.dino_loss.update_center(distributed.all_reduce_mean(teacher_mean))
    if device.type == "cpu":  # stands in for SyncBatchNorm's shared running statistics
        distributed.all_reduce_buffers([run.bare_student, run.teacher])
    run.meters.add(*means, grad_norm)


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


def _loop(run: Run, log: "Log", out: Path, first_step: int) -> dict:
    config, per_epoch, total = run.config, len(run.loader), run.total_steps
    saver = Saver(run, out)
    log.say(_summary(run))
    run.bare_student.train()
    run.teacher.train()
    row: dict = {}
    for step in range(first_step, total):
        epoch, step_in_epoch = divmod(step, per_epoch)
        if step == first_step or step_in_epoch == 0:
            run.loader.set_epoch(epoch, step_in_epoch)
            batches = iter(run.loader)
        train_step(run, batches, step)
        log.progress.advance()
        done = step + 1
        epoch_ends = done % per_epoch == 0
        probes = run.probe and epoch_ends and (epoch + 1) % config.probe.every == 0
        if done % config.run.log_every == 0 or done == total or probes:
            row = log.row(step)
            if probes:
                row |= run.probe(run.teacher.backbone)
            log.write(row)
            log.clock.restart(done)
        if run.ranks.rank == 0 and saver.due(done):
            log.say(saver.save(done))
            log.clock.skip(saver.seconds)
    distributed.barrier()
    return row


class Saver:
    """When to save, and saving."""

    def __init__(self, run: Run, out: Path) -> None:
        self.run, self.folder = run, out / "checkpoints"
        self.last, self.seconds = time.monotonic(), 0.0

    def due(self, done: int) -> bool:
        """Whether to save after `done` steps: every `save_every` minutes, at the end, for good
        every `saveckp_freq` epochs, and at epoch ends unless that would cost over 5 % of the time.
        """
        passed = time.monotonic() - self.last
        epoch_ends = done % len(self.run.loader) == 0
        return (
            done == self.run.total_steps
            or self.keeps(done)
            or passed > 60 * self.run.config.run.save_every
            or (epoch_ends and passed > 20 * self.seconds)
        )

    def keeps(self, done: int) -> bool:
        """Whether the checkpoint after `done` steps is kept for good."""
        epochs, rest = divmod(done, len(self.run.loader))
        frequency = self.run.config.run.saveckp_freq
        return rest == 0 and frequency > 0 and epochs % frequency == 0

    def save(self, done: int) -> str:
        """Save, and say what it cost. Raises UserError rather than publish non-finite weights."""
        run = self.run
        if not (run.dino_loss.center.isfinite().all() and run.meters.sums.isfinite().all()):
            raise UserError(
                f"the loss is no longer finite by step {done}; the last good checkpoint is kept "
                f"in {self.folder}: try a lower --lr, a longer --warmup_epochs or "
                "--precision fp32, in a new --out"
            )
        saved = save(run, self.folder, done, self.keeps(done))
        self.last, self.seconds = time.monotonic(), saved.seconds
        return f"saved {saved.path} ({saved.megabytes:.0f} MB in {saved.seconds:.1f} s)"


class Log:
    """The records of a run: metrics.jsonl and the line of progress, on rank 0."""

    def __init__(self, run: Run, out: Path, first_step: int) -> None:
        self.run, self.chief = run, run.ranks.rank == 0
        if self.chief:
            self.metrics = MetricsWriter(out / "metrics.jsonl", first_step)
        self.progress = Progress(
            run.config.optim.epochs, len(run.loader), first_step, quiet=not self.chief
        )
        self.clock = IntervalClock(run, first_step)

    def row(self, step: int) -> dict:
        """The record of `step`: the one place where the host waits for the device."""
        run = self.run
        means = distributed.all_reduce_mean(run.meters.means()).tolist()
        run.meters.reset()
        speed, wait = self.clock.read(step + 1)
        scheduled = hyperparameters(run, step)._asdict().items()
        return {
            "step": step,
            "epoch": step // len(run.loader),
            **dict(zip(METERS, means, strict=True)),
            **{f"schedule/{name}": value for name, value in scheduled},
            "schedule/student_temp": run.config.loss.student_temp,
            "speed/images_per_sec": round(speed, 2),
            "speed/data_wait": round(wait, 4),
            "memory/peak_gib": round(_peak_memory(run.ranks.device), 3),
        }

    def write(self, row: dict) -> None:
        """Store and print a row."""
        if self.chief:
            self.metrics.write(row)
            self.progress.log(row)

    def say(self, text: str) -> None:
        """Print a line."""
        self.progress.say(text)

    def close(self) -> None:
        """Close what is open."""
        self.progress.close()
        if self.chief:
            self.metrics.close()


class IntervalClock:
    """Images per second and the share of time spent waiting for data, since the last record."""

    def __init__(self, run: Run, done: int) -> None:
        self.run = run
        self.restart(done)

    def restart(self, done: int) -> None:
        """A new interval, after `done` steps."""
        self.done, self.start = done, time.monotonic()
        self.waited = self.run.loader.wait_seconds

    def skip(self, seconds: float) -> None:
        """Time that was not the training's: a save."""
        self.start += seconds

    def read(self, done: int) -> tuple[float, float]:
        """(images per second over all ranks, data-wait share) up to `done` steps."""
        seconds = time.monotonic() - self.start
        images = (done - self.done) * self.run.global_batch
        return images / seconds, (self.run.loader.wait_seconds - self.waited) / seconds


def _summary(run: Run) -> str:
    """What is about to happen, in one line."""
    config = run.config
    size = sum(p.numel() for p in run.bare_student.backbone.parameters()) / 1e6
    return (
        f"{config.arch} ({size:.1f} M parameters) on {run.ranks.device} x {run.ranks.world_size}, "
        f"{config.run.precision}: {config.optim.epochs} epochs of {len(run.loader)} steps, "
        f"{run.global_batch} images a step"
    )


def _stop_if_not_finite(run: Run, step: int, out: Path) -> None:
    """Never publish weights that a bad step has reached."""
    if not torch.isfinite(run.dino_loss.center).all() or not torch.isfinite(run.meters.sums).all():
        raise UserError(
            f"the loss is no longer finite by step {step}; the last good checkpoint is kept in "
            f"{out / 'checkpoints'}: try a lower --lr, a longer --warmup_epochs or "
            "--precision fp32, in a new --out"
        )


def _to_device(crop: Tensor, config: TrainConfig, device: torch.device) -> Tensor:
    """(v, n, c, s, s) on the device, normalised there if the loader sent bytes."""
    if crop.dtype != torch.uint8:
        return crop
    return normalise(crop.to(device, non_blocking=True), config.crops.mean, config.crops.std)


def _reduce_gradients_at_end(student: nn.Module, last: bool) -> AbstractContextManager:
    """Gradients cross the network once per step, with the last micro-batch's backward."""
    if isinstance(student, DistributedDataParallel) and not last:
        return student.no_sync()
    return contextlib.nullcontext()


def _peak_memory(device: torch.device) -> float:
    """GiB: of the GPU's allocator, or of this process's resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class out_of_memory_advice(AbstractContextManager):  # noqa: N801 - reads as a statement
    """Turns running out of memory into one line that names the options to change."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def __exit__(self, kind, error, traceback) -> None:
        exhausted = isinstance(error, MemoryError | torch.OutOfMemoryError) or (
            isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
        )
        if exhausted:
            optim = self.config.optim
            raise UserError(
                f"out of memory at --batch_size_per_gpu {optim.batch_size_per_gpu} with "
                f"--accumulation_steps {optim.accumulation_steps}, --local_crops_number "
                f"{self.config.crops.local_crops_number}, --precision {self.config.run.precision}: "
                "halve the batch and double the accumulation for the same result, or lower the "
                "others"
            ) from error
