"""What several ranks compute in a step is what one process computes on the same global batch.

Each case runs in processes of its own; the case "one process" is the oracle of the others.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssl_xcit import checkpoint

TESTS = Path(__file__).parent
SETTINGS = {
    "arch": "xcit_nano_12_p16",
    "global_crops_size": 32,
    "local_crops_number": 2,
    "local_crops_size": 16,
    "out_dim": 32,
    "head_hidden_dim": 32,
    "head_bottleneck_dim": 16,
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

STEP = """
import sys, torch

dtype, out, *flags = sys.argv[1:]
torch.set_default_dtype(getattr(torch, dtype))
torch.set_num_threads(1)
from ssl_xcit import distributed, engine
from ssl_xcit.config import TrainConfig, load_config
from ssl_xcit.guard import BatchStatistics
from ssl_xcit.task import Task
from ssl_xcit.train import Pretraining

on_device = Task.on_device
Task.on_device = lambda *arguments: on_device(*arguments).to(torch.get_default_dtype())
found = {}

class Observed(Pretraining):
    def loss(self, batch, step, micro):
        found_loss = super().loss(batch, step, micro)
        share = found_loss.loss.detach() / self.config.optim.accumulation_steps
        found["loss"] = found.get("loss", 0) + share  # the log's means are float32
        return found_loss

    def before_update(self, step):
        super().before_update(step)
        for name, p in self.bare_model.named_parameters():
            if p.grad is not None:
                found[f"grad/{name}"] = p.grad.clone()

config = load_config(TrainConfig, argv=flags)
task = Observed(config, distributed.setup("cpu"))
task.loader.set_epoch(0, 0)
batches = iter(task.loader)
for step in range(1):
    engine.train_step(task, batches, step, BatchStatistics(task.modules()))
task.loader.close()
found["loss"] = distributed.all_reduce_mean(found["loss"])
found["center"] = task.dino_loss.center
for role, module in zip(("student", "teacher"), task.modules()):
    for name, p in module.named_parameters():
        found[f"{role}/{name}"] = p.detach()
    for name, b in module.named_buffers():
        found[f"buffer/{role}/{name}"] = b
torch.save(found, f"{out}/{task.ranks.rank}.pt")
distributed.teardown()
"""


def one_step(photos, folder, world, batch, accumulation, dtype, sync_bn, **others) -> list[dict]:
    """What each rank holds after a step of the global batch of 8."""
    assert world * batch * accumulation == 8
    folder.mkdir()
    settings = SETTINGS | {"data": photos, "out": folder / "run", "sync_bn": sync_bn} | others
    settings |= {"batch_size_per_gpu": batch, "accumulation_steps": accumulation}
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    script = folder / "step.py"
    script.write_text(STEP)
    arguments = [sys.executable, *(launcher if world > 1 else []), script, dtype, folder, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        arguments, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


CASES = {
    # batch statistics over all ranks: one process with the whole batch
    "synchronised": [(1, 8, 1, True), (2, 4, 1, True), (4, 2, 1, True)],
    # batch statistics of each micro-batch: ranks and accumulation are one and the same
    "micro-batches": [(1, 2, 4, False), (2, 2, 2, False), (4, 2, 1, False)],
}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_ranks_and_accumulation_change_no_gradient_centre_or_average(photos, tmp_path, case, dtype):
    tolerance = {"float64": 1e-10, "float32": 1e-5}[dtype]
    runs = [
        one_step(photos, tmp_path / str(i), world, batch, accumulation, dtype, sync_bn)
        for i, (world, batch, accumulation, sync_bn) in enumerate(CASES[case])
    ]
    ((alone,), *others) = runs
    assert len([name for name in alone if name.startswith("grad/")]) > 200
    assert alone["grad/backbone.patch_embed.proj.0.0.weight"].abs().max() > 1e-3
    for ranks in others:
        for name, tensor in ranks[0].items():
            assert all(torch.equal(rank[name], tensor) for rank in ranks), name
        for name, tensor in alone.items():
            if name.startswith("buffer/") and case == "micro-batches":
                continue  # one process moves them once per micro-batch, ranks once per step
            if name.startswith("student/") and dtype == "float32":
                continue  # Adam's first step has the full length whatever the gradient's
            found = ranks[0][name]
            torch.testing.assert_close(
                found, tensor, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_crops_in_turn_change_no_gradient_centre_or_average_of_several_ranks(photos, tmp_path):
    """Nor the running statistics: the global crops' move them first in either case."""
    whole, in_turn = (
        one_step(
            photos, tmp_path / text, 2, 2, 2, "float64", True,
            use_bn_in_head="false", crops_in_turn=text,
        )
        for text in ("false", "true")
    )  # fmt: skip
    for before, after in zip(whole, in_turn, strict=True):
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            torch.testing.assert_close(
                after[name], tensor, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_another_way_to_batch_is_told_from_the_same(photos, tmp_path):
    """The oracle can fail: without synchronised statistics two ranks are not one process."""
    (alone,) = one_step(photos, tmp_path / "a", 1, 8, 1, "float64", True)
    ranks = one_step(photos, tmp_path / "b", 2, 4, 1, "float64", False)
    name = "grad/backbone.patch_embed.proj.0.0.weight"
    assert (ranks[0][name] - alone[name]).abs().max() > 1e-5
    assert (ranks[0]["center"] - alone["center"]).abs().max() > 1e-6


def test_a_run_of_four_ranks_continues_on_two_with_the_images_in_the_same_order(photos, tmp_path):
    out = tmp_path / "run"
    script = tmp_path / "images.py"
    script.write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "from ssl_xcit.config import TrainConfig, run_command\n"
        "from ssl_xcit.train import Pretraining\n"
        "loss = Pretraining.loss\n"
        "def noted(task, batch, step, micro):\n"
        "    with open(f\"{os.environ['NOTES']}_{task.ranks.rank}\", 'a') as file:\n"
        "        print(step, task.loader.place(micro), *batch[2].tolist(), file=file)\n"
        "    return loss(task, batch, step, micro)\n"
        "Pretraining.loss = noted\n"
        "run_command(TrainConfig, 'ssl_xcit.train:train')\n"
    )
    images = {}
    for name, world, epochs in (("whole", 1, 2), ("four", 4, 2), ("two", 2, 2)):
        folder = tmp_path / "whole" if name == "whole" else out
        settings = SETTINGS | {"data": photos, "out": folder, "epochs": epochs}
        settings |= {"batch_size_per_gpu": 2, "accumulation_steps": 4 // world, "save_every": 1000}
        flags = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        arguments = [sys.executable, *(launcher if world > 1 else []), str(script), *flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "NOTES": str(tmp_path / name)}
        done = subprocess.run(
            arguments, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        if name == "four":  # back to the end of the first epoch
            for path in (out / "checkpoints").glob("step_*"):
                if checkpoint.load_checkpoint(path).state["step"] != 6:
                    for file in path.iterdir():
                        file.unlink()
                    path.rmdir()
        images[name] = {
            tuple(row[:2]): row[2:]
            for rank in range(world)
            for row in (
                [int(word) for word in line.split()]
                for line in (tmp_path / f"{name}_{rank}").read_text().splitlines()
            )
        }
    assert len(images["whole"]) == 12 * 4
    assert images["four"] == images["whole"]
    assert images["two"] == {key: row for key, row in images["whole"].items() if key[0] >= 6}
