"""See a bad step again: `ssl-xcit replay RUN` after a run has given up.

A run gives up when loss or gradients were not finite several steps in a row, and leaves its state
before the first of them in `bad_step/`. This computes that step once more, micro-batch by
micro-batch in one process, and says what was not finite and which images were looked at. (With
`sync_bn` on several ranks, BatchNorm normalised by all of their batches; here by each micro-batch.)
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from torch import nn

from ssl_xcit.checkpoints import folder as checkpoint
from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.dino.train import Pretraining
from ssl_xcit.finetune.config import FinetuneConfig
from ssl_xcit.finetune.train import Finetuning
from ssl_xcit.runtime import distributed
from ssl_xcit.runtime.config import read_config
from ssl_xcit.runtime.errors import UserError, exit_on_user_error
from ssl_xcit.training.saving import restore
from ssl_xcit.training.task import Task

KINDS = {"pretraining": (TrainConfig, Pretraining), "fine-tuning": (FinetuneConfig, Finetuning)}


def replay(run: Path) -> list[dict]:
    """What each micro-batch of the captured step gives: loss, images, what is not finite.

    Raises UserError if the run has left no bad step.
    """
    found, skipped = checkpoint.load_latest(run / "bad_step")
    if found is None:
        why = "; ".join(skipped) or "it has not given up"
        raise UserError(f"{run} holds no bad step: {why}")
    task = _open(run)
    restore(task, found.tensors)
    step, images = found.state["step"], found.state["images"]
    epoch, step_in_epoch = divmod(step, task.steps_per_epoch)
    task.loader.set_epoch(epoch, step_in_epoch)
    results = []
    with closing(task.loader):
        batches = iter(task.loader)
        for micro in range(task.config.optim.accumulation_steps):
            with _first_not_finite(task.bare_model) as modules:
                loss = task.loss(next(batches), step, micro, task.hyperparameters(step)).loss
            task.scaler.scale(loss).backward()
            gradients = [
                name
                for name, p in task.bare_model.named_parameters()
                if p.grad is not None and not p.grad.isfinite().all()
            ]
            task.optimizer.zero_grad(set_to_none=True)
            results.append(
                {
                    "step": step,
                    "micro_batch": micro,
                    "images": images[micro],
                    "loss": loss.item(),
                    "module": next(iter(modules), None),
                    "gradients": gradients,
                }
            )
    return results


def _open(run: Path) -> Task:
    """The run's task for this one process, with as many micro-batches as all ranks had."""
    facts = json.loads((run / "run.json").read_text())
    config_class, task_class = KINDS[facts.get("kind", "pretraining")]
    config = read_config(config_class, run / "config.yaml")
    micro_batches = facts["global_batch"] // config.optim.batch_size_per_gpu
    optim = dataclasses.replace(config.optim, accumulation_steps=micro_batches)
    return task_class(
        dataclasses.replace(config, optim=optim), distributed.setup(config.run.device)
    )


@contextmanager
def _first_not_finite(model: nn.Module) -> Iterator[list[str]]:
    """Names of modules whose output is not finite, in the order in which they were called."""
    names: list[str] = []

    def note(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            if any(torch.is_tensor(o) and not o.isfinite().all() for o in outputs):
                names.append(name)

        return hook

    handles = [
        module.register_forward_hook(note(name)) for name, module in model.named_modules() if name
    ]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


def main(argv: list[str] | None = None) -> None:
    """Print what was not finite."""
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


if __name__ == "__main__":
    main()
