"""Batches of views from a .beton file: each image is decoded once, all its views follow from it.

Every random choice is a function of (seed, epoch, image, view, draw), and the order of an epoch one
of (seed, epoch), see `ssl_xcit/runtime/draws.py`. So batches do not depend on the number of
threads, a step sees the same images for any number of ranks, and a resumed epoch continues exactly.

There is no loader process or thread: `next` waits for the oldest batch and orders a new one. Worker
threads share the batch being made through one atomic counter: without the GIL, each takes the next
image until none is left, then continues with the following batch.
"""

import itertools
import logging
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from ssl_xcit.data import kernels
from ssl_xcit.data.batches import Batch, Batches, Renderer
from ssl_xcit.data.beton import Beton
from ssl_xcit.data.pixels import IMAGENET_MEAN, IMAGENET_STD
from ssl_xcit.data.views import EvalView, Recipe, View
from ssl_xcit.runtime.errors import UserError

logger = logging.getLogger(__name__)


MAX_CORRUPT_SHARE, MIN_CORRUPT = 0.001, 5
"""A run stops when more than this share of the images seen, and at least 5 of them, are corrupt."""

REASONS = {
    kernels.CORRUPT: "the decoder rejects it",
    kernels.TRUNCATED: "its JPEG data end early",
    kernels.WRONG_SIZE: "its size is not what the file says",
}


def epoch_order(seed: int, epoch: int, num_samples: int) -> Int64[np.ndarray, "n"]:
    """The permutation of an epoch: images sorted by a hash of (seed, epoch, image)."""
    keys = kernels.sample_keys(seed, epoch, np.arange(num_samples))
    return np.argsort(kernels.mix64_array(keys ^ kernels.ORDER_STREAM), kind="stable")


