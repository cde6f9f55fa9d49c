"""Save and resume a training run: the contents of a checkpoint, and when one is due."""

import time
from pathlib import Path

import torch

from ssl_xcit.checkpoints import folder as checkpoint
from ssl_xcit.checkpoints.folder import StateDict
from ssl_xcit.runtime import distributed
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.training.run_folder import versions
from ssl_xcit.training.task import Task


class Saver:
    """Decides when to save, and saves."""

    def __init__(self, task: Task, out: Path) -> None:
        self.task, self.folder = task, out / "checkpoints"
        self.last, self.seconds = time.monotonic(), 0.0

    def due(self, done: int) -> bool:
        """Whether to save after `done` steps.

        True every `save_every` minutes, at the end, every `saveckp_freq` epochs (kept forever), and
        at epoch ends unless that would take over 5 % of the time.
        """
        passed = time.monotonic() - self.last
        epoch_ends = done % self.task.steps_per_epoch == 0
        return (
            done == self.task.total_steps
            or self.keeps(done)
            or passed > 60 * self.task.config.run.save_every
            or (epoch_ends and passed > 20 * self.seconds)
        )

    def keeps(self, done: int) -> bool:
        """Whether the checkpoint after `done` steps is kept forever."""
        epochs, rest = divmod(done, self.task.steps_per_epoch)
        frequency = self.task.config.run.saveckp_freq
        return rest == 0 and frequency > 0 and epochs % frequency == 0

    def save(self, done: int) -> str:
        """Save; return a line with path, size and duration."""
        saved = save(self.task, self.folder, done, self.keeps(done))
        self.last, self.seconds = time.monotonic(), saved.seconds
        return f"saved {saved.path} ({saved.megabytes:.0f} MB in {saved.seconds:.1f} s)"


def resume(task: Task, folder: Path) -> int:
    """Load the newest complete checkpoint into `task`; return its number of finished steps.

    Prints which newer ones were skipped and why. Raises UserError if all of them are damaged.
    """
    found, step = None, -1
    if task.ranks.rank == 0:
        found, skipped = checkpoint.load_latest(folder)
        for line in skipped:
            print(f"skipped: {line}")
        if skipped and found is None:
            raise UserError(
                f"none of the {len(skipped)} checkpoints in {folder} is complete (see above): "
                "remove them to start again, or choose another --out"
            )
        step = -1 if found is None else found.state["step"]
    step = distributed.maximum(step)  # rank 0 decides: others may see an older folder
    if step < 0:
        return 0
    found = found or checkpoint.load_checkpoint(checkpoint.step_folder(folder, step))
    restore(task, found.tensors)
    if task.ranks.rank == 0:
        print(f"resuming {found.path} at step {step}")
    return step


def restore(task: Task, tensors: dict[str, StateDict]) -> None:
    """Load a checkpoint's tensors into `task`."""
    task.load(tensors)
    for name, tensor in task.counters().items():
        stored = tensors["meters"].get(name)
        if stored is not None and stored.shape == tensor.shape:  # else written by an older version
            tensor.copy_(stored)
    if task.scaler.is_enabled() and "scaler" in tensors["meters"]:
        scale, growth = tensors["meters"]["scaler"].tolist()
        state = task.scaler.state_dict()
        task.scaler.load_state_dict(state | {"scale": scale, "_growth_tracker": int(growth)})
    names, moments = _parameter_names(task), {}
    for key, value in tensors["optimizer"].items():
        name, moment = key.rsplit("/", 1)
        moments.setdefault(names.index(name), {})[moment] = value
    groups = task.optimizer.state_dict()["param_groups"]
    task.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def capture(task: Task, folder: Path, step: int) -> None:
    """Save the state before the bad step `step`, and the indices of the images it used.

    All ranks must call it; `ssl_xcit.report.replay` reads the result.
    """
    epoch, step_in_epoch = divmod(step, task.steps_per_epoch)
    task.loader.set_epoch(epoch, step_in_epoch)
    images = distributed.gather_variable(torch.from_numpy(task.loader.step_images()))
    if task.ranks.rank == 0:
        save(task, folder, step, keep=True, images=images.tolist())
    distributed.barrier()


def save(task: Task, folder: Path, step: int, keep: bool, **facts: object) -> checkpoint.Saved:
    """Save the state after `step` finished steps; `facts` are added to state.json.

    Raises UserError if any tensor is not finite.
    """
    names = _parameter_names(task)
    optimizer = {
        f"{names[number]}/{moment}": tensor
        for number, moments in task.optimizer.state_dict()["state"].items()
        for moment, tensor in moments.items()
    }
    tensors = {**task.tensors(), "meters": task.counters(), "optimizer": optimizer}
    finite = [tensor.isfinite().all() for group in tensors.values() for tensor in group.values()]
    if not torch.stack([flag.to(task.ranks.device) for flag in finite]).all():
        raise UserError(
            f"the loss is no longer finite by step {step}; the last good checkpoint is kept "
            f"in {folder}: try a lower --lr, a longer --warmup_epochs or "
            "--precision fp32, in a new --out"
        )
    state = {**task.facts(), **facts, "epoch": step // task.steps_per_epoch, "versions": versions()}
    keep_last = task.config.run.keep_last
    return checkpoint.save_checkpoint(folder, step, tensors, state, keep_last=keep_last, keep=keep)


def _parameter_names(task: Task) -> list[str]:
    """The parameters in the order in which the optimiser numbers them."""
    return [name for group in task.optimizer.param_groups for name in group["param_names"]]
