"""Batches of views from a .beton file: each image is decoded once, all its views follow from it.

Every random choice is a function of (seed, epoch, image, view, draw) and the order of an epoch one
of (seed, epoch), see `ssl_xcit/draws.py`. So the batches are the same bits for any number of
threads, a step sees the same images for any number of ranks, and a resumed epoch goes on exactly as
it would have.

There is no loader process and no thread of the loader's own: `next` waits for the oldest batch and
orders a new one. A batch in the making is one atomic counter; each worker thread takes the next
image from it until none is left, without the GIL, and goes on with the following batch.
"""

import itertools
import logging
import os
import sys
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt64
from torch import Tensor

from ssl_xcit import kernels
from ssl_xcit.augment import EvalView, Recipe, View
from ssl_xcit.beton import Beton
from ssl_xcit.errors import UserError
from ssl_xcit.processor import usable_cores

logger = logging.getLogger(__name__)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

MAX_CORRUPT_SHARE, MIN_CORRUPT = 0.001, 5
"""A run stops when more than this share of the images seen, and at least 5 of them, are corrupt."""

DTYPES = {
    torch.uint8: (kernels.UINT8, np.uint8),
    torch.float32: (kernels.FLOAT32, np.float32),
    torch.bfloat16: (kernels.BFLOAT16, np.uint16),  # numpy has no bfloat16; torch sees the bits
}
FILTERS = {"bicubic": kernels.BICUBIC, "bilinear": kernels.BILINEAR}
# What a view and the kernels' description of it call alike
SAME_NAMES = ("flip", "jitter", "grayscale", "blur", "solarize", "one_of")
REASONS = {
    kernels.CORRUPT: "the decoder rejects it",
    kernels.TRUNCATED: "its JPEG data end early",
    kernels.WRONG_SIZE: "its size is not what the file says",
}


