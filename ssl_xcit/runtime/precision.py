"""The precision that a training or an evaluation computes in, by what the machine can do.

bf16 and fp16 are autocast: layers multiply rounded numbers, all else is float32; in training fp16
has a gradient scaler. fp32 is float32 throughout (`set_tf32`), auto the quickest here (`quickest`).
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

NAMES = ("bf16", "fp16", "fp32")  # of several ranks' choices the last one holds
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TENSOR_CORES, NATIVE_BF16 = (7, 0), (8, 0)  # compute capabilities: V100, A100
# A step is more than products: with products quicker by less than this it may be slower in all.
QUICKER = 1.4


class Precision(NamedTuple):
    """One of NAMES, and why it is this one."""

    name: str
    reason: str


def choose(asked: str, ranks: Distributed, stored: str | None = None) -> Precision:
    """What `asked`, "auto" or one of NAMES, means here; all ranks call it, and agree.

    What was begun in the precision `stored` goes on in it. What is asked for and slow here is done,
    after one warning on stderr that says what it costs.
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
    """An evaluation's `config` with the precision that its own means here; says which and why."""
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
    """What "auto" takes on `device`: the one place that knows what a machine can do.

    A GPU is asked for its compute capability: bf16 from 8.0 (A100) on, fp16 from 7.0 (V100, T4),
    whose tensor cores know no bfloat16, fp32 below. A CPU is measured: torch emulates bfloat16
    where the processor has none, or ATEN_CPU_CAPABILITY or ONEDNN_MAX_CPU_ISA forbid its use.
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
    """What `asked` means on the machine of a plan: a GPU as they are today, or this CPU."""
    if asked != "auto":
        return asked
    return "bf16" if cuda else quickest(torch.device("cpu")).name


def slowdown(name: str, device: torch.device) -> str | None:
    """What a precision costs that `device` can only emulate; None: it costs nothing."""
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
    """Time of a layer's product in a precision, over that in float32, on this CPU.

    Of one thread, in its own time, the quickest of some: what neighbours do hardly matters. Takes
    milliseconds; 0.1 s where it is emulated.
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
    """Around a forward pass: lower precision where `name` says so."""
    return torch.autocast(device.type, DTYPES[name], enabled=name != "fp32")


def set_tf32() -> None:
    """Float32 products of a GPU are float32: torch's default has TF32 in convolutions alone.

    Nothing is lost by it: what is meant to be quick runs in bf16 or fp16, and what little remains
    in float32 beside that (the loss, the head's unit vectors) is no matrix product of weight.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
