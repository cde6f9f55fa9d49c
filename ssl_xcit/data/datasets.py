"""The images of an evaluation, from a .beton file or from a folder, in the same batches.

A folder is read by Pillow and torchvision's own transforms: slower than the loader, but the exact
pixels behind published numbers. (Decoders of JPEGs differ by roundings.)
"""

import hashlib
import io
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ssl_xcit.data.batches import default_threads
from ssl_xcit.data.beton import Beton
from ssl_xcit.data.images import open_source
from ssl_xcit.data.loader import EvalLoader, labels_at, parts_of, rank_share
from ssl_xcit.data.pixels import IMAGENET_MEAN, IMAGENET_STD
from ssl_xcit.data.views import EvalView
from ssl_xcit.runtime.distributed import Distributed
from ssl_xcit.runtime.errors import UserError


class ImageFolder:
    """The images below a folder, with the attributes of a `Beton` that evaluations use.

    Labels are the sorted names of the class folders, see `ssl_xcit.data.images.open_source`. Raises
    UserError when there is no such folder, or no image in it.
    """

    def __init__(self, path: str | Path, channels: int = 3) -> None:
        self.path, self.channels = Path(path), channels
        self._source = open_source(path)
        self.num_samples: int = self._source.size
        self.labels: Int64[np.ndarray, "n"] | None = self._source.labels
        self.class_names: tuple[str, ...] | None = self._source.class_names

    def __len__(self) -> int:
        return self.num_samples

    def fingerprint(self) -> str:
        """SHA-256 of names, sizes, times of modification and labels of all files."""
        labels = [None] * self.num_samples if self.labels is None else self.labels.tolist()
        digest = hashlib.sha256()
        for index, label in enumerate(labels):
            name = self._source.name(index)
            facts = (self.path / name).stat()
            digest.update(f"{name} {facts.st_size} {facts.st_mtime_ns} {label}\n".encode())
        return digest.hexdigest()

    def decode(self, index: int) -> Image.Image:
        """An image as Pillow reads it, RGB, or gray if `channels` is 1.

        Raises UserError that names the file if Pillow cannot read it.
        """
        data = self._source.read(index)
        try:
            with Image.open(io.BytesIO(data)) as image:
                return image.convert("RGB" if self.channels == 3 else "L")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            name = self.path / self._source.name(index)
            unknown = isinstance(error, UnidentifiedImageError)
            reason = "no format that Pillow knows" if unknown else error
            raise UserError(f"{name}: {reason}: mend the image, or remove it") from error


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
        pixels = np.asarray(self._transform(self.images.decode(index)))
        return np.atleast_3d(pixels).transpose(2, 0, 1)


Images = Beton | ImageFolder


def open_images(path: str | Path, channels: int = 3) -> Images:
    """The images at `path`: a folder's, else those of a .beton file.

    `channels`: 3 (RGB) or 1 (gray), for a folder; a file has its own. Raises UserError as
    `ImageFolder` and `Beton` do.
    """
    return ImageFolder(path, channels) if Path(path).is_dir() else Beton(path)


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


def check_datasets(train: Images, test: Images) -> None:
    """Raise UserError unless both are labelled and their labels mean the same classes."""
    for images in (train, test):
        if images.labels is None:
            raise UserError(
                f"{images.path} has no labels, which this evaluation needs in both: take a folder "
                "with one folder per class, or a file written from one"
            )
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
