"""Our training step compared with the official code of 2021: seconds, images, FLOP/s, memory.

    python benchmarks/train_step.py [--cases small_12_p16:8 nano_32:64 ...] [--rounds 5]
        [--official-dino DIR --official-xcit DIR] [--only "ours bf16" ...] [--threads 2]

A step consists of the teacher's forward pass, the student's over 2 + L crops, loss, backward pass,
clipping, AdamW, the teacher update and the centre. Each program runs in its own process. All of
them are alive at once and take turns step by step, so that changes in machine speed affect all
alike. Ours is `ssl_xcit.training.engine.train_step` itself, on random pixels.

The baseline is reference_step.py, which executes the operations of the official code. Given the two
folders (checkouts of facebookresearch/dino and facebookresearch/xcit), it is that code itself: its
model, head, wrapper, loss and clipping in its loop, with two changes. BatchNorm2d replaces
SyncBatchNorm, which does not run on CPUs. nano uses the norm of the other sizes, because its own
modifies in place what autograd needs. On a GPU the official program runs in its own precision,
float16 with a loss scale.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple


class Case(NamedTuple):
    """The network and data of a benchmark."""

    arch: str
    batch: int
    sides: tuple[int, int] = (224, 96)
    local_crops: int = 8
    out_dim: int = 65536
    hidden: int = 2048
    bottleneck: int = 256
    drop_path: float = 0.1
    in_turn: bool = False


CASES = {
    "small_12_p16": Case("xcit_small_12_p16", 8),
    "small_12_p8": Case("xcit_small_12_p8", 2),
    "medium_24_p16": Case("xcit_medium_24_p16", 4),
    "nano_12_p16": Case("xcit_nano_12_p16", 16),
    "nano_32": Case("xcit_nano_12_p8", 64, (32, 16), 3, 1024, 512, 128, 0.0),  # the demo
}
OURS = {  # settings of class Run, and differences from the case
    "ours fp32": {},
    "ours auto": {"precision": "auto"},
    "ours fp16": {"precision": "fp16"},
    "ours bf16": {"precision": "bf16"},
    "ours fp32 compiled": {"compile": True},
    "ours bf16 compiled": {"precision": "bf16", "compile": True},
    "ours bf16 checkpointed": {"precision": "bf16", "activation_checkpointing": True},
    "ours bf16 in turn": {"precision": "bf16", "in_turn": True},
    "ours bf16 in turn checkpointed": {
        "precision": "bf16",
        "in_turn": True,
        "activation_checkpointing": True,
    },
}
DEFAULT = ("fp32", "bf16", "ours fp32", "ours bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2, help="steps before measuring")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--official-dino", default="")
    parser.add_argument("--official-xcit", default="")
    parser.add_argument("--only", nargs="+", help=f"of: {', '.join((*DEFAULT[:2], *OURS))}")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args)
        return
    yardstick = "official" if args.official_dino else "reference"
    for text in args.cases:
        name, _, batch = text.partition(":")
        case = CASES[name]._replace(**({"batch": int(batch)} if batch else {}))
        compare(args, name, case, yardstick)


class Server:
    """A program in its own process that runs a step on request."""

    def __init__(
        self, program: str, case: Case, environment: dict[str, str], options: tuple[str, ...] = ()
    ) -> None:
        command = [sys.executable, __file__, "--serve", json.dumps([program, *case]), *options]
        pipe, environment = subprocess.PIPE, os.environ | environment
        self.process = subprocess.Popen(
            command, env=environment, stdin=pipe, stdout=pipe, text=True
        )

    def ask(self) -> None:
        """Request the description of the program (first call) or a step (later calls)."""
        self.process.stdin.write("step\n")
        self.process.stdin.flush()

    def answer(self) -> dict:
        """Wait for the answer and return it."""
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a program ended with status {self.process.wait()}")
        return json.loads(line)

    def step(self) -> dict:
        """Request a step and wait for the answer."""
        self.ask()
        return self.answer()

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def compare(args: argparse.Namespace, name: str, case: Case, yardstick: str) -> None:
    """Time all programs in turn and print the table."""
    programs = [f"{yardstick} {p}" if p in DEFAULT[:2] else p for p in args.only or DEFAULT]
    options = ["--device", args.device, "--official-dino", args.official_dino]
    options += ["--official-xcit", args.official_xcit]
    servers, warmups = {}, {}
    for program in programs:  # build one at a time, unmeasured
        threads = {"OMP_NUM_THREADS": str(args.threads)}
        server = servers[program] = Server(program, case, threads, tuple(options))
        facts = server.step()
        warmups[program] = sum(server.step()["wall"] for _ in range(args.warmup))
    steps = {program: [] for program in programs}
    for round_ in range(args.rounds):
        for program in programs if round_ % 2 == 0 else reversed(programs):
            steps[program].append(servers[program].step())
    print(
        f"\n{name}: {case.arch}, batch {case.batch}, 2 x {case.sides[0]} + {case.local_crops} x "
        f"{case.sides[1]} pixels, out_dim {case.out_dim:,}, drop path {case.drop_path}; "
        f"{args.threads} threads, {args.device}, torch {facts['torch']}, {args.rounds} rounds; "
        f"product rate fp32 {facts['rate_fp32'] / 1e9:.0f}, bf16 {facts['rate_bf16'] / 1e9:.0f} "
        "GFLOP/s"
    )
    print(
        f"{'':32}{'s/step':>8}{'CPU s':>8}{'img/s':>8}{'GFLOP/s':>9}{'share':>7}{'peak MB':>9}"
        f"{'time':>7}{'CPU':>7}{'memory':>8}{'warm-up s':>11}"
    )
    base = None
    for program, server in servers.items():
        wall, cpu, peak = (
            statistics.median(step[key] for step in steps[program])
            for key in ("wall", "cpu", "peak")
        )
        base = base or (wall, cpu, peak)
        rate = facts["flops"] / wall
        product = facts["rate_fp32" if "fp32" in program else "rate_bf16"]
        print(
            f"{program:32}{wall:8.3f}{cpu:8.3f}{case.batch / wall:8.2f}{rate / 1e9:9.1f}"
            f"{rate / product:7.2f}{peak / 1e6:9.0f}{wall / base[0]:7.2f}{cpu / base[1]:7.2f}"
            f"{peak / base[2]:8.2f}{warmups[program]:11.1f}",
            flush=True,
        )
        server.close()


def serve(args: argparse.Namespace) -> None:
    """Run a step on each request."""
    program, *values = json.loads(args.serve)
    case = Case(*values)._replace(sides=tuple(values[2]))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep the output of libraries out of the answers
    if program.startswith("ours"):
        from ssl_xcit.runtime import processor

        processor.prepare()
    import torch

    torch.manual_seed(0)
    if program.startswith("ours"):
        step = ours(case, OURS[program], args.device)
    elif program.startswith("official"):
        step = official(case, program, args)
    else:
        step = reference(case, program, args.device)
    facts = {"torch": torch.__version__, **rates(case, args.device)}
    sys.stdin.readline()
    print(json.dumps(facts), file=answers, flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        if args.device == "cuda":
            torch.cuda.synchronize()
        done = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps(done | {"peak": peak_memory(args.device)}), file=answers, flush=True)


def peak_memory(device: str) -> int:
    """Peak bytes of this process, or on a GPU of its allocator."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def rates(case: Case, device: str) -> dict[str, float]:
    """Return FLOPs of a step, and FLOP/s of the MLP's product in both precisions."""
    import torch

    from ssl_xcit.dino.plan import step_flops
    from ssl_xcit.models.variants import VARIANTS

    d = VARIANTS[case.arch.rpartition("_p")[0]].embed_dim
    n = 8 * 196
    found = {"flops": step_flops(settings(case, {}, Path(), device)).total}
    for name, dtype in (("rate_fp32", torch.float32), ("rate_bf16", torch.bfloat16)):
        a = torch.randn(n, d, device=device, dtype=dtype)
        b = torch.randn(d, 4 * d, device=device, dtype=dtype)
        best = float("inf")
        for _ in range(30):
            start = time.perf_counter()
            a @ b
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        found[name] = 2 * n * d * 4 * d / best
    return found


