"""Several ranks compute the same step as one process on the same global batch.

The step of one process is the oracle. All steps with the same number of ranks share one launch.
"""

import functools
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import forked
import pytest
import torch
from dump_ranks import digest
from shallow import PROGRAM, TINY
from torch import Tensor

from ssl_xcit.checkpoints import folder as checkpoint

TESTS = Path(__file__).parent
SETTINGS = {
    "arch": "xcit_nano_12_p16",
    **TINY,
    "drop_path_rate": 0.3,
    "use_bn_in_head": "true",
    "clip_grad": 0.3,
    "warmup_epochs": 0,
    "freeze_last_layer": 0,
    "epochs": 1,
    "precision": "fp32",
    "device": "cpu",
    "num_workers": 1,
    "log_every": 1,
}


class Step(NamedTuple):
    """A step with a global batch of 8."""

    ranks: int
    batch: int  # images of a micro-batch
    accumulation: int
    sync_bn: bool
    dtype: str = "float64"
    in_turn: bool | None = None  # crops_in_turn, which excludes BatchNorm in the head

    def flags(self, photos: Path, folder: Path) -> list[str]:
        settings = SETTINGS | {"data": photos, "out": folder / "run", "sync_bn": self.sync_bn}
        settings |= {"batch_size_per_gpu": self.batch, "accumulation_steps": self.accumulation}
        if self.in_turn is not None:
            settings |= {"crops_in_turn": self.in_turn, "use_bn_in_head": False}
        return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


DEPTHS = [2, pytest.param(12, marks=pytest.mark.long)]  # blocks of the network
DTYPES = ("float64", "float32")
CASES = {
    # batch statistics over all ranks: one process with the whole batch
    "synchronised": [(1, 8, 1, True), (2, 4, 1, True), (4, 2, 1, True)],
    # batch statistics of each micro-batch: ranks and accumulation are one and the same
    "micro-batches": [(1, 2, 4, False), (2, 2, 2, False), (4, 2, 1, False)],
}
AT_ONCE, IN_TURN = (Step(2, 2, 2, True, in_turn=in_turn) for in_turn in (False, True))
UNSYNCHRONISED = Step(2, 4, 1, False)
STEPS = [
    *(Step(*way, dtype) for ways in CASES.values() for way in ways for dtype in DTYPES),
    *(AT_ONCE, IN_TURN, UNSYNCHRONISED),
]

RANK = """
import json, sys, torch
torch.set_num_threads(1)
from dump_ranks import digest
from shallow import networks
from ssl_xcit.runtime import distributed
from ssl_xcit.training import engine
from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.runtime.config import load_config
from ssl_xcit.training.guard import BatchStatistics
from ssl_xcit.training.task import Task
from ssl_xcit.dino.train import Pretraining

on_device = Task.on_device
Task.on_device = lambda *arguments: on_device(*arguments).to(torch.get_default_dtype())

class Observed(Pretraining):
    def loss(self, batch, step, micro, now):
        found_loss = super().loss(batch, step, micro, now)
        share = found_loss.loss.detach() / self.config.optim.accumulation_steps
        found["loss"] = found.get("loss", 0) + share  # the log's means are float32
        return found_loss

    def before_update(self, step):
        super().before_update(step)
        for name, p in self.bare_model.named_parameters():
            if p.grad is not None:
                found[f"grad/{name}"] = p.grad.clone()

ranks = distributed.setup("cpu")
for folder, dtype, flags in json.loads(sys.argv[1]):
    torch.set_default_dtype(getattr(torch, dtype))
    found = {}
    with networks(int(sys.argv[2])):
        task = Observed(load_config(TrainConfig, argv=flags), ranks)
    task.loader.set_epoch(0, 0)
    engine.train_step(task, iter(task.loader), 0, BatchStatistics(task.modules()))
    task.loader.close()
    found["loss"] = distributed.all_reduce_mean(found["loss"])
    found["center"] = task.dino_loss.center
    for role, module in zip(("student", "teacher"), task.modules()):
        for name, p in module.named_parameters():
            found[f"{role}/{name}"] = p.detach()
        for name, b in module.named_buffers():
            found[f"buffer/{role}/{name}"] = b
    if ranks.rank:
        found = {name: digest(tensor) for name, tensor in found.items()}
    torch.save(found, f"{folder}/{ranks.rank}.pt")
distributed.teardown()
"""


