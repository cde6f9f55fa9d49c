"""The precision of a training or an evaluation, chosen by what the machine can do.

bf16 and fp16 mean autocast: layers multiply rounded numbers, everything else is float32; training
in fp16 adds a gradient scaler. fp32 is float32 throughout (`set_tf32`). auto is the fastest of them
on this machine (`quickest`).
"""

import dataclasses
import functools
import sys
import time
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_xcit.runtime import distributed
from ssl_xcit.runtime.distributed import Distributed
from ssl_xcit.runtime.options import Config

NAMES = ("bf16", "fp16", "fp32")  # if ranks choose differently, the last of these wins
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TENSOR_CORES, NATIVE_BF16 = (7, 0), (8, 0)  # compute capabilities: V100, A100
# A step is more than matrix products: if those gain less than this, it may be slower overall.
QUICKER = 1.4


class Precision(NamedTuple):
    """One of NAMES, and why it is this one."""

    name: str
    reason: str


def choose(asked: str, ranks: Distributed, stored: str | None = None) -> Precision:
    """The precision that `asked` ("auto" or one of NAMES) means here; all ranks call it and agree.

    A run begun in precision `stored` continues in it. A precision that is slow here is used if
    asked for, after one warning on stderr with its cost.
    """
    set_tf32()
    if asked != "auto":
        return _slow_or_not(asked, ranks, "as asked for", "--precision auto is quicker")
    best = quickest(ranks.device)
    name = NAMES[distributed.maximum(NAMES.index(best.name))]
    number = distributed.maximum(-1 if stored is None else NAMES.index(stored))
    if number >= 0 and NAMES[number] != name:
        reason = f"as it was begun; here it would be {name}"
        return _slow_or_not(NAMES[number], ranks, reason, f"begun anew, {name} is quicker")
    return best if name == best.name else Precision(name, "for the sake of another rank")


def settled(config: Config, ranks: Distributed, stored: str | None = None) -> Config:
    """An evaluation's `config` with "auto" resolved; prints which precision it is, and why."""
    found = choose(config.precision, ranks, stored)
    if ranks.rank == 0:
        print(f"precision {found.name}: {found.reason}", flush=True)
    return dataclasses.replace(config, precision=found.name)


def _slow_or_not(name: str, ranks: Distributed, reason: str, better: str) -> Precision:
    cost = slowdown(name, ranks.device)
    if cost and ranks.rank == 0:
        print(f"warning: {name} {cost}; {better}", file=sys.stderr, flush=True)
    return Precision(name, reason)


def quickest(device: torch.device) -> Precision:
    """What "auto" means on `device`: the one place that knows what a machine can do.

    GPUs go by compute capability: bf16 from 8.0 (A100), fp16 from 7.0 (V100, T4), whose tensor
    cores lack bfloat16, fp32 below. CPUs are measured: torch emulates bfloat16 where the processor
    lacks it, or where ATEN_CPU_CAPABILITY or ONEDNN_MAX_CPU_ISA forbid it.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        words = "compute capability {}.{}".format(*capability)
        if capability >= NATIVE_BF16:
            return Precision("bf16", words)
        if capability >= TENSOR_CORES:
            return Precision("fp16", f"{words} has no bfloat16")
        return Precision("fp32", f"{words} has no tensor cores")
    ratio = product_time("bf16")
    if ratio * QUICKER < 1:
        return Precision("bf16", f"its products take {ratio:.2f} of float32's time here")
    return Precision("fp32", f"bfloat16 products take {ratio:.3g} times as long here")


def planned(asked: str, cuda: bool) -> str:
    """What `asked` means on the machine that is planned for: a current GPU, or this CPU."""
    if asked != "auto":
        return asked
    return "bf16" if cuda else quickest(torch.device("cpu")).name


def slowdown(name: str, device: torch.device) -> str | None:
    """The cost of a precision that `device` only emulates, in words; None: it is native."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        native = {"bf16": NATIVE_BF16, "fp16": TENSOR_CORES}.get(name, (0, 0))
        return None if capability >= native else "is emulated on this GPU, and slower than float32"
    ratio = 1.0 if name == "fp32" else product_time(name)
    if ratio < 1.2:
        return None
    return f"is emulated on this processor: its products take {ratio:.3g} times as long as fp32's"


@functools.cache
def product_time(name: str) -> float:
    """Time of a layer's matrix product in a precision, relative to float32, on this CPU.

    The minimum over a few runs of one thread's CPU time, so other processes hardly matter. Takes
    milliseconds; 0.1 s where the precision is emulated.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        shapes = (128, 384), (768, 384)
        pairs = [[torch.ones(s, dtype=DTYPES[n]) for s in shapes] for n in ("fp32", name)]
        with torch.inference_mode():
            exact, low = ([_seconds(*pair) for _ in range(2)] for pair in pairs)
            for _ in range(5 if min(low) < 4 * min(exact) else 0):
                exact.append(_seconds(*pairs[0]))
                low.append(_seconds(*pairs[1]))
        return min(low) / min(exact)
    finally:
        torch.set_num_threads(threads)


def _seconds(x: Tensor, weight: Tensor) -> float:
    start = time.thread_time()
    F.linear(x, weight)
    return time.thread_time() - start


def autocast(device: torch.device, name: str) -> AbstractContextManager:
    """The context of a forward pass in precision `name`."""
    return torch.autocast(device.type, DTYPES[name], enabled=name != "fp32")


def set_tf32() -> None:
    """Switch TF32 off, so that float32 on a GPU is float32; torch's default has it in convolutions.

    This costs nothing: whatever must be fast runs in bf16 or fp16, and what remains in float32 (the
    loss, the head's unit vectors) is no large matrix product.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
