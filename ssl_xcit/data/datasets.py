"""The images of an evaluation, from a .beton file or from a folder, in the same batches.

A folder is read by Pillow and torchvision's own transforms: slower than the loader, but the exact
pixels behind published numbers. (Decoders of JPEGs differ by roundings.) All else that a file may
hold, such as 16 bits, becomes the pixels that `ssl_xcit.data.writer` stores.
"""

import hashlib
import itertools
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Int64, UInt8
from torch import Tensor

from ssl_xcit.data.batches import default_threads
from ssl_xcit.data.beton import Beton
from ssl_xcit.data.images import BrokenImageError, by_pillow, decode, guarded
from ssl_xcit.data.loader import EvalLoader, labels_at, parts_of, rank_share
from ssl_xcit.data.pixels import IMAGENET_MEAN, IMAGENET_STD
from ssl_xcit.data.sources import open_source
from ssl_xcit.data.views import EvalView
from ssl_xcit.runtime.distributed import Distributed
from ssl_xcit.runtime.errors import UserError


class ImageFolder:
    """The images below a folder, with the attributes of a `Beton` that evaluations use.

    Labels are the sorted names of the class folders, see `ssl_xcit.data.sources.open_source`, which
    says what is refused by UserError. `left_out`: how many files are no images, by their kinds.
    """

    def __init__(self, path: str | Path, channels: int = 3) -> None:
        self.path, self.channels = Path(path), channels
        self._source = open_source(path)
        self.num_samples: int = self._source.size
        self.labels: Int64[np.ndarray, "n"] | None = self._source.labels
        self.class_names: tuple[str, ...] | None = self._source.class_names
        self.unlabelled, self.left_out = self._source.unlabelled, self._source.left_out

    def __len__(self) -> int:
        return self.num_samples

    def fingerprint(self) -> str:
        """SHA-256 of names, sizes, times of modification and labels of all files.

        Raises UserError that names a file which is not there.
        """
        labels = [None] * self.num_samples if self.labels is None else self.labels.tolist()
        digest = hashlib.sha256()
        for index, label in enumerate(labels):
            name = self._source.name(index)
            with self._naming(index), guarded():
                facts = (self.path / name).stat()
            digest.update(f"{name} {facts.st_size} {facts.st_mtime_ns} {label}\n".encode())
        return digest.hexdigest()

    def decode(self, index: int) -> UInt8[np.ndarray, "h w c"]:
        """Pixels of an image, as a .beton written with mode raw holds them.

        Raises UserError that names the file if it cannot be read.
        """
        with self._naming(index), guarded():
            return decode(self._source.read(index), self.channels)

    @contextmanager
    def _naming(self, index: int) -> Iterator[None]:
        try:
            yield
        except BrokenImageError as error:
            name = self.path / self._source.name(index)
            raise UserError(f"{name}: {error}: mend the image, or remove it") from error


class FolderLoader:
    """Batches of evaluation views of an `ImageFolder`, as `EvalLoader` gives them, bytes only.

    The views are torchvision's Resize and CenterCrop of Pillow's images.
    """

    def __init__(
        self,
        images: ImageFolder,
        view: EvalView,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        num_threads: int = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        subset: Int64[np.ndarray, "n"] | None = None,
    ) -> None:
        from torchvision import transforms as T  # takes seconds to import; .beton files need none

        self.images, self.view, self.batch_size = images, view, batch_size
        self.mean, self.std = tuple(mean), tuple(std)
        subset = np.arange(len(images)) if subset is None else subset
        self.indices = rank_share(subset, rank, world_size)
        self.num_threads = num_threads or default_threads()
        filter_ = T.InterpolationMode(view.interpolation)
        if view.crop is None:
            self._transform = T.Resize((view.resize, view.resize), filter_)
        else:
            resize = T.Resize(view.resize, filter_)
            self._transform = T.Compose([resize, T.CenterCrop(view.crop)])

    def __len__(self) -> int:
        """Batches of this rank."""
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        parts = parts_of(self.indices, self.batch_size)
        with ThreadPoolExecutor(self.num_threads, thread_name_prefix="folder") as pool:
            orders = ([pool.submit(self._read, i) for i in part.tolist()] for part in parts)
            pending: deque[list[Future]] = deque(itertools.islice(orders, 2))
            try:
                for part in parts:
                    images = torch.from_numpy(np.stack([f.result() for f in pending.popleft()]))
                    pending.extend(itertools.islice(orders, 1))
                    yield images, labels_at(self.images.labels, part), torch.from_numpy(part)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, index: int) -> UInt8[np.ndarray, "c size size"]:
        return by_pillow(self.images.decode(index), self._transform).transpose(2, 0, 1)


Images = Beton | ImageFolder


def open_images(path: str | Path, channels: int = 3) -> Images:
    """The images at `path`: a folder's, else those of a .beton file.

    `channels`: 3 (RGB), 1 (gray) or those of .npy files, for a folder; a file has its own. Says on
    stderr, once over all ranks, which files of a folder are left out. Raises UserError as
    `ImageFolder` and `Beton` do.
    """
    if not Path(path).is_dir():
        return Beton(path)
    images = ImageFolder(path, channels)
    if images.left_out and not (dist.is_initialized() and dist.get_rank()):
        print(f"{path}: left out {images.left_out}", file=sys.stderr)
    return images


def evaluation_loader(
    images: Images, view: EvalView, batch_size: int, ranks: Distributed, **options: object
) -> EvalLoader | FolderLoader:
    """Batches (images, labels, indices) of this rank's share of `images`, each image once.

    The options are those of `EvalLoader`. A folder's batches are bytes whatever `dtype` says;
    `extract_features` normalises them.
    """
    options |= {"rank": ranks.rank, "world_size": ranks.world_size}
    if isinstance(images, ImageFolder):
        options.pop("dtype", None)
        return FolderLoader(images, view, batch_size, **options)
    return EvalLoader(images, view, batch_size, **options)


def require_labels(images: Images) -> None:
    """Raise UserError that says why, unless the images are labelled."""
    if images.labels is None:
        reason = f" ({images.unlabelled})" if images.unlabelled else ""
        raise UserError(
            f"{images.path} has no labels{reason}, which this evaluation needs: take a folder with "
            "one folder per class, or a file written from one"
        )


def check_datasets(train: Images, test: Images) -> None:
    """Raise UserError unless both are labelled and their labels mean the same classes."""
    require_labels(train)
    require_labels(test)
    if train.class_names and test.class_names and train.class_names != test.class_names:
        odd = sorted(set(train.class_names) ^ set(test.class_names)) or ["only their order"]
        raise UserError(
            f"{test.path} has other classes than {train.path} ({len(test.class_names)} and "
            f"{len(train.class_names)}; different: {', '.join(odd[:5])}), so equal labels mean "
            "different things: take both from folders with the same class names"
        )
    unseen = sorted(set(test.labels.tolist()) - set(train.labels.tolist()))
    if unseen:
        raise UserError(
            f"{test.path} has {len(unseen)} classes that {train.path} has no image of (labels "
            f"{', '.join(map(str, unseen[:5]))}): they could never be right; take files of the "
            "same classes"
        )


def check_channels(in_chans: int, *datasets: Images) -> None:
    """Raise UserError unless the images of all `datasets` have `in_chans` channels."""
    for images in datasets:
        if images.channels != in_chans:
            raise UserError(
                f"the network takes images of {in_chans} channels, {images.path} has "
                f"{images.channels}: write it again with --channels {in_chans}"
            )
