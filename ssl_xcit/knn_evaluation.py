"""The k-NN evaluation of a checkpoint, of an untrained network, or of the pixels themselves."""

import importlib.metadata
import json
import platform
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ssl_xcit import distributed
from ssl_xcit.augment import EvalView
from ssl_xcit.beton import Beton
from ssl_xcit.checkpoint import read_backbone
from ssl_xcit.config import KnnConfig, TrainConfig, read_config
from ssl_xcit.distributed import Distributed
from ssl_xcit.errors import UserError
from ssl_xcit.features import extract_features, extract_pixels
from ssl_xcit.knn import knn_accuracy
from ssl_xcit.loader import IMAGENET_MEAN, IMAGENET_STD, EvalLoader
from ssl_xcit.xcit import build_xcit


def check_datasets(train: Beton, test: Beton) -> None:
    """Raises UserError unless both files are labelled and their labels mean the same classes."""
    for beton in (train, test):
        if beton.labels is None:
            raise UserError(
                f"{beton.path} has no labels: k-NN needs them in both files; write it from a "
                "folder with one folder per class"
            )
    if train.class_names and test.class_names and train.class_names != test.class_names:
        odd = sorted(set(train.class_names) ^ set(test.class_names)) or ["only their order"]
        raise UserError(
            f"{test.path} has other classes than {train.path} ({len(test.class_names)} and "
            f"{len(train.class_names)}; different: {', '.join(odd[:5])}), so equal labels mean "
            "different things: write both from folders with the same class names"
        )
    unseen = sorted(set(test.labels.tolist()) - set(train.labels.tolist()))
    if unseen:
        raise UserError(
            f"{test.path} has {len(unseen)} classes that {train.path} has no image of (labels "
            f"{', '.join(map(str, unseen[:5]))}): they could never be right; take files of the "
            "same classes"
        )


def evaluate_knn(config: KnnConfig) -> dict:
    """k-NN accuracy of a checkpoint, of an untrained network or of the pixels, as `config` says.

    Prints a table, and writes what it returns as JSON to `config.out` if that is set: "top1" and
    "top5" in percent by k, and everything that decided them. With torchrun the ranks share the
    images and rank 0 reports. Raises UserError for what the user can mend: files that are missing
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
            _write(result, Path(config.out))
    return result


class Subject(NamedTuple):
    """What is evaluated: a backbone (None: the pixels), its statistics, and where it is from."""

    backbone: nn.Module | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    facts: dict[str, str | int | None]


def _evaluate(config: KnnConfig, ranks: Distributed) -> dict:
    train, test = Beton(config.train), Beton(config.test)
    check_datasets(train, test)
    subject = _subject(config, train)
    start = time.perf_counter()
    view = EvalView(config.resize, config.crop, config.interpolation)
    features = []
    for beton in (train, test):
        loader = EvalLoader(
            beton,
            view,
            config.batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            num_threads=config.num_workers,
            mean=subject.mean,
            std=subject.std,
        )
        if subject.backbone is None:
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
        **subject.facts,
        "features": "pixels" if config.pixels else config.features,
        "precision": config.precision,
        "transform": {
            "resize": config.resize,
            "crop": config.crop,
            "interpolation": config.interpolation,
            "mean": None if config.pixels else subject.mean,
            "std": None if config.pixels else subject.std,
        },
        "train": _describe(train),
        "test": _describe(test),
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
        "versions": {
            "ssl_xcit": importlib.metadata.version("ssl_xcit"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _subject(config: KnnConfig, beton: Beton) -> Subject:
    facts = dict.fromkeys(("checkpoint", "step", "role", "arch", "seed"))
    if config.pixels:
        return Subject(None, IMAGENET_MEAN, IMAGENET_STD, {"source": "pixels", **facts})
    if config.random_init:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            backbone = build_xcit(config.arch, num_classes=0, in_chans=beton.channels)
        facts |= {"arch": config.arch, "seed": config.seed}
        return Subject(backbone, IMAGENET_MEAN, IMAGENET_STD, {"source": "random_init", **facts})
    arch, state, info = read_backbone(config.checkpoint, config.role)
    if config.arch not in ("", arch):
        raise UserError(f"{info['path']} is a {arch}, not a {config.arch}: leave --arch out")
    in_chans = state["patch_embed.proj.0.0.weight"].shape[1]
    if in_chans != beton.channels:
        raise UserError(
            f"{info['path']} takes images of {in_chans} channels, {beton.path} has "
            f"{beton.channels}: write it again with --channels {in_chans}"
        )
    backbone = build_xcit(arch, num_classes=0, in_chans=in_chans)
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:  # torch's word for missing, unknown and misshapen keys
        odd = sorted(set(state) ^ set(backbone.state_dict())) or ["only shapes"]
        raise UserError(
            f"{info['path']} does not hold the official keys of {arch}; {len(odd)} differ: "
            f"{', '.join(odd[:3])}"
        ) from error
    mean, std = _statistics(info)
    facts |= {"checkpoint": info["path"], "step": info["step"], "role": info["role"], "arch": arch}
    return Subject(backbone, mean, std, {"source": "checkpoint", **facts})


def _statistics(info: dict) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that the network was trained with: its run's, or ImageNet's."""
    described = Path(info["path"]).absolute().parent.parent / "config.yaml"
    if info["step"] is None or not described.exists():  # a file, or a checkpoint without its run
        return IMAGENET_MEAN, IMAGENET_STD
    crops = read_config(TrainConfig, described).crops
    return crops.mean, crops.std


def _describe(beton: Beton) -> dict:
    return {
        "path": str(beton.path.absolute()),
        "images": beton.num_samples,
        "classes": len(set(beton.labels.tolist())),
    }


def _table(result: dict) -> str:
    """The result for the eye."""
    subject = {
        "checkpoint": "{arch}, {role} of {checkpoint}",
        "random_init": "{arch}, untrained (seed {seed})",
        "pixels": "no network",
    }[result["source"]].format(**result)
    train, test = result["train"], result["test"]
    lines = [
        f"k-NN, features {result['features']}: {subject}",
        f"{test['images']:,} test images, {train['images']:,} training images, "
        f"{train['classes']:,} classes, temperature {result['temperature']}",
        f"{'k':>6}{'top-1 %':>10}{'top-5 %':>10}",
    ]
    for k, voters in result["voters"].items():
        note = "" if voters == int(k) else f"   only {voters} training images: all of them vote"
        lines.append(f"{k:>6}{result['top1'][k]:>10.2f}{result['top5'][k]:>10.2f}{note}")
    return "\n".join(lines)


def _write(result: dict, path: Path) -> None:
    """JSON, complete or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --out") from error
