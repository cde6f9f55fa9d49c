"""The k-NN evaluation of a checkpoint, of an untrained network, or of the pixels themselves."""

import time
from pathlib import Path

import torch

from ssl_xcit.data.beton import Beton
from ssl_xcit.data.datasets import check_channels, check_datasets, open_images
from ssl_xcit.data.loader import rank_share
from ssl_xcit.data.views import EvalView
from ssl_xcit.evaluation.cache import (
    any_file,
    cached_features,
    load_facts,
    load_features,
    save_facts,
)
from ssl_xcit.evaluation.config import KnnConfig
from ssl_xcit.evaluation.features import Features
from ssl_xcit.evaluation.knn import accuracy, find_neighbours
from ssl_xcit.evaluation.results import (
    describe_images,
    describe_software,
    describe_subject,
    write_result,
)
from ssl_xcit.evaluation.subject import NO_FACTS, Subject, checkpoint_subject, untrained_subject
from ssl_xcit.runtime import distributed
from ssl_xcit.runtime.distributed import Distributed
from ssl_xcit.runtime.precision import settled
from ssl_xcit.training.run_folder import stored_precision


def evaluate_knn(config: KnnConfig) -> dict:
    """k-NN accuracy of a checkpoint, of an untrained network or of the pixels, as `config` says.

    Prints a table, and writes what it returns as JSON to `config.out` if that is set: "accuracy"
    has a row for each kind of features, temperature and k, "top1" and "top5" in percent; the rest
    is everything that decided them. With torchrun the ranks share the images and the search, and
    rank 0 reports.

    Raises UserError for what the user can mend: images that are missing or do not belong together,
    a checkpoint that is no backbone or for other images, features that are not finite.
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
    start = time.perf_counter()
    if config.load_features:
        folder = Path(config.load_features)
        facts = load_facts(folder)
        train, test = (load_features(folder, name) for name in ("train", "test"))
    else:
        train, test, facts = _extract(config, ranks)
    extracted = time.perf_counter()
    kinds = facts["features"]
    rows = [row for kind in kinds for row in _search(kind, train[kind], test[kind], config, ranks)]
    searched = time.perf_counter()
    return {
        **facts,
        "accuracy": rows,
        "seconds": {
            "features": round(extracted - start, 3),
            "search": round(searched - extracted, 3),
        },
        "device": str(ranks.device),
        "ranks": ranks.world_size,
        "versions": describe_software(),
    }


def _search(
    kind: str, train: Features, test: Features, config: KnnConfig, ranks: Distributed
) -> list[dict]:
    """The rows of one kind of features."""
    mine = torch.from_numpy(rank_share(test.indices.numpy(), ranks.rank, ranks.world_size))
    parts = (train.features, train.labels, test.features[mine])
    neighbours = find_neighbours(*(part.to(ranks.device) for part in parts), max(config.k))
    rows = []
    for temperature in config.temperature:
        for k in config.k:
            ranked = distributed.gather_variable(neighbours.votes(k, temperature).cpu())
            top1, top5 = accuracy(ranked, test.labels)
            voters = min(k, len(train.labels))
            row = {"features": kind, "k": k, "temperature": temperature, "voters": voters}
            rows.append(row | {"top1": top1, "top5": top5})
    return rows


def _extract(
    config: KnnConfig, ranks: Distributed
) -> tuple[dict[str, Features], dict[str, Features], dict]:
    """Features of each kind of both datasets, and the facts about them."""
    folder = Path(config.save_features) if config.save_features else None
    config = settled(config, ranks, stored_precision(folder and any_file(folder)))
    subject = _subject(config)
    channels = 3 if subject is None else subject.in_chans
    datasets = {name: open_images(getattr(config, name), channels) for name in ("train", "test")}
    check_datasets(**datasets)
    if subject is not None:
        check_channels(subject.in_chans, *datasets.values())
    kinds = ["pixels"] if subject is None else list(config.features)
    facts = {
        **(NO_FACTS | {"source": "pixels"} if subject is None else subject.facts),
        "features": kinds,
        "precision": config.precision,
        "transform": {
            "resize": config.resize,
            "crop": config.crop,
            "interpolation": config.interpolation,
            "mean": None if subject is None else subject.mean,
            "std": None if subject is None else subject.std,
        },
        **{name: describe_images(images) for name, images in datasets.items()},
    }
    train, test = (
        cached_features(
            subject,
            images,
            EvalView(config.resize, config.crop, config.interpolation),
            kinds,
            ranks,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            precision=config.precision,
            folder=folder,
            name=name,
        )
        for name, images in datasets.items()
    )
    if folder is not None and ranks.rank == 0:
        save_facts(folder, facts)
    return train, test, facts


def _subject(config: KnnConfig) -> Subject | None:
    """The network; None: the pixels themselves."""
    if config.pixels:
        return None
    if config.random_init:
        in_chans = 3 if Path(config.train).is_dir() else Beton(config.train).channels
        return untrained_subject(config.arch, config.seed, in_chans)
    return checkpoint_subject(config.checkpoint, config.arch, config.role)


def _table(result: dict) -> str:
    """The result as a table."""
    train, test = result["train"], result["test"]
    lines = [
        f"k-NN: {describe_subject(result)}",
        f"{test['images']:,} test images, {train['images']:,} training images, "
        f"{train['classes']:,} classes",
        f"{'features':>10}{'k':>6}{'T':>8}{'top-1 %':>10}{'top-5 %':>10}",
    ]
    for row in result["accuracy"]:
        few = row["voters"] < row["k"]
        note = f"   only {row['voters']} training images: all of them vote" if few else ""
        lines.append(
            f"{row['features']:>10}{row['k']:>6}{row['temperature']:>8g}"
            f"{row['top1']:>10.2f}{row['top5']:>10.2f}{note}"
        )
    return "\n".join(lines)
