"""Repeat a bad step: `ssl-xcit replay RUN`, after a run has given up.

A run gives up when loss or gradients are not finite in several steps in a row; it then leaves its
state before the first of them in `bad_step/`. This repeats that step in one process, one
micro-batch at a time, and names what is not finite and the images. (With `sync_bn` on several
ranks, BatchNorm normalised over the batches of all of them; here over each micro-batch.)
"""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from ssl_xcit.checkpoints import folder as checkpoint
from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.dino.train import Pretraining
from ssl_xcit.finetune.train import Finetuning
from ssl_xcit.report.runs import read_facts, read_run
from ssl_xcit.runtime import distributed
from ssl_xcit.runtime.errors import UserError, exit_on_user_error
from ssl_xcit.training.saving import restore


def replay(run: Path) -> Iterator[dict]:
    """For each micro-batch of the captured step: loss, images, what is not finite.

    Raises UserError if the run has left no bad step.
    """
    found, skipped = checkpoint.load_latest(run / "bad_step")
    if found is None:
        why = "; ".join(skipped) or "it has not given up"
        raise UserError(f"{run} holds no bad step: {why}")
    config = read_run(run)
    # In this one process as many micro-batches as all ranks had
    global_batch = read_facts(run)["global_batch"]
    micro_batches = global_batch // config.optim.batch_size_per_gpu
    optim = dataclasses.replace(config.optim, accumulation_steps=micro_batches)
    method = Pretraining if isinstance(config, TrainConfig) else Finetuning
    ranks = distributed.setup(config.run.device)
    task = method(dataclasses.replace(config, optim=optim), ranks)
    restore(task, found.tensors)
    step, images = found.state["step"], found.state["images"]
    epoch, step_in_epoch = divmod(step, task.steps_per_epoch)
    task.loader.set_epoch(epoch, step_in_epoch)
    with closing(task.loader):
        batches = iter(task.loader)
        for micro in range(micro_batches):
            with _not_finite(task.bare_model) as modules:
                loss = task.loss(next(batches), step, micro, task.hyperparameters(step)).loss
            task.scaler.scale(loss).backward()
            gradients = [
                name
                for name, p in task.bare_model.named_parameters()
                if p.grad is not None and not p.grad.isfinite().all()
            ]
            task.optimizer.zero_grad(set_to_none=True)
            yield {
                "step": step,
                "micro_batch": micro,
                "images": images[micro],
                "loss": loss.item(),
                "module": next(iter(modules), None),
                "gradients": gradients,
            }


@contextmanager
def _not_finite(model: nn.Module) -> Iterator[list[str]]:
    """Names of the modules whose output is not finite, in the order of the calls."""
    names = {module: name for name, module in model.named_modules()}
    found: list[str] = []

    def note(module: nn.Module, inputs: tuple, output: object) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        finite = all(o.isfinite().all() for o in outputs if torch.is_tensor(o))
        if not finite and names.get(module):
            found.append(names[module])

    handle = register_module_forward_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def main(argv: Sequence[str] | None = None) -> None:
    """The command `ssl-xcit replay`."""
    parser = argparse.ArgumentParser(prog="ssl-xcit replay", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    arguments = parser.parse_args(argv)
    with exit_on_user_error():
        for result in replay(arguments.run):
            gradients = result["gradients"]
            print(
                f"step {result['step']}, micro-batch {result['micro_batch']}: loss "
                f"{result['loss']:g}; first output that is not finite: "
                f"{result['module'] or 'none'}; gradients that are not: {len(gradients)}"
                + (f" (first {gradients[0]})" if gradients else "")
                + f"; images {', '.join(map(str, result['images']))}"
            )