def crops_of(case: Case, device: str) -> tuple:
    """Return normalised random pixels, (2, n, 3, s, s) and (L, n, 3, s, s)."""
    import torch

    (large, small), n = case.sides, case.batch
    return (
        torch.randn(2, n, 3, large, large, device=device),
        torch.randn(case.local_crops, n, 3, small, small, device=device),
    )


def settings(case: Case, run: dict, folder: Path, device: str) -> object:
    """Return our TrainConfig."""
    from ssl_xcit.dino.config import Crops, Head, Loss, Model, Optim, TrainConfig
    from ssl_xcit.training.config import Run

    return TrainConfig(
        case.arch,
        str(folder / "noise.beton"),
        str(folder / "run"),
        crops=Crops(
            global_crops_size=case.sides[0],
            local_crops_size=case.sides[1],
            local_crops_number=case.local_crops,
            crops_in_turn=case.in_turn,
        ),
        model=Model(drop_path_rate=case.drop_path),
        head=Head(
            out_dim=case.out_dim,
            norm_last_layer=True,
            head_hidden_dim=case.hidden,
            head_bottleneck_dim=case.bottleneck,
        ),
        loss=Loss(teacher_temp=0.04),
        optim=Optim(
            batch_size_per_gpu=case.batch, epochs=1_000_000, clip_grad=3.0, freeze_last_layer=0
        ),
        run=Run(device=device, **({"precision": "fp32"} | run)),
    )