def rank_share(
    images: Int64[np.ndarray, "m"], rank: int, world_size: int
) -> Int64[np.ndarray, "n"]:
    """The images that a rank evaluates: the rank-th of world_size contiguous parts."""
    return images[len(images) * rank // world_size : len(images) * (rank + 1) // world_size]


def parts_of(indices: Int64[np.ndarray, "n"], size: int) -> list[Int64[np.ndarray, "m"]]:
    """`indices` in batches of `size`; the last one may be smaller."""
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def labels_at(
    labels: Int64[np.ndarray, "m"] | None, indices: Int64[np.ndarray, "n"]
) -> Int64[Tensor, "n"]:
    """The labels of these images; -1 without labels."""
    return torch.from_numpy(np.full(len(indices), -1) if labels is None else labels[indices])


class _Loader:
    """What both loaders share: the file, its images, and the way of a batch to the caller.

    A subclass gives `_plan`, the (images, their random keys) of every batch of an iteration, and
    `_finish`, the tensors that the caller gets of a decoded batch.

    Attributes:
        wait_seconds: time that callers have spent waiting for batches so far.
    """

    def __init__(
        self,
        beton: Beton | str | Path,
        views: Sequence[Sequence[View | EvalView]],
        batch_size: int,
        num_threads: int = 0,
        dtype: torch.dtype = torch.uint8,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        subset: Int64[np.ndarray, "n"] | None = None,
    ) -> None:
        self.beton = beton if isinstance(beton, Beton) else Beton(beton)
        self.batch_size = batch_size
        self.images = np.arange(len(self.beton)) if subset is None else subset
        self.mean, self.std = tuple(mean), tuple(std)
        self.wait_seconds = 0.0
        self._renderer = Renderer(self.beton, views, dtype, self.mean, self.std, num_threads)
        self._batches: weakref.ref[Batches] | None = None

    def close(self) -> None:
        """End the iteration under way, if any; its threads are gone when this returns."""
        batches = self._batches and self._batches()
        if batches:
            batches.close()

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        self.close()
        batches = Batches(self._renderer, self._plan())
        self._batches = weakref.ref(batches)
        return self._deliver(batches)

    def _deliver(self, batches: Batches) -> Iterator[tuple[Tensor, ...]]:
        try:
            while (tensors := self._next(batches)) is not None:
                yield tensors
                del tensors  # else the next batch could not reuse their memory
        finally:
            batches.close()

    def _next(self, batches: Batches) -> tuple[Tensor, ...] | None:
        start = time.perf_counter()
        batch = batches.next()
        tensors = None if batch is None else self._finish(batch)
        self.wait_seconds += time.perf_counter() - start
        return tensors


class MultiCropLoader(_Loader):
    """Batches of random views for training.

    Iterating gives the micro-batches of the epoch that `set_epoch` chose, each a tuple: one tensor
    (v, batch_size, channels, size, size) per group of `views`, contiguous in memory, and `indices`
    (batch_size,) int64, the images' places in the file. For `dino_views` that is (globals, locals,
    indices). Images beyond the last full global batch are dropped. A loader has one iteration at a
    time: a new one ends the one before.

    With A = accumulation_steps and G = batch_size * A * world_size, micro-batch j of step k on rank
    r is permutation[k G + (r A + j) batch_size :] up to batch_size images: only the product of
    ranks and accumulation decides what the micro-batches are.

    Tensors are the caller's: their memory is reused only after the last tensor that refers to it is
    gone. With CUDA they are pinned.

    A corrupt image (cut, or not JPEG data) is replaced by another one, chosen by the random key. It
    is logged and counted; `indices` name the image that is shown, so its label fits.

    Args:
        beton: the file.
        views: groups of views of one size each, see `ssl_xcit.data.views`.
        batch_size: images per micro-batch and rank.
        seed: of order and views.
        rank, world_size: this process among those that share the training.
        accumulation_steps: micro-batches per optimiser step.
        num_threads: worker threads; 0: this process's share of the cores.
        dtype: torch.uint8 (0 to 255), or torch.float32, normalised.
        mean, std: per channel, of values in 0 to 1; for float32.
        subset: the images to train on, by their places in the file; default all. They keep the
            order that they have in an epoch of the whole file.

    Attributes:
        corrupt: {index: reason} of the corrupt images met so far.

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
        subset: Int64[np.ndarray, "n"] | None = None,
    ) -> None:
        super().__init__(beton, views, batch_size, num_threads, dtype, mean, std, subset)
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.accumulation_steps = accumulation_steps
        self.global_batch = batch_size * world_size * accumulation_steps
        if len(self.images) < self.global_batch:
            raise UserError(
                f"{self.beton.path}: {len(self.images)} images are fewer than one global batch of "
                f"{self.global_batch} ({batch_size} x {world_size} ranks x {accumulation_steps} "
                "accumulation steps): use a smaller batch"
            )
        self.corrupt: dict[int, str] = {}
        self.epoch = self._start_step = self._seen = 0

    def __len__(self) -> int:
        """Optimiser steps per epoch."""
        return len(self.images) // self.global_batch

    def place(self, micro: int) -> int:
        """The place of this rank's micro-batch number `micro` in the global batch of a step."""
        return self.rank * self.accumulation_steps + micro

    def step_images(self) -> Int64[np.ndarray, "a n"]:
        """This rank's images in the first step of the next iteration, by micro-batch."""
        plan = itertools.islice(self._plan(), self.accumulation_steps)
        return np.stack([indices for indices, _ in plan])

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Make the next iteration that of `epoch`, from step `start_step` on."""
        self.epoch, self._start_step = epoch, start_step

    def _plan(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        epoch, start_step = self.epoch, self._start_step
        order = epoch_order(self.seed, epoch, len(self.beton))
        if len(self.images) < len(order):
            order = order[np.isin(order, self.images)]
        for step in range(start_step, len(self)):
            for micro in range(self.accumulation_steps):
                first = step * self.global_batch + self.place(micro) * self.batch_size
                indices = order[first : first + self.batch_size]
                yield indices, kernels.sample_keys(self.seed, epoch, indices)

    def _finish(self, batch: Batch) -> tuple[Tensor, ...]:
        self._seen += len(batch.indices)
        for slot in np.flatnonzero(batch.status > kernels.DAMAGED).tolist():
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
        return *batch.tensors, torch.from_numpy(batch.indices.copy())

    def _stop_if_too_many(self) -> None:
        seen = min(self._seen, len(self.images))
        if len(self.corrupt) >= MIN_CORRUPT and len(self.corrupt) > MAX_CORRUPT_SHARE * seen:
            raise UserError(
                f"{self.beton.path}: {len(self.corrupt)} of {seen} images are corrupt (first: "
                f"{next(iter(self.corrupt))}), more than {MAX_CORRUPT_SHARE:.1%}: copy the file "
                "again, or run `ssl-xcit data verify` on it"
            )

    def _substitute(self, batch: Batch, slot: int) -> int:
        """Fill a place of the batch with the first decodable image of a random sequence."""
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


class EvalLoader(_Loader):
    """Batches of evaluation views, each image once over all ranks, in the order of the file.

    Iterating gives (images (n, channels, size, size), labels (n,), indices (n,)) with n =
    batch_size except in the last batch; labels are -1 when the file has none. Rank r has the r-th
    of world_size contiguous parts of `subset`. Options as for `MultiCropLoader`.

    Raises UserError: wrong arguments; on iteration, a corrupt image, because none can replace it.
    """

    def __init__(
        self,
        beton: Beton | str | Path,
        view: EvalView,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        **options: object,
    ) -> None:
        super().__init__(beton, [[view]], batch_size, **options)
        self.view, self.indices = view, rank_share(self.images, rank, world_size)

    def __len__(self) -> int:
        """Batches of this rank."""
        return -(-len(self.indices) // self.batch_size)

    def _plan(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for part in parts_of(self.indices, self.batch_size):
            yield part, np.zeros(len(part), np.uint64)

    def _finish(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        broken = np.flatnonzero(batch.status > kernels.DAMAGED)
        if len(broken):
            reason = REASONS[batch.status[broken[0]]]
            raise UserError(
                f"{self.beton.path}: image {batch.indices[broken[0]]} is corrupt ({reason}): write "
                "the file again, without it"
            )
        labels = labels_at(self.beton.labels, batch.indices)
        return batch.tensors[0][0], labels, torch.from_numpy(batch.indices.copy())
