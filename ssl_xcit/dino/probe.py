"""k-NN accuracy of the teacher during training, and the effective rank of its features."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from jaxtyping import Int64
from torch import nn

from ssl_xcit.data.datasets import check_datasets, evaluation_loader, open_images
from ssl_xcit.data.views import EvalView
from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.dino.health import rankme
from ssl_xcit.evaluation.features import extract_features
from ssl_xcit.evaluation.knn import knn
from ssl_xcit.runtime.distributed import Distributed

KINDS = ("cls", "patch")


class Probe:
    """k-NN evaluation of the teacher on a held-out set, within the training process.

    It does not change the training state. It uses at most `probe_limit` images of each set, always
    the same ones.
    """

    def __init__(self, config: TrainConfig, ranks: Distributed) -> None:
        self.config, self.ranks = config, ranks
        sources = (config.probe.probe_train, config.probe.probe_test)
        both = [open_images(path, config.model.in_chans) for path in sources]
        check_datasets(*both)
        view = EvalView(config.probe.probe_resize, config.probe.probe_crop)
        self.train, self.test = (
            evaluation_loader(
                images,
                view,
                128,
                ranks,
                num_threads=config.run.num_workers,
                dtype=torch.float32 if ranks.device.type == "cpu" else torch.uint8,
                mean=config.crops.mean,
                std=config.crops.std,
                subset=some_images(len(images), config.probe.probe_limit, config.seed),
            )
            for images in both
        )

    def __call__(
        self, backbone: nn.Module, wrap: Callable[[Iterable], Iterable] = lambda loader: loader
    ) -> dict[str, float]:
        """Return the numbers for the log; `wrap` wraps the loaders. All ranks must call it.

        probe/top1_cls, probe/top1_patch: top-1 in percent with each kind of feature. health/rankme:
        the effective rank of the training images' cls tokens. health/rankme_share: the same,
        relative to its maximum min(images, dimensions).
        """
        precision, device = self.config.run.precision, self.ranks.device
        train, test = (
            extract_features(backbone, wrap(loader), KINDS, device, precision)
            for loader in (self.train, self.test)
        )
        k, found = self.config.probe.probe_k, {}
        for kind in KINDS:
            (row,) = knn(train[kind], test[kind], (k,), (0.07,), self.ranks)
            found[f"probe/top1_{kind}"] = row["top1"]
        features = train["cls"].features.to(device)
        rank = rankme(features).item()
        return found | {"health/rankme": rank, "health/rankme_share": rank / min(features.shape)}


def some_images(size: int, limit: int, seed: int) -> Int64[np.ndarray, " n"]:
    """`limit` sorted indices drawn from range(size) with `seed`; all of them if `limit` is 0."""
    if limit == 0 or limit >= size:
        return np.arange(size)
    return np.sort(np.random.default_rng(seed).choice(size, limit, replace=False))
