"""Accuracy of the memory that `ssl-xcit plan` predicts, compared with real steps on a CPU.

    python benchmarks/plan_memory.py [--batch 4] [--local_crops 4] [--out_dim 8192] [--bf16]

For each architecture, fresh processes run two real optimiser steps on random pixels, built from the
same parts as those of `ssl_xcit.dino.train`, and report

    tensors   peak bytes of live storages of operators' results, without scratch memory inside
              operators: what the plan predicts
    process   peak resident memory, minus that of the process before it built the networks

glibc is configured to return every larger block at once, or its own caching would be measured.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ARCHS = ("xcit_nano_12_p16", "xcit_tiny_12_p16", "xcit_small_12_p16")
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
GIVE_BACK |= {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--local_crops", type=int, default=4)
    parser.add_argument("--out_dim", type=int, default=8192)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--archs", nargs="+", default=ARCHS)
    parser.add_argument("--measure", choices=("tensors", "process"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args)))
        return
    precision = "bf16" if args.bf16 else "fp32"
    print(
        f"batch {args.batch}, 2 x 224 + {args.local_crops} x 96 pixels, out_dim {args.out_dim}, "
        f"{args.optimizer}, {precision}, accumulation {args.accumulation}; MB"
    )
    print(f"{'':20}{'plan':>9}{'tensors':>9}{'plan/it':>9}{'process':>9}{'plan/it':>9}")
    for arch in args.archs:
        found = {kind: in_a_new_process(args, arch, kind) for kind in ("tensors", "process")}
        plan = found["process"]["plan"]
        cells = [f"{plan / 1e6:9.1f}"]
        for kind in ("tensors", "process"):
            peak = found[kind]["peak"]
            cells += [f"{peak / 1e6:9.1f}", f"{plan / peak:9.3f}"]
        print(f"{arch:20}{''.join(cells)}", flush=True)


def in_a_new_process(args: argparse.Namespace, arch: str, kind: str) -> dict:
    options = [f"--{name}" for name in ("bf16",) if getattr(args, name)]
    for name in ("batch", "local_crops", "out_dim", "accumulation", "optimizer"):
        options += [f"--{name}", str(getattr(args, name))]
    command = [sys.executable, __file__, *options, "--archs", arch, "--measure", kind]
    environment = os.environ | GIVE_BACK
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace) -> dict:
    """Return {"plan": bytes, "peak": bytes} for the only architecture in `args.archs`."""
    import torch

    from ssl_xcit.dino.config import Crops, Head, Optim, TrainConfig
    from ssl_xcit.dino.memory import LiveBytes, training_memory
    from ssl_xcit.training.config import Run

    torch.set_num_threads(1)
    optim = Optim(
        optimizer=args.optimizer,
        batch_size_per_gpu=args.batch,
        accumulation_steps=args.accumulation,
    )
    config = TrainConfig(
        args.archs[0],
        "",
        "",
        crops=Crops(local_crops_number=args.local_crops),
        head=Head(out_dim=args.out_dim),
        optim=optim,
        run=Run(device="cpu", precision="bf16" if args.bf16 else "fp32"),
    )
    plan = training_memory(config, 1, cuda=False).peak

    steps(smallest(config))  # initialises torch's libraries
    if args.measure == "tensors":
        with LiveBytes([]) as live:
            steps(config)
        return {"plan": plan, "peak": live.peak}
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    steps(config)
    return {"plan": plan, "peak": resident("VmHWM") - before}


def steps(config: object) -> None:
    """Run two optimiser steps on random pixels, from scratch."""
    import copy

    import torch

    from ssl_xcit.dino.loss import DINOLoss
    from ssl_xcit.dino.memory import crop_groups, forward_backward
    from ssl_xcit.dino.networks import dino_network
    from ssl_xcit.dino.teacher import update_teacher
    from ssl_xcit.training.optim import (
        build_optimizer,
        clip_gradients,
        parameter_groups,
        set_hyperparameters,
    )

    student = dino_network(config)
    teacher = copy.deepcopy(student).requires_grad_(False)
    teacher.backbone.drop_path_rate = 0.0
    loss = DINOLoss(config.head.out_dim)
    optimizer = build_optimizer(config.optim.optimizer, parameter_groups(student))
    optimizer.found_inf = torch.zeros(())
    n = config.optim.batch_size_per_gpu
    crops = [torch.randn(views, n, 3, side, side) for views, side in crop_groups(config)]
    for _ in range(2):
        set_hyperparameters(optimizer, 1e-3, 0.04)
        for _ in range(config.optim.accumulation_steps):
            forward_backward(config, student, teacher, loss, crops)
        clip_gradients(student.parameters(), config.optim.clip_grad, config.optim.clip_mode)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_teacher(student, teacher, 0.99, skip=optimizer.found_inf.bool())


def smallest(config: object) -> object:
    """Return a tiny version of the same training."""
    import dataclasses

    crops = dataclasses.replace(config.crops, global_crops_size=32, local_crops_size=32)
    head = dataclasses.replace(config.head, out_dim=8)
    optim = dataclasses.replace(config.optim, batch_size_per_gpu=2)
    return dataclasses.replace(config, arch="xcit_nano_12_p16", crops=crops, head=head, optim=optim)


def resident(line: str) -> int:
    """Return this process's VmRSS (now) or VmHWM (the peak since the last reset) in bytes."""
    for text in Path("/proc/self/status").read_text().splitlines():
        if text.startswith(f"{line}:"):
            return 1024 * int(text.split()[1])
    raise AssertionError(line)


if __name__ == "__main__":
    main()
