"""The two protocols of the linear evaluation; each returns its facts and the selected classifier.

Neither sees the test images.
"""

import time
from collections.abc import Sequence
from contextlib import closing
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
    ranks, subject = extraction.ranks, extraction.subject
    sizes = {kind: material.size(kind) for kind in config.features}
    rates = [schedules.scaled_lr(lr, config.batch_size) for lr in config.lr]
    grid = LinearGrid(sizes, rates, material.num_classes, config.seed, ranks.device)
    loader = MultiCropLoader(
        material.train,
        supervised_views(config.crop, config.scale, "bilinear"),
        extraction.batch_size,
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
    with closing(loader), evaluating(subject.backbone):
        seconds = _train_grid(material, grid, loader)
    rows = [{"features": kind, "lr": lr} for kind in sizes for lr in config.lr]
    for entry, row in enumerate(rows):
        row["diverged"] = not all(part.isfinite().all() for part in grid.classifier(entry))
    if len(material.held_out):
        held_out = extraction.features(material.train, list(sizes), material.held_out.numpy())
        for entry, row in enumerate(rows):
            features, labels, _ = held_out[row["features"]]
            found = accuracy(ranked_classes(*grid.classifier(entry), features), labels)
            row["held_out_top1"], row["held_out_top5"] = (None, None) if row["diverged"] else found
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


def _train_grid(material: Material, grid: LinearGrid, loader: MultiCropLoader) -> float:
    """Train to the end, resuming an earlier attempt; returns the seconds of all attempts."""
    config, folder = material.config, Path(material.config.out) / "checkpoints"
    backbone, ranks = material.extraction.subject.backbone, material.extraction.ranks
    found, skipped = load_latest(folder)
    for line in skipped:
        material.say(f"skipped: {line}")
    done = spent = 0
    if found is not None:
        for name, tensor in grid.state.items():
            tensor.copy_(found.tensors["grid"][name])
        done, spent = found.state["step"], found.state["seconds"]
        material.say(f"resuming {found.path} at step {done}")
    start = saved = time.monotonic()
    losses, since = torch.zeros(len(grid.entries), device=ranks.device), done
    total = config.epochs * len(loader)
    for step in range(done, total):
        epoch, place = divmod(step, len(loader))
        if step == done or place == 0:
            loader.set_epoch(epoch, place)
            batches = iter(loader)
        (images,), indices = next(batches)  # of their only view
        images = images.to(ranks.device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = normalise(images, loader.mean, loader.std)
        labels = labels_at(material.train.labels, indices.numpy()).to(ranks.device)
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
            save_checkpoint(folder, step + 1, {"grid": grid.state}, state)
            saved = time.monotonic()
    return spent + time.monotonic() - start


# The fast protocol


def fit_fast(material: Material) -> tuple[dict, Float[Tensor, "c d"], Float[Tensor, " c"]]:
    """Fit logistic regression to the features of central views, for every strength and kind.

    Strengths go from strong to weak, and each fit starts from the one before. The selected strength
    and kind of features is fitted again to all images, held-out ones included.
    """
    config, ranks, start = material.config, material.extraction.ranks, time.perf_counter()
    features = _training_features(material)
    labels = torch.from_numpy(material.train.labels)
    extracted = time.perf_counter()

    def regression(kind: str, images: Int64[Tensor, " m"]) -> LogisticRegression:
        mine = torch.from_numpy(rank_share(images.numpy(), ranks.rank, ranks.world_size))
        x, y = features[kind][mine], labels[mine]
        return LogisticRegression(x, y, material.num_classes, ranks.device)

    rows, fits = [], []
    for kind in features:
        of_kind, fit = regression(kind, material.fit), None
        for l2 in sorted(config.l2, reverse=True):
            fit = of_kind.fit(l2, config.iterations, start=fit)
            row = {"features": kind, "l2": l2, **_quality(fit, config.iterations)}
            if len(material.held_out):
                ranked = ranked_classes(fit.weight, fit.bias, features[kind][material.held_out])
                found = accuracy(ranked, labels[material.held_out])
                row["held_out_top1"], row["held_out_top5"] = found
            material.say(f"fast: {kind}, l2 {l2:g}: {fit.iterations} iterations")
            rows.append(row)
            fits.append(fit)
    chosen = select(rows)
    selected, fit = rows[chosen], fits[chosen]
    if len(material.held_out):
        of_all = regression(selected["features"], torch.arange(len(labels)))
        fit = of_all.fit(selected["l2"], config.iterations, start=fit)
    facts = {
        "training_images": len(labels),
        "grid": rows,
        "selected": selected,
        "fit": _quality(fit, config.iterations),
        "seconds": {
            "features": round(extracted - start, 3),
            "fits": round(time.perf_counter() - extracted, 3),
        },
    }
    return facts, fit.weight, fit.bias


def _quality(fit: Fit, iterations: int) -> dict:
    done = fit.iterations
    return {"iterations": done, "gradient": fit.gradient, "converged": done < iterations}


def _training_features(material: Material) -> dict[str, Float[Tensor, "n _"]]:
    """Features of the central views of all training images, kept in the output folder."""
    config = material.config
    # A kind that is part of another one is not stored twice
    wholes = {"cls": "cls+patch", "patch": "cls+patch", "inputs1": "inputs2"}
    stored = {k: wholes[k] if wholes.get(k) in config.features else k for k in config.features}
    containers, folder = sorted(set(stored.values())), Path(config.out) / "features"
    found = cached_features(material.extraction, material.train, containers, folder, "train")
    features = {}
    for kind, container in stored.items():
        rows, size = found[container].features, material.size(kind)
        require_finite(rows)
        # In its container, cls is the first part, and every other kind the last
        features[kind] = rows[:, :size] if kind == "cls" else rows[:, -size:]
    return features


# Choosing


def select(rows: Sequence[dict]) -> int:
    """The index of the highest held-out top-1, the first of equals; 0 if nothing was held out.

    Raises UserError if all classifiers have diverged.
    """
    alive = [place for place, row in enumerate(rows) if not row.get("diverged")]
    if not alive:
        raise UserError("every classifier has diverged: add a lower --lr, in a new --out")
    return max(alive, key=lambda place: rows[place].get("held_out_top1", 0.0))
