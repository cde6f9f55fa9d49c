"""The training engine: claims the run folder, resumes, trains, logs, evaluates and saves.

A `Task` defines what is trained and how: pretraining (dino/train.py) or fine-tuning
(finetune/train.py). The state of a run is its tensors and the number of finished steps. Data order
and all random numbers are pure functions of (seed, epoch, sample index, view), so nothing else
needs saving, and a killed run continues as if uninterrupted.

Ranks must agree on whether to stop and on whether a step is bad. Two flags travel with a reduction
that the step does anyway, and the host reads the result one step later, so nothing waits for it.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from ssl_xcit.runtime import distributed
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.runtime.signals import Stopped, StopSignals
from ssl_xcit.runtime.watch import Watch
from ssl_xcit.training.config import TaskConfig
from ssl_xcit.training.guard import BatchStatistics, HostCopy
from ssl_xcit.training.log import Log
from ssl_xcit.training.metrics import read_metrics
from ssl_xcit.training.optim import clip_gradients, set_hyperparameters
from ssl_xcit.training.run_folder import claim_folder
from ssl_xcit.training.saving import Saver, capture, resume
from ssl_xcit.training.task import Task, keep_gradients


def run_task(task: Task) -> dict:
    """Train `task` to the end in its run folder and return the last logged row.

    Raises UserError if the folder is not writable or belongs to another configuration, if a
    checkpoint cannot be stored, or if the loss is no longer finite. Raises `Stopped`, an exit with
    status 75, after a signal: the state is saved, and the same call continues.
    """
    out, ranks, settings = Path(task.config.out), task.ranks, task.config.run
    with StopSignals() as stop, Watch(ranks, settings.stall_timeout) as watch:
        if ranks.rank == 0:
            claim_folder(out, task.kind, task.config, task.global_batch)
        distributed.barrier()
        first_step = resume(task, out / "checkpoints")
        with contextlib.closing(task.loader), contextlib.closing(Log(task, out, first_step)) as log:
            engine = Engine(task, log, Saver(task, out), stop, watch)
            return engine.run(first_step)


class Engine:
    """The training loop of a task."""

    def __init__(self, task: Task, log: Log, saver: Saver, stop: StopSignals, watch: Watch) -> None:
        self.task, self.log, self.saver, self.stop, self.watch = task, log, saver, stop, watch
        self.statistics = BatchStatistics(task.modules())
        self.flags = HostCopy(2, task.ranks.device)  # stop flag, consecutive bad steps
        self.started, self.evaluating = time.monotonic(), 0.0  # seconds

    def run(self, first_step: int) -> dict:
        """Train from `first_step` to the end; return the last logged row."""
        task, log = self.task, self.log
        per_epoch, total = task.steps_per_epoch, task.total_steps
        row = self._finish_record(first_step)
        if first_step >= total:
            log.say(f"{task.config.out} is finished: {total} steps")
            log.conclude()
            return row
        for line in [] if first_step else task.initialise():
            log.say(line)
        log.say(task.summary())
        log.say("precision {}: {}".format(*task.precision))
        for line in task.warm_up():
            log.say(line)
        for step in range(first_step, total):
            epoch, step_in_epoch = divmod(step, per_epoch)
            self.watch.at(2 * step, f"step {step}")
            if step == first_step or step_in_epoch == 0:
                task.loader.set_epoch(epoch, step_in_epoch)
                batches = iter(task.loader)
            stop, bad_steps = self.flags.exchange(
                train_step(task, batches, step, self.statistics, bool(self.stop.received))
            )
            self.stop.eager = False
            log.progress.advance()
            done = step + 1
            if bad_steps >= task.config.run.max_bad_steps:
                self._give_up(done, int(bad_steps))
            if task.recorded(step) and not (stop and task.evaluated(step)):
                row = self._record(step)
            if stop:
                self._leave(done)
            if task.ranks.rank == 0 and self.saver.due(done):
                self._save(done)
        distributed.barrier()
        log.conclude()
        return row

    def _record(self, step: int) -> dict:
        """Evaluate if due, then write and return the row of `step`."""
        task, log = self.task, self.log
        found: dict[str, float] = {}
        if task.evaluated(step):
            self.watch.at(2 * step + 1, f"the evaluation after step {step}")
            start = time.monotonic()
            try:
                found = task.evaluate(self._check)
            except Stopped:
                self._leave(step + 1)
            seconds = time.monotonic() - start
            log.skip(seconds)
            self.evaluating += seconds
            share = self.evaluating / (time.monotonic() - self.started)
            found |= {"speed/evaluation_share": round(share, 4)}
        row = log.row(step) | found
        log.write(row)
        log.restart(step + 1)
        return row

    def _check(self) -> None:
        """Raise `Stopped` on all ranks if one got a signal; called between evaluation batches."""
        if distributed.any_rank(bool(self.stop.received)):
            raise Stopped(self.stop.received)

    def _finish_record(self, first_step: int) -> dict:
        """Write the last row if a signal interrupted its evaluation; return the last row."""
        if first_step == 0:
            return {}
        path = Path(self.task.config.out) / "metrics.jsonl"
        last = [{"step": -1}, *(read_metrics(path) if path.exists() else [])][-1]
        # Rank 0 decides: the others may see an older version of the file.
        missing = self.task.recorded(first_step - 1) and last["step"] < first_step - 1
        if distributed.any_rank(missing and self.task.ranks.rank == 0):
            self.stop.eager = False
            return self._record(first_step - 1)
        return last

    def _leave(self, done: int) -> None:
        """Save, then raise `Stopped`; all ranks get here after the same step."""
        name = self.stop.received or "a signal to another rank"
        if self.task.ranks.rank == 0:
            self._save(done)
            self.log.say(
                f"stopped by {name} after {done} of {self.task.total_steps} steps; run the same "
                "command to continue"
            )
        distributed.barrier()
        raise Stopped(name)

    def _save(self, done: int) -> None:
        self.watch.doing(f"the save after {done} steps")
        self.log.say(self.saver.save(done))
        self.log.skip(self.saver.seconds)

    def _give_up(self, done: int, bad_steps: int) -> None:
        """Stop after too many bad steps in a row; all ranks get here after the same step."""
        out = self.task.config.out
        first = done - 1 - bad_steps  # the host reads the flags one step late
        capture(self.task, Path(out) / "bad_step", first)
        raise UserError(
            f"loss or gradients were not finite in {bad_steps} steps in a row, from step {first} "
            "on; these steps were skipped and the checkpoints are good. To see what happened: "
            f"ssl-xcit replay {out}. Try a lower --lr, a longer --warmup_epochs or "
            "--precision fp32, in a new --out"
        )


def train_step(
    task: Task, batches: Iterator, step: int, statistics: BatchStatistics, stop: bool = False
) -> Float[Tensor, "2"]:
    """Run one optimiser step over `accumulation_steps` micro-batches.

    A non-finite loss or gradient on any rank makes the step a bad one, which changes nothing.
    Returns, on the device, whether any rank wants to `stop` and the number of consecutive bad
    steps. Steps whose gradients overflow only because of the float16 loss scale do not count: the
    scaler lowers the scale until they fit.
    """
    accumulation = task.config.optim.accumulation_steps
    now = task.hyperparameters(step)
    set_hyperparameters(task.optimizer, now["lr"], now["weight_decay"])
    statistics.remember()
    losses, means = torch.zeros((), device=task.ranks.device), None
    for micro in range(accumulation):
        last = micro == accumulation - 1
        with contextlib.nullcontext() if last else keep_gradients(task.model):
            loss, found = task.loss(next(batches), step, micro, now)
            losses += loss.detach() / accumulation
            if found is not None:
                means = found / accumulation + (0 if means is None else means)
            if last:  # overlaps with the backward pass
                shared = SharedMeans(losses, means, stop, task.ranks.world_size)
            task.scaler.scale(loss / accumulation).backward()
    means, any_bad, any_stop = shared.wait()
    optim = task.config.optim
    parameters = list(task.bare_model.parameters())
    task.scaler.unscale_(task.optimizer)
    grad_norm = clip_gradients(parameters, optim.clip_grad, optim.clip_mode)
    # After too many bad steps nothing is updated any more until the host notices.
    too_many = task.meters.skipped[0] >= task.config.run.max_bad_steps
    bad = any_bad | ~grad_norm.isfinite() | too_many
    task.before_update(step)
    task.optimizer.found_inf = bad.float()
    task.optimizer.step()
    task.optimizer.zero_grad(set_to_none=True)
    task.after_update(now, means, bad)
    statistics.restore(bad)
    excused = torch.zeros_like(bad)
    if task.scaler.is_enabled():
        excused = bad & ~any_bad & (task.scaler.scale(grad_norm.new_ones(())) > 1)
    task.scaler.update()
    task.meters.add(losses, grad_norm, skip=bad, excused=excused)
    return torch.stack([any_stop.float(), task.meters.skipped[0]])


class SharedMeans:
    """A step's only reduction besides the gradients': the task's means and two flags."""

    def __init__(
        self,
        loss: Float[Tensor, ""],
        means: Float[Tensor, " m"] | None,
        stop: bool,
        world_size: int,
    ) -> None:
        self.world_size = world_size
        means = loss.new_zeros(0) if means is None else means
        flags = torch.stack([(~loss.isfinite()).to(loss.dtype), torch.full_like(loss, stop)])
        self.vector = torch.cat([means, flags.to(means.dtype)])
        self.work = dist.all_reduce(self.vector, async_op=True) if world_size > 1 else None

    def wait(self) -> tuple[Float[Tensor, " m"], Bool[Tensor, ""], Bool[Tensor, ""]]:
        """Return (means over ranks, whether any loss was not finite, whether to stop)."""
        if self.work is not None:
            self.work.wait()
        bad, stop = self.vector[-2:]
        return self.vector[:-2] / self.world_size, bad > 0, stop > 0


@contextlib.contextmanager
def out_of_memory_advice(
    config: TaskConfig, *others: str, savers: Iterable[str] = ()
) -> Iterator[None]:
    """Turn an out-of-memory error into one line of advice.

    `others`: options that cost memory besides the batch size, as "--name value". `savers`: options
    that save memory, besides activation checkpointing.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        exhausted = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not exhausted and "can't allocate memory" not in str(error):
            raise
        optim, run = config.optim, config.run
        checkpointing = [] if run.activation_checkpointing else ["--activation_checkpointing true"]
        savers = [*savers, *checkpointing]
        save = f", use {' or '.join(savers)}" if savers else ""
        raise UserError(
            f"out of memory at --batch_size_per_gpu {optim.batch_size_per_gpu} with "
            f"--accumulation_steps {optim.accumulation_steps}, "
            f"{', '.join(others)}, --precision {run.precision}: "
            f"halve the batch and double the accumulation for the same result{save}, or lower "
            "the others"
        ) from error
