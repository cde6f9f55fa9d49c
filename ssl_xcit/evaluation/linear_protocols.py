"""The two protocols of the linear evaluation; each returns its facts and the selected classifier.

Neither sees the test images.
"""

import contextlib
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ssl_xcit.checkpoints.folder import load_latest, save_checkpoint
from ssl_xcit.data.datasets import Images
from ssl_xcit.data.loader import MultiCropLoader, labels_at, rank_share
from ssl_xcit.data.pixels import normalise
from ssl_xcit.data.views import supervised_views
from ssl_xcit.evaluation.accuracy import accuracy
from ssl_xcit.evaluation.cache import cached_features
from ssl_xcit.evaluation.config import LinearConfig
from ssl_xcit.evaluation.features import FEATURES, Extraction, embed, evaluating, require_finite
from ssl_xcit.evaluation.linear_classifiers import (
    Fit,
    LinearGrid,
    LogisticRegression,
    ranked_classes,
)
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.training import schedules


class Material(NamedTuple):
    """What both protocols start from."""

    config: LinearConfig
    extraction: Extraction
    train: Images
    num_classes: int
    fit: Int64[Tensor, " n"]
    held_out: Int64[Tensor, " m"]

    def size(self, kind: str) -> int:
        """Length of a kind of feature."""
        return FEATURES[kind] * self.extraction.subject.backbone.embed_dim

    def say(self, text: str) -> None:
        """Print a line, once over all ranks."""
        if self.extraction.ranks.rank == 0:
            print(text, flush=True)


# The official protocol


def train_official(material: Material) -> tuple[dict, Float[Tensor, "c d"], Float[Tensor, " c"]]:
    """Train on random views, for all learning rates and kinds of features at once.

    This is DINO's eval_linear.py with other choices: several learning rates are tried, and the best
    is chosen on held-out training images, not on the test set, after the last epoch, not after the
    best one. An epoch leaves out the images beyond its last full batch.
    """
    config, extraction = material.config, material.extraction
    sizes = {kind: material.size(kind) for kind in config.features}
    rates = [schedules.scaled_lr(lr, config.batch_size) for lr in config.lr]
    device = extraction.ranks.device
    grid = LinearGrid(sizes, rates, material.num_classes, config.seed, device)
    with (
        contextlib.closing(_training_loader(material)) as loader,
        evaluating(extraction.subject.backbone),
    ):
        seconds = _train_grid(material, grid, loader)
    rows = [{"features": kind, "lr": lr} for kind in sizes for lr in config.lr]
    for entry, row in enumerate(rows):
        row["diverged"] = not all(part.isfinite().all() for part in grid.classifier(entry))
    if len(material.held_out):
        held_out = extraction.features(material.train, list(sizes), material.held_out.numpy())
        ranked = grid.ranked({kind: features.features for kind, features in held_out.items()})
        for row, classes in zip(rows, ranked, strict=True):
            _note_held_out(row, classes, held_out[row["features"]].labels)
    chosen = select(rows)
    facts = {
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "training_images": len(material.fit),
        "random_crop": [*config.scale, "bilinear"],
        "grid": rows,
        "selected": rows[chosen],
        "seconds": round(seconds, 3),
    }
    return facts, *grid.classifier(chosen)


def _training_loader(material: Material) -> MultiCropLoader:
    config, ranks, subject = material.config, material.extraction.ranks, material.extraction.subject
    return MultiCropLoader(
        material.train,
        supervised_views(config.crop, config.scale, "bilinear"),
        material.extraction.batch_size,
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        num_threads=config.num_workers,
        # As in training: bytes are less traffic to a GPU; on a CPU the loader normalises for less.
        dtype=torch.float32 if ranks.device.type == "cpu" else torch.uint8,
        mean=subject.mean,
        std=subject.std,
        subset=material.fit.numpy(),
    )


def _train_grid(material: Material, grid: LinearGrid, loader: MultiCropLoader) -> float:
    """Train to the end, resuming an earlier attempt; returns the seconds of all attempts."""
    config, folder = material.config, Path(material.config.out) / "checkpoints"
    backbone, ranks = material.extraction.subject.backbone, material.extraction.ranks
    found, skipped = load_latest(folder)
    for line in skipped:
        material.say(f"skipped: {line}")
    done = spent = 0
    if found is not None:
        grid.load_state_dict(found.tensors["grid"])
        done, spent = found.state["step"], found.state["seconds"]
        material.say(f"resuming {found.path} at step {done}")
    start = saved = time.monotonic()
    losses = torch.zeros(len(grid.entries), device=ranks.device)
    since = done
    total = config.epochs * len(loader)
    for step in range(done, total):
        epoch, place = divmod(step, len(loader))
        if step == done or place == 0:
            loader.set_epoch(epoch, place)
            batches = iter(loader)
        images, labels = _to_device(material, *next(batches))
        with torch.no_grad():
            features = embed(backbone, images, config.features, config.precision)
        if step == done:
            for rows in features.values():
                require_finite(rows)
        losses += grid.step(features, labels, schedules.cosine(epoch, 1.0, 0.0, config.epochs))
        ends, now = place + 1 == len(loader), time.monotonic()
        if ends:
            best = (losses / (step + 1 - since)).nan_to_num(torch.inf).min().item()
            left = (now - start) / (step + 1 - done) * (total - step - 1)
            material.say(
                f"official: epoch {epoch + 1}/{config.epochs}  lowest loss {best:.4f}  "
                f"ETA {timedelta(seconds=round(left))}"
            )
            losses.zero_()
            since = step + 1
        if ranks.rank == 0 and (ends or now - saved > 60 * config.save_every):
            state = {"seconds": spent + now - start}
            save_checkpoint(folder, step + 1, {"grid": grid.state_dict()}, state)
            saved = time.monotonic()
    return spent + time.monotonic() - start


