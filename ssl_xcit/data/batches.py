"""How batches are made: worker threads render views into shared memory."""

import os
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64, UInt64
from torch import Tensor

from ssl_xcit.data import kernels
from ssl_xcit.data.beton import Beton
from ssl_xcit.data.views import EvalView, View
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.runtime.processor import usable_cores

DTYPES = {torch.uint8: np.uint8, torch.float32: np.float32}
FILTERS = {"bicubic": kernels.BICUBIC, "bilinear": kernels.BILINEAR}
PREFETCH = 2
"""Batches being made or waiting."""
# Fields with the same name in a view and in the kernels' description of it
SAME_NAMES = ("flip", "jitter", "grayscale", "blur", "solarize", "one_of")


def default_threads() -> int:
    """This process's share of the cores it may use, at least 1.

    The processes of a host (LOCAL_WORLD_SIZE) share its cores, unless each has cores of its own:
    then all of them together have no more than the host.
    """
    cores = usable_cores()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if cores * processes <= (os.cpu_count() or 1):
        return cores
    return max(1, cores // processes)


@dataclass
class Batch:
    """A batch being made: its memory, and what each place of it will show."""

    indices: Int64[np.ndarray, "n"]
    keys: UInt64[np.ndarray, "n"]
    status: np.ndarray  # (n,) uint8
    flat: np.ndarray  # bytes of all views
    offsets: np.ndarray  # (v,) int64, where a view's images begin in `flat`
    tensors: list[Tensor]  # one per group, views of `flat`
    counter: np.ndarray  # (1,) int64: the next place to be filled
    futures: list[Future]


class Renderer:
    """What the kernels need to know of a loader."""

    def __init__(
        self,
        beton: Beton,
        recipe: Sequence[Sequence[View | EvalView]],
        dtype: torch.dtype,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        num_threads: int,
    ) -> None:
        if dtype not in DTYPES:
            raise UserError(f"dtype: expected one of {[str(d) for d in DTYPES]}, got {dtype}")
        if dtype != torch.uint8 and not len(mean) == len(std) == beton.channels:
            raise UserError(
                f"{beton.path} has {beton.channels} channels, but mean has {len(mean)} values and "
                f"std {len(std)}: give one of each per channel"
            )
        for group in recipe:
            if len({view.size for view in group}) > 1:
                raise UserError(f"the views of a group need one size, got {group}")
        if not any(recipe):
            raise UserError("the recipe has no view")
        self.beton, self.dtype = beton, DTYPES[dtype]
        self.data = np.asarray(beton.data)  # numba knows no memmap
        self.groups = [(len(group), group[0].size if group else 0) for group in recipe]
        self.table = view_table([view for group in recipe for view in group])
        # For float32: (x / 255 - mean) / std = x * scale + shift
        self.scale = (1 / (255 * np.asarray(std, np.float64))).astype(np.float32)
        self.shift = (-np.asarray(mean) / np.asarray(std, np.float64)).astype(np.float32)
        self.num_threads = num_threads or default_threads()
        self.memory = _Memory()

    def allocate(self, indices: np.ndarray, keys: np.ndarray) -> Batch:
        """A batch of these images, not rendered yet."""
        n, channels = len(indices), self.beton.channels
        itemsize = np.dtype(self.dtype).itemsize
        offsets, groups, size = [], [], 0
        for views, side in self.groups:
            shape = (views, n, channels, side, side)
            view_bytes = n * channels * side * side * itemsize
            groups.append((slice(size, size + views * view_bytes), shape))
            offsets += [size + view * view_bytes for view in range(views)]
            size += -(-views * view_bytes // 64) * 64  # groups begin at cache lines
        flat = self.memory.take(size)
        tensors = [
            torch.from_numpy(flat[place].view(self.dtype)).view(shape) for place, shape in groups
        ]
        status, counter = np.zeros(n, np.uint8), np.zeros(1, np.int64)
        return Batch(indices, keys, status, flat, np.array(offsets), tensors, counter, futures=[])

    def render(
        self, batch: Batch, slots: np.ndarray, indices: np.ndarray, counter: np.ndarray
    ) -> None:
        """Fill places of a batch, together with the other threads that share the counter."""
        beton = self.beton
        kernels.render(
            self.data, beton.pointers, beton.sizes, beton.heights, beton.widths,
            beton.modes, beton.channels, slots, indices, batch.keys, self.table, batch.offsets,
            self.scale, self.shift, self.dtype == np.float32, batch.flat, batch.status, counter,
        )  # fmt: skip


class Batches:
    """The batches of one iteration, in order.

    `close` stops the threads without finishing their batches. It is also called when the last
    reference dies (an epoch left early), and at exit.
    """

    def __init__(self, renderer: Renderer, plan: Iterator[tuple[np.ndarray, np.ndarray]]) -> None:
        self._renderer, self._plan = renderer, plan
        self._pool = ThreadPoolExecutor(renderer.num_threads, thread_name_prefix="views")
        self._pending: deque[Batch] = deque()
        self.close = weakref.finalize(self, _stop, self._pool, self._pending)
        self._order()

    def next(self) -> Batch | None:
        """The next batch, None after the last. Raises whatever a worker thread raised."""
        if not self._pending:
            return None
        batch = self._pending.popleft()
        for future in batch.futures:
            future.result()
        self._order()
        return batch

    def _order(self) -> None:
        while len(self._pending) < PREFETCH and self.close.alive:
            item = next(self._plan, None)
            if item is None:
                return
            batch = self._renderer.allocate(*item)
            slots = np.arange(len(batch.indices))
            batch.futures = [
                self._pool.submit(self._renderer.render, batch, slots, batch.indices, batch.counter)
                for _ in range(min(self._renderer.num_threads, len(slots)))
            ]
            self._pending.append(batch)


def _stop(pool: ThreadPoolExecutor, pending: deque[Batch]) -> None:
    """End the threads of an iteration."""
    for batch in pending:
        batch.counter[0] = len(batch.indices)  # no place left to fill: the threads return
    pending.clear()
    with suppress(RuntimeError):  # the garbage collector may run in one of these threads
        pool.shutdown(wait=True, cancel_futures=True)


class _Memory:
    """Memory for batches, reused when no tensor refers to it any more.

    Fresh memory would cost page faults in every batch. A batch borrows its memory through an array
    that all its tensors, and tensors made from them by indexing, keep alive; when the last of them
    dies, the memory returns. torch manages pinned memory itself, since that must also wait for
    copies to the GPU still under way.
    """

    def __init__(self) -> None:
        self.free: list[np.ndarray] = []

    def take(self, size: int) -> np.ndarray:
        """`size` bytes, not initialised."""
        if torch.cuda.is_available():
            return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
        memory = self.free.pop() if self.free else np.empty(size, np.uint8)
        if memory.size < size:
            memory = np.empty(size, np.uint8)
        # A memoryview, because views of a plain slice refer to the whole array, not to the slice
        borrowed = np.asarray(memoryview(memory)[:size])
        weakref.finalize(borrowed, self.free.append, memory).atexit = False
        return borrowed


def view_table(views: Sequence[View | EvalView]) -> np.ndarray:
    """The kernels' description of views, (v,) kernels.VIEW."""
    rows = np.zeros(len(views), kernels.VIEW)
    for row, view in zip(rows, views, strict=True):
        row["size"], row["filter"] = view.size, FILTERS[view.interpolation]
        if isinstance(view, EvalView):
            row["kind"] = kernels.SQUARE if view.crop is None else kernels.CENTER_CROP
            row["resize"] = view.resize
            continue
        row["kind"] = kernels.SIMPLE_CROP if view.simple_crop else kernels.RANDOM_CROP
        row["scale"], row["log_ratio"] = view.scale, np.log(view.ratio)
        row["sigma"] = view.blur_sigma
        row["strengths"] = view.brightness, view.contrast, view.saturation, view.hue
        for name in SAME_NAMES:
            row[name] = getattr(view, name)
    return rows