@pytest.fixture(scope="module")
def held(photos, tmp_path_factory) -> Iterator[Callable[[Step, int], list[dict]]]:
    """A function (step, number of blocks) -> what each rank holds after the step: rank 0 the
    tensors, the others their digests."""
    base = tmp_path_factory.mktemp("steps")

    @functools.cache
    def start(ranks: int, depth: int) -> dict[Step, Path]:
        """Run all steps with this number of ranks; return the folders with their results."""
        folders = {
            step: base / f"{depth}-{number}"
            for number, step in enumerate(STEPS)
            if step.ranks == ranks
        }
        steps = []
        for step, folder in folders.items():
            folder.mkdir()
            steps.append((str(folder), step.dtype, step.flags(photos, folder)))
        arguments = [sys.executable, "-c", RANK, json.dumps(steps), str(depth)]
        forked.run_ranks(ranks, arguments, cwd=TESTS)
        return folders

    def held(step: Step, depth: int) -> list[dict]:
        folder = start(step.ranks, depth)[step]
        return [torch.load(folder / f"{rank}.pt") for rank in range(step.ranks)]

    yield held
    shutil.rmtree(base)  # pytest would keep up to a gigabyte until the session ends


def agreed(ranks: list[dict]) -> dict[str, Tensor]:
    """Check that all ranks hold the same bits, and return them."""
    tensors, *others = ranks
    digests = {name: digest(tensor) for name, tensor in tensors.items()}
    for found in others:
        assert found == digests, [name for name in digests if found.get(name) != digests[name]]
    return tensors


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_ranks_and_accumulation_change_no_gradient_centre_or_average(held, case, dtype, depth):
    tolerance = {"float64": 1e-10, "float32": 1e-5}[dtype]
    ((alone,), *others) = [held(Step(*way, dtype), depth) for way in CASES[case]]
    learnt, weights = (
        {name.removeprefix(prefix) for name in alone if name.startswith(prefix)}
        for prefix in ("grad/", "student/")
    )
    assert weights - learnt == {"head.last_layer.weight_g"}
    assert len(weights) > 200 * depth / 12
    assert alone["grad/backbone.patch_embed.proj.0.0.weight"].abs().max() > 1e-3
    for ranks in others:
        found = agreed(ranks)
        for name, tensor in alone.items():
            if name.startswith("buffer/") and case == "micro-batches":
                continue  # one process updates them once per micro-batch, ranks once per step
            if name.startswith("student/") and dtype == "float32":
                continue  # Adam's first step has full length, whatever the gradient's norm
            torch.testing.assert_close(
                found[name], tensor, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("depth", DEPTHS)
def test_crops_in_turn_changes_no_gradient_centre_or_average_of_several_ranks(held, depth):
    """Nor the running statistics: the global crops update them first in either case."""
    before, after = (agreed(held(step, depth)) for step in (AT_ONCE, IN_TURN))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(
            after[name], tensor, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_different_way_to_batch_is_detected(held, depth):
    """The oracle can fail: without synchronised statistics two ranks differ from one process."""
    (alone,), (found, _) = held(Step(1, 8, 1, True), depth), held(UNSYNCHRONISED, depth)
    name = "grad/backbone.patch_embed.proj.0.0.weight"
    assert (found[name] - alone[name]).abs().max() > 1e-5
    assert (found["center"] - alone["center"]).abs().max() > 1e-6


def test_a_run_of_four_ranks_continues_on_two_with_the_images_in_the_same_order(photos, tmp_path):
    run, images = tmp_path / "run", {}
    for name, world, out in (("whole", 1, tmp_path / "whole"), ("four", 4, run), ("two", 2, run)):
        settings = SETTINGS | {"data": photos, "out": out, "epochs": 2, "save_every": 1000}
        settings |= {"sync_bn": False, "local_crops_number": 0}  # do not affect the images
        settings |= {"batch_size_per_gpu": 2, "accumulation_steps": 4 // world}
        flags = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
        forked.run_ranks(
            world, [sys.executable, PROGRAM, "1", str(TESTS / "dump_ranks.py"), *flags]
        )
        if name == "four":  # back to the end of the first epoch
            for path in (out / "checkpoints").glob("step_*"):
                if checkpoint.load_checkpoint(path).state["step"] != 6:
                    shutil.rmtree(path)
        rows = [
            [int(word) for word in line.split()]
            for rank in range(world)
            for line in (out / f"images_{rank}").read_text().splitlines()
        ]
        images[name] = {tuple(row[:2]): row[2:] for row in rows}
        assert len(images[name]) == len(rows)
        for rank in range(world):
            (out / f"images_{rank}").unlink()
    assert len(images["whole"]) == 12 * 4
    assert images["four"] == images["whole"]
    assert images["two"] == {key: row for key, row in images["whole"].items() if key[0] >= 6}