def _to_device(material: Material, views: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(images (b, c, h, w), normalised, labels (b,))"""
    device, subject = material.extraction.ranks.device, material.extraction.subject
    images = views[0].to(device, non_blocking=True)
    if images.dtype == torch.uint8:
        images = normalise(images, subject.mean, subject.std)
    return images, labels_at(material.train.labels, indices.numpy()).to(device)


# The fast protocol


def fit_fast(material: Material) -> tuple[dict, Float[Tensor, "c d"], Float[Tensor, " c"]]:
    """Fit logistic regression to the features of central views, for every strength and kind.

    Strengths go from strong to weak, and each fit starts from the one before. The selected strength
    and kind of features is fitted again to all images, held-out ones included.
    """
    config, start = material.config, time.perf_counter()
    features = _training_features(material)
    labels = torch.from_numpy(material.train.labels)
    extracted = time.perf_counter()
    rows, fits = [], []
    for kind, rows_of_kind in features.items():
        regression = _regression(material, rows_of_kind, labels, material.fit)
        fit = None
        for l2 in sorted(config.l2, reverse=True):
            fit = regression.fit(l2, config.iterations, start=fit)
            row = {"features": kind, "l2": l2, **_quality(fit, config.iterations)}
            if len(material.held_out):
                ranked = ranked_classes(fit.weight, fit.bias, rows_of_kind[material.held_out])
                _note_held_out(row, ranked, labels[material.held_out])
            material.say(f"fast: {kind}, l2 {l2:g}: {fit.iterations} iterations")
            rows.append(row)
            fits.append(fit)
    chosen = select(rows)
    fit: Fit = fits[chosen]
    if len(material.held_out):
        everything = torch.arange(len(labels))
        regression = _regression(material, features[rows[chosen]["features"]], labels, everything)
        fit = regression.fit(rows[chosen]["l2"], config.iterations, start=fit)
    facts = {
        "training_images": len(labels),
        "grid": rows,
        "selected": rows[chosen],
        "fit": _quality(fit, config.iterations),
        "seconds": {
            "features": round(extracted - start, 3),
            "fits": round(time.perf_counter() - extracted, 3),
        },
    }
    return facts, fit.weight, fit.bias


def _quality(fit: Fit, iterations: int) -> dict:
    """How well a fit went."""
    return {
        "iterations": fit.iterations,
        "gradient": fit.gradient,
        "converged": fit.iterations < iterations,
    }


def _training_features(material: Material) -> dict[str, Float[Tensor, "n _"]]:
    """Features of the central views of all training images, kept in the output folder."""
    config = material.config
    stored = {kind: _container(kind, config.features) for kind in config.features}
    containers, folder = sorted(set(stored.values())), Path(config.out) / "features"
    found = cached_features(material.extraction, material.train, containers, folder, "train")
    features = {}
    for kind, container in stored.items():
        rows, size = found[container].features, material.size(kind)
        require_finite(rows)
        # In its container, cls is the first part, and every other kind the last
        features[kind] = rows[:, :size] if kind == "cls" else rows[:, -size:]
    return features


def _container(kind: str, kinds: Sequence[str]) -> str:
    """The kind of feature to store for `kind`, so that nothing is stored twice."""
    if kind in ("cls", "patch") and "cls+patch" in kinds:
        return "cls+patch"
    return "inputs2" if kind == "inputs1" and "inputs2" in kinds else kind


def _regression(
    material: Material,
    features: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    images: Int64[Tensor, " m"],
) -> LogisticRegression:
    """Of this rank's share of `images`."""
    ranks = material.extraction.ranks
    mine = torch.from_numpy(rank_share(images.numpy(), ranks.rank, ranks.world_size))
    return LogisticRegression(features[mine], labels[mine], material.num_classes, ranks.device)


# Choosing


def _note_held_out(row: dict, ranked: Int64[Tensor, "m top"], labels: Int64[Tensor, " m"]) -> None:
    if row.get("diverged"):
        row["held_out_top1"] = row["held_out_top5"] = None
    else:
        row["held_out_top1"], row["held_out_top5"] = accuracy(ranked, labels)


def select(rows: Sequence[dict]) -> int:
    """The index of the highest held-out top-1, the first of equals; 0 if nothing was held out.

    Raises UserError if all classifiers have diverged.
    """
    alive = [place for place, row in enumerate(rows) if not row.get("diverged")]
    if not alive:
        raise UserError("every classifier has diverged: add a lower --lr, in a new --out")
    return max(alive, key=lambda place: rows[place].get("held_out_top1", 0.0))
