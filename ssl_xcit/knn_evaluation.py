"""The k-NN evaluation of a checkpoint, of an untrained network, or of the pixels themselves."""

import time
from pathlib import Path

from ssl_xcit import distributed
from ssl_xcit.augment import EvalView
from ssl_xcit.beton import Beton
from ssl_xcit.distributed import Distributed
from ssl_xcit.eval_config import KnnConfig
from ssl_xcit.evaluation_data import check_channels, check_datasets, evaluation_loader, open_images
from ssl_xcit.features import extract_features, extract_pixels
from ssl_xcit.knn import knn_accuracy
from ssl_xcit.loader import IMAGENET_MEAN, IMAGENET_STD
from ssl_xcit.results import describe_images, describe_software, describe_subject, write_result
from ssl_xcit.subject import NO_FACTS, Subject, checkpoint_subject, untrained_subject


def evaluate_knn(config: KnnConfig) -> dict:
    """k-NN accuracy of a checkpoint, of an untrained network or of the pixels, as `config` says.

    Prints a table, and writes what it returns as JSON to `config.out` if that is set: "top1" and
    "top5" in percent by k, and everything that decided them. With torchrun the ranks share the
    images and rank 0 reports. Raises UserError for what the user can mend: images that are missing
    or do not belong together, a checkpoint that is no backbone or for other images, features that
    are not finite.
    """
    ranks = distributed.setup(config.device)
    try:
        result = _evaluate(config, ranks)
    finally:
        distributed.teardown()
    if ranks.rank == 0:
        print(_table(result))
        if config.out:
            write_result(result, config.out)
    return result


def _evaluate(config: KnnConfig, ranks: Distributed) -> dict:
    subject = _subject(config)
    channels = 3 if subject is None else subject.in_chans
    train, test = (open_images(path, channels) for path in (config.train, config.test))
    check_datasets(train, test)
    if subject is not None:
        check_channels(subject.in_chans, train, test)
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if subject is None else (subject.mean, subject.std)
    start = time.perf_counter()
    view = EvalView(config.resize, config.crop, config.interpolation)
    features = []
    for images in (train, test):
        loader = evaluation_loader(
            images,
            view,
            config.batch_size,
            ranks,
            num_threads=config.num_workers,
            mean=mean,
            std=std,
        )
        if subject is None:
            features.append(extract_pixels(loader))
        else:
            backbone, kind = subject.backbone.to(ranks.device), config.features
            found = extract_features(backbone, loader, [kind], ranks.device, config.precision)
            features.append(found[kind])
    extracted = time.perf_counter()
    tensors = [t.to(ranks.device) for part in features for t in (part.features, part.labels)]
    accuracy = knn_accuracy(*tensors, config.k, config.temperature)
    searched = time.perf_counter()
    return {
        **(NO_FACTS | {"source": "pixels"} if subject is None else subject.facts),
        "features": "pixels" if config.pixels else config.features,
        "precision": config.precision,
        "transform": {
            "resize": config.resize,
            "crop": config.crop,
            "interpolation": config.interpolation,
            "mean": None if config.pixels else mean,
            "std": None if config.pixels else std,
        },
        "train": describe_images(train),
        "test": describe_images(test),
        "temperature": config.temperature,
        "voters": {str(k): min(k, train.num_samples) for k in accuracy},
        "top1": {str(k): top1 for k, (top1, _) in accuracy.items()},
        "top5": {str(k): top5 for k, (_, top5) in accuracy.items()},
        "seconds": {
            "features": round(extracted - start, 3),
            "search": round(searched - extracted, 3),
        },
        "device": str(ranks.device),
        "ranks": ranks.world_size,
        "versions": describe_software(),
    }


def _subject(config: KnnConfig) -> Subject | None:
    """The network; None: the pixels themselves."""
    if config.pixels:
        return None
    if config.random_init:
        in_chans = 3 if Path(config.train).is_dir() else Beton(config.train).channels
        return untrained_subject(config.arch, config.seed, in_chans)
    return checkpoint_subject(config.checkpoint, config.arch, config.role)


def _table(result: dict) -> str:
    """The result for the eye."""
    train, test = result["train"], result["test"]
    lines = [
        f"k-NN, features {result['features']}: {describe_subject(result)}",
        f"{test['images']:,} test images, {train['images']:,} training images, "
        f"{train['classes']:,} classes, temperature {result['temperature']}",
        f"{'k':>6}{'top-1 %':>10}{'top-5 %':>10}",
    ]
    for k, voters in result["voters"].items():
        note = "" if voters == int(k) else f"   only {voters} training images: all of them vote"
        lines.append(f"{k:>6}{result['top1'][k]:>10.2f}{result['top5'][k]:>10.2f}{note}")
    return "\n".join(lines)