def default_threads() -> int:
    """This process's share of the cores it may use, at least 1.

    The processes of a host (LOCAL_WORLD_SIZE) share them, unless each has been given its own: then
    all of them together have no more cores than the host.
    """
    cores = usable_cores()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if cores * processes <= (os.cpu_count() or 1):
        return cores
    return max(1, cores // processes)


def epoch_order(seed: int, epoch: int, num_samples: int) -> Int64[np.ndarray, "n"]:
    """The permutation of an epoch: images sorted by a hash of (seed, epoch, image)."""
    keys = kernels.sample_keys(seed, epoch, np.arange(num_samples))
    return np.argsort(kernels.mix64_array(keys ^ kernels.ORDER_STREAM), kind="stable")


def rank_share(
    images: Int64[np.ndarray, "m"], rank: int, world_size: int
) -> Int64[np.ndarray, "n"]:
    """An evaluation's images of a rank: the rank-th of world_size contiguous parts."""
    return images[len(images) * rank // world_size : len(images) * (rank + 1) // world_size]


def labels_at(
    labels: Int64[np.ndarray, "m"] | None, indices: Int64[np.ndarray, "n"]
) -> Int64[Tensor, "n"]:
    """The labels of these images, -1 when there are none."""
    return torch.from_numpy(np.full(len(indices), -1) if labels is None else labels[indices])


class MultiCropLoader:
    """Batches of random views for training.

    Iterating gives the micro-batches of the epoch that `set_epoch` chose, each a tuple: one tensor
    (v, batch_size, channels, size, size) per group of `views`, one behind the other in memory, and
    `indices` (batch_size,) int64, the images' places in the file. For `dino_views` that is
    (globals, locals, indices). Images beyond the last full global batch are left out. A loader has
    one iteration at a time: a new one ends the one before.

    With A = accumulation_steps and G = batch_size * A * world_size, micro-batch j of step k on rank
    r is permutation[k G + (r A + j) batch_size :] up to batch_size images: only the product of
    ranks and accumulation decides what the micro-batches are.

    Tensors are the caller's: their memory is used again only after the last tensor that refers to
    it is gone. With CUDA they are pinned.

    Another image, chosen by the random key, takes the place of one that is corrupt: cut, or with
    data that are no JPEG's. It is logged and counted; `indices` name the image that is shown, so
    that its label fits.

    Args:
        beton: the file.
        views: groups of views of one size each, see `ssl_xcit.augment`.
        batch_size: images per micro-batch and rank.
        seed: of order and views.
        rank, world_size: this process among those that share the training.
        accumulation_steps: micro-batches per optimiser step.
        num_threads: worker threads; 0 = this process's share of the cores.
        dtype: torch.uint8 (0 to 255), or torch.float32 or bfloat16, normalised.
        mean, std: per channel, of values in 0 to 1; for the normalised dtypes.
        prefetch: batches in the making or waiting, at least 1.
        subset: the images to train on, by their places in the file; default all. They come in the
            order of the whole file's epoch, the others left out.

    Attributes:
        wait_seconds: time that callers have spent waiting for batches so far.
        corrupt: {index: reason} of the corrupt images met so far.
        damaged: indices of images decoded with a warning (superfluous bytes) so far.

    Raises:
        UserError: wrong arguments, or fewer images than one global batch; on iteration, too many
            corrupt images (MAX_CORRUPT_SHARE).
    """

    def __init__(
        self,
        beton: Beton | str | Path,
        views: Recipe,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulation_steps: int = 1,
        num_threads: int = 0,
        dtype: torch.dtype = torch.uint8,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        prefetch: int = 2,
        subset: Int64[np.ndarray, "n"] | None = None,
    ) -> None:
        self.beton = beton if isinstance(beton, Beton) else Beton(beton)
        self.batch_size, self.seed = batch_size, seed
        self.images = np.arange(len(self.beton)) if subset is None else subset
        self.rank, self.world_size = rank, world_size
        self.accumulation_steps, self.prefetch = accumulation_steps, prefetch
        self.mean, self.std = tuple(mean), tuple(std)
        self.global_batch = batch_size * world_size * accumulation_steps
        if len(self.images) < self.global_batch:
            raise UserError(
                f"{self.beton.path}: {len(self.images)} images are fewer than one global batch of "
                f"{self.global_batch} ({batch_size} x {world_size} ranks x {accumulation_steps} "
                "accumulation steps): use a smaller batch"
            )
        self._renderer = _Renderer(self.beton, views, dtype, self.mean, self.std, num_threads)
        self.wait_seconds = 0.0
        self.corrupt: dict[int, str] = {}
        self.damaged: set[int] = set()
        self.epoch = self._start_step = self._step = self._seen = 0
        self._batches: weakref.ref[_Batches] | None = None

    def __len__(self) -> int:
        """Optimiser steps per epoch."""
        return len(self.images) // self.global_batch

    def place(self, micro: int) -> int:
        """Which part of the global batch this rank's micro-batch number `micro` of a step is."""
        return self.rank * self.accumulation_steps + micro

    def step_images(self) -> Int64[np.ndarray, "a n"]:
        """This rank's images of the step that the next iteration begins with, by micro-batch."""
        plan = itertools.islice(self._plan(self.epoch, self._start_step), self.accumulation_steps)
        return np.stack([indices for indices, _ in plan])

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Let the next iteration be that of `epoch`, from step `start_step` on."""
        self.epoch, self._start_step = epoch, start_step
        self._step = start_step

    def state_dict(self) -> dict[str, int]:
        """Where the loader is: the steps of the epoch that have been handed out in full."""
        return {"seed": self.seed, "epoch": self.epoch, "step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from `state`."""
        self.seed = state["seed"]
        self.set_epoch(state["epoch"], state["step"])

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        self.close()
        plan = self._plan(self.epoch, self._start_step)
        batches = _Batches(self._renderer, plan, self.prefetch)
        self._batches = weakref.ref(batches)
        return self._deliver(batches, self._start_step)

    def close(self) -> None:
        """End the iteration under way, if any; its threads are gone when this returns."""
        batches = self._batches and self._batches()
        if batches:
            batches.close()

    def _plan(self, epoch: int, start_step: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(images, their keys) of every micro-batch of this rank."""
        order = epoch_order(self.seed, epoch, len(self.beton))
        if len(self.images) < len(order):
            order = order[np.isin(order, self.images)]
        for step in range(start_step, len(self)):
            for micro in range(self.accumulation_steps):
                first = step * self.global_batch + self.place(micro) * self.batch_size
                indices = order[first : first + self.batch_size]
                yield indices, kernels.sample_keys(self.seed, epoch, indices)

    def _deliver(self, batches: "_Batches", start_step: int) -> Iterator[tuple[Tensor, ...]]:
        delivered = 0
        try:
            while (tensors := self._next(batches)) is not None:
                delivered += 1
                self._step = start_step + delivered // self.accumulation_steps
                yield tensors
                del tensors  # or its memory could not be used for the next batch
        finally:
            batches.close()

    def _next(self, batches: "_Batches") -> tuple[Tensor, ...] | None:
        start = time.perf_counter()
        batch = batches.next()
        if batch is not None:
            self._mend(batch)
        self.wait_seconds += time.perf_counter() - start
        return batch and (*batch.tensors, torch.from_numpy(batch.indices.copy()))

    def _mend(self, batch: "_Batch") -> None:
        """Replace the corrupt images of a batch; nearly always there is nothing to do."""
        self._seen += len(batch.indices)
        if not batch.status.any():
            return
        for index in batch.indices[batch.status == kernels.DAMAGED].tolist():
            if index not in self.damaged:
                self.damaged.add(index)
                logger.info("%s: image %d has superfluous bytes", self.beton.path, index)
        broken = np.flatnonzero(batch.status > kernels.DAMAGED)
        for slot in broken.tolist():
            index = int(batch.indices[slot])
            known = index in self.corrupt
            self.corrupt[index] = REASONS[batch.status[slot]]
            self._stop_if_too_many()
            shown = self._substitute(batch, slot)
            if not known:
                logger.warning(
                    "%s: image %d is corrupt (%s); image %d takes its place",
                    self.beton.path, index, self.corrupt[index], shown,
                )  # fmt: skip

    def _stop_if_too_many(self) -> None:
        seen = min(self._seen, len(self.images))
        if len(self.corrupt) >= MIN_CORRUPT and len(self.corrupt) > MAX_CORRUPT_SHARE * seen:
            raise UserError(
                f"{self.beton.path}: {len(self.corrupt)} of {seen} images are corrupt (first: "
                f"{next(iter(self.corrupt))}), more than {MAX_CORRUPT_SHARE:.1%}: copy the file "
                "again, or run `python -m ssl_xcit.beton verify` on it"
            )

    def _substitute(self, batch: "_Batch", slot: int) -> int:
        """Fill a place of the batch with the views of the first decodable image of a sequence."""
        key = batch.keys[slot : slot + 1]
        indices = batch.indices.copy()
        for attempt in range(1000):
            drawn = kernels.mix64_array(key ^ kernels.SUBSTITUTE_STREAM + np.uint64(attempt))
            indices[slot] = self.images[drawn[0] % np.uint64(len(self.images))]
            self._renderer.render(batch, np.array([slot]), indices, np.zeros(1, np.int64))
            if batch.status[slot] <= kernels.DAMAGED:
                batch.indices[slot] = indices[slot]
                return int(indices[slot])
        raise UserError(f"{self.beton.path}: no image of 1000 can be decoded; write the file again")


class EvalLoader:
    """Batches of evaluation views, each image once over all ranks, in the order of the file.

    `subset`: the images to look at, by their places in the file; default all.

    Iterating gives (images (n, channels, size, size), labels (n,), indices (n,)) with n =
    batch_size but for the last batch; labels are -1 when the file has none. Rank r has the r-th of
    world_size contiguous parts. Arguments as for `MultiCropLoader`.

    Raises:
        UserError: wrong arguments; on iteration, a corrupt image, because no other can stand in.
    """

    def __init__(
        self,
        beton: Beton | str | Path,
        view: EvalView,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        num_threads: int = 0,
        dtype: torch.dtype = torch.uint8,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        prefetch: int = 2,
        subset: Int64[np.ndarray, "n"] | None = None,
    ) -> None:
        self.beton = beton if isinstance(beton, Beton) else Beton(beton)
        self.view, self.batch_size, self.prefetch = view, batch_size, prefetch
        self.mean, self.std = tuple(mean), tuple(std)
        images = np.arange(len(self.beton)) if subset is None else subset
        self.indices = rank_share(images, rank, world_size)
        self._renderer = _Renderer(self.beton, [[view]], dtype, self.mean, self.std, num_threads)
        self.wait_seconds = 0.0

    def __len__(self) -> int:
        """Batches of this rank."""
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        parts = (
            self.indices[start : start + self.batch_size]
            for start in range(0, len(self.indices), self.batch_size)
        )
        plan = ((part, np.zeros(len(part), np.uint64)) for part in parts)
        batches = _Batches(self._renderer, plan, self.prefetch)
        try:
            while (tensors := self._next(batches)) is not None:
                yield tensors
                del tensors  # or its memory could not be used for the next batch
        finally:
            batches.close()

    def _next(self, batches: "_Batches") -> tuple[Tensor, Tensor, Tensor] | None:
        start = time.perf_counter()
        batch = batches.next()
        self.wait_seconds += time.perf_counter() - start
        if batch is None:
            return None
        indices = batch.indices
        broken = np.flatnonzero(batch.status > kernels.DAMAGED)
        if len(broken):
            reason = REASONS[batch.status[broken[0]]]
            raise UserError(
                f"{self.beton.path}: image {indices[broken[0]]} is corrupt ({reason}): write the "
                "file again, without it"
            )
        labels = labels_at(self.beton.labels, indices)
        return batch.tensors[0][0], labels, torch.from_numpy(indices.copy())


@dataclass
class _Batch:
    """A batch in the making: its memory, and what each place of it will show."""

    indices: Int64[np.ndarray, "n"]
    keys: UInt64[np.ndarray, "n"]
    status: np.ndarray  # (n,) uint8
    flat: np.ndarray  # bytes of all views
    offsets: np.ndarray  # (v,) int64, where a view's images begin in `flat`
    tensors: list[Tensor]  # one per group, views of `flat`
    counter: np.ndarray  # (1,) int64: the next place to be filled
    futures: list[Future]


class _Renderer:
    """Everything about a loader that the kernels need to know."""

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
        self.beton, self.dtype = beton, dtype
        self.data = np.asarray(beton.data)  # numba knows no memmap
        self.code, self.numpy_dtype = DTYPES[dtype]
        self.groups = [(len(group), group[0].size if group else 0) for group in recipe]
        self.table = view_table([view for group in recipe for view in group])
        # (x / 255 - mean) / std = x * scale + shift
        self.scale = np.ones(beton.channels, np.float32)
        self.shift = np.zeros(beton.channels, np.float32)
        if dtype != torch.uint8:
            self.scale = (1 / (255 * np.asarray(std, np.float64))).astype(np.float32)
            self.shift = (-np.asarray(mean) / np.asarray(std, np.float64)).astype(np.float32)
        self.num_threads = num_threads or default_threads()
        self.buffers = _Buffers()

    def allocate(self, indices: np.ndarray, keys: np.ndarray) -> _Batch:
        """Memory for a batch of these images."""
        n, channels = len(indices), self.beton.channels
        itemsize = np.dtype(self.numpy_dtype).itemsize
        offsets, places, size = [], [], 0
        for views, side in self.groups:
            places.append(size)
            view_bytes = n * channels * side * side * itemsize
            offsets += [size + view * view_bytes for view in range(views)]
            size += -(-views * view_bytes // 64) * 64  # groups begin at cache lines
        flat = self.buffers.take(size)
        tensors = []
        for (views, side), place in zip(self.groups, places, strict=True):
            shape = (views, n, channels, side, side)
            count = int(np.prod(shape))
            values = flat[place : place + count * itemsize].view(self.numpy_dtype)
            tensors.append(torch.from_numpy(values).view(self.dtype).view(shape))
        status = np.zeros(n, np.uint8)
        counter = np.zeros(1, np.int64)
        return _Batch(indices, keys, status, flat, np.array(offsets), tensors, counter, futures=[])

    def render(
        self, batch: _Batch, slots: np.ndarray, indices: np.ndarray, counter: np.ndarray
    ) -> None:
        """Fill places of a batch, together with the other threads that share the counter."""
        beton = self.beton
        kernels.render(
            self.data, beton.pointers, beton.sizes, beton.heights, beton.widths,
            beton.modes, beton.channels, slots, indices, batch.keys, self.table, batch.offsets,
            self.scale, self.shift, self.code, batch.flat, batch.status, counter,
        )  # fmt: skip


class _Batches:
    """The batches of one iteration, in order, `prefetch` of them in the making or waiting."""

    def __init__(
        self,
        renderer: _Renderer,
        plan: Iterator[tuple[np.ndarray, np.ndarray]],
        prefetch: int,
    ) -> None:
        self._renderer, self._plan, self._prefetch = renderer, plan, prefetch
        self._pool = ThreadPoolExecutor(renderer.num_threads, thread_name_prefix="views")
        self._pending: deque[_Batch] = deque()
        # Called by close, when the last reference goes (an epoch left early), or at exit
        self._end = weakref.finalize(self, _stop, self._pool, self._pending)
        self._order()

    def next(self) -> _Batch | None:
        """The next batch, None after the last.

        Raises:
            whatever a worker thread raised.
        """
        if not self._pending:
            return None
        batch = self._pending.popleft()
        for future in batch.futures:
            future.result()
        self._order()
        return batch

    def close(self) -> None:
        """Stop the threads, without finishing what they are at."""
        self._end()

    def _order(self) -> None:
        while len(self._pending) < self._prefetch and self._end.alive:
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


def _stop(pool: ThreadPoolExecutor, pending: deque[_Batch]) -> None:
    """End the threads of an iteration."""
    for batch in pending:
        batch.counter[0] = len(batch.indices)  # no place left to fill: the threads return at once
    pending.clear()
    with suppress(RuntimeError):  # the garbage collector may run in one of the threads themselves
        pool.shutdown(wait=True, cancel_futures=True)


class _Buffers:
    """Memory for batches, reused when nothing refers to it any more.

    Fresh memory would cost its page faults in every batch. torch keeps the numpy array behind a
    tensor alive, so the array's reference count tells whether any tensor, or tensor made from it
    by indexing, is left. Pinned memory is torch's own affair: it also waits for the copies to the
    GPU that are still under way.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._arrays)

    def take(self, size: int) -> np.ndarray:
        """`size` bytes, not initialised."""
        if torch.cuda.is_available():
            return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
        for array in self._arrays:
            # The list, this loop, getrefcount's own argument
            if array.size >= size and sys.getrefcount(array) == 3:
                return array[:size]
        self._arrays.append(np.empty(size, np.uint8))
        return self._arrays[-1][:size]


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