def ours(case: Case, run: dict, device: str) -> object:
    """Return a function that runs one step of `ssl_xcit`."""
    import itertools

    import torch
    from PIL import Image

    from ssl_xcit.data.writer import write_beton
    from ssl_xcit.dino.train import Pretraining
    from ssl_xcit.runtime import distributed
    from ssl_xcit.training.engine import train_step
    from ssl_xcit.training.guard import BatchStatistics

    case = case._replace(**{name: run[name] for name in Case._fields if name in run})
    run = {name: value for name, value in run.items() if name not in Case._fields}
    with tempfile.TemporaryDirectory() as folder:
        config = settings(case, run, Path(folder), device)
        images = Path(folder) / "images" / "noise"
        images.mkdir(parents=True)
        images_of_all = case.batch * int(os.environ.get("WORLD_SIZE", "1"))
        for i in range(images_of_all):  # Pretraining needs a data set; these images are not used
            Image.new("RGB", (8, 8)).save(images / f"{i}.png")
        write_beton(images.parent, config.data, progress=False)
        task = Pretraining(config, distributed.setup(device))
    statistics_ = BatchStatistics(task.modules())
    crops = crops_of(case, device)
    batches = itertools.repeat((*crops, torch.arange(case.batch)))
    number = itertools.count(1)
    return lambda: train_step(task, batches, next(number), statistics_)


def reference(case: Case, program: str, device: str) -> object:
    """Return a function that runs one step of reference_step.py."""
    import torch
    from reference_step import ReferenceStep

    step = ReferenceStep(
        case.arch,
        out_dim=case.out_dim,
        hidden=case.hidden,
        bottleneck=case.bottleneck,
        drop_path=case.drop_path,
        autocast=torch.bfloat16 if "bf16" in program else None,
    ).to(torch.device(device))
    views = [view for crop in crops_of(case, device) for view in crop]
    return lambda: step(views)


def official(case: Case, program: str, args: argparse.Namespace) -> object:
    """Return a function that runs one step of the official code."""
    import warnings

    import torch
    from torch import nn

    warnings.simplefilter("ignore")
    sys.path[:0] = [args.official_dino, args.official_xcit]
    import main_dino  # isort: skip
    import utils  # isort: skip
    import xcit  # isort: skip
    from vision_transformer import DINOHead  # isort: skip

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tempfile.mkdtemp()}/rendezvous", rank=0, world_size=1
    )

    def network(drop_path: float) -> nn.Module:
        backbone = getattr(xcit, case.arch)(pretrained=False, drop_path_rate=drop_path)
        for module in list(backbone.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.SyncBatchNorm):
                    setattr(module, name, nn.BatchNorm2d(child.num_features))
        for block in backbone.cls_attn_blocks:
            block.tokens_norm = True  # else it modifies what autograd needs, and training fails
        head = DINOHead(
            backbone.embed_dim,
            case.out_dim,
            norm_last_layer=True,
            hidden_dim=case.hidden,
            bottleneck_dim=case.bottleneck,
        )
        return utils.MultiCropWrapper(backbone, head).to(args.device)

    student, teacher = network(case.drop_path), network(0.0)
    teacher.load_state_dict(student.state_dict())
    for parameter in teacher.parameters():
        parameter.requires_grad = False
    count = case.local_crops + 2
    dino_loss = main_dino.DINOLoss(case.out_dim, count, 0.04, 0.04, 0, 100).to(args.device)
    optimizer = torch.optim.AdamW(utils.get_params_groups(student))
    views = [view for crop in crops_of(case, args.device) for view in crop]
    half = torch.float16 if args.device == "cuda" else torch.bfloat16
    lower = "bf16" in program
    scaler = torch.amp.GradScaler(args.device, enabled=lower and args.device == "cuda")

    def step() -> None:
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = 1e-3
            if i == 0:
                group["weight_decay"] = 0.04
        with torch.autocast(args.device, half, enabled=lower):
            teacher_output = teacher(views[:2])
            student_output = student(views)
            loss = dino_loss(student_output, teacher_output, 0)
        assert loss.isfinite().item()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        utils.clip_gradients(student, 3.0)
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            for theirs, ours_ in zip(student.parameters(), teacher.parameters(), strict=True):
                ours_.data.mul_(0.996).add_((1 - 0.996) * theirs.detach().data)
        loss.item()

    return step


if __name__ == "__main__":
    main()
