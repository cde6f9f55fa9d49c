"""k-NN of the teacher while it trains."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from ssl_xcit.augment import EvalView
from ssl_xcit.config import TrainConfig
from ssl_xcit.distributed import Distributed
from ssl_xcit.evaluation_data import check_datasets, evaluation_loader, open_images
from ssl_xcit.features import extract_features
from ssl_xcit.knn import knn_accuracy


class Probe:
    """k-NN of the teacher on a held-out set, in the training process.

    It reads and changes nothing of the training's state.
    """

    def __init__(self, config: TrainConfig, ranks: Distributed) -> None:
        self.config, self.device = config, ranks.device
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
            )
            for images in both
        )

    def __call__(
        self, backbone: nn.Module, wrap: Callable[[Iterable], Iterable] = lambda loader: loader
    ) -> dict[str, float]:
        """{"probe/top1_cls": percent, "probe/top1_patch": percent}; batches come through `wrap`."""
        found = knn_probe(
            backbone,
            wrap(self.train),
            wrap(self.test),
            ("cls", "patch"),
            self.config.probe.probe_k,
            self.device,
            self.config.run.precision,
        )
        return {f"probe/top1_{kind}": top1 for kind, top1 in found.items()}


def knn_probe(
    backbone: nn.Module,
    train_loader: Iterable,
    test_loader: Iterable,
    which: Sequence[str],
    k: int,
    device: torch.device,
    precision: str,
    temperature: float = 0.07,
) -> dict[str, float]:
    """Top-1 in percent of each kind of feature; for a look at a model that goes on training.

    Leaves the model as it was: every module's mode, BatchNorm's buffers, the generators. All ranks
    call it, and each returns the same. Raises UserError as `knn_predictions` does.
    """
    train, test = (
        extract_features(backbone, loader, which, device, precision)
        for loader in (train_loader, test_loader)
    )
    return {
        kind: knn_accuracy(
            train[kind].features.to(device),
            train[kind].labels.to(device),
            test[kind].features.to(device),
            test[kind].labels.to(device),
            (k,),
            temperature,
        )[k][0]
        for kind in which
    }
