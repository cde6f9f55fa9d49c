"""Accuracy of supervised checkpoints with their own classifiers, beside the published one.

The published accuracies were measured on the same 50,000 validation images with the same weights,
so a complete measurement differs from them by preprocessing, decoder and arithmetic alone: by a few
images. The interval tells how far a measurement on part of the images can be from the whole.
"""

import hashlib
import json
import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from tqdm import tqdm

from ssl_xcit.checkpoints.read import Weights, read
from ssl_xcit.checkpoints.zoo import ZooModel, by_file_name, by_hash, zoo
from ssl_xcit.data.datasets import Images, check_channels, evaluation_loader, open_images
from ssl_xcit.data.pixels import normalise
from ssl_xcit.data.views import EvalView
from ssl_xcit.evaluation.class_order import ClassOrder, class_order
from ssl_xcit.evaluation.config import SupervisedConfig
from ssl_xcit.evaluation.results import describe_images, describe_software, write_result
from ssl_xcit.evaluation.supervised_tables import (
    compare_zoo,
    result_text,
    results_markdown,
    zoo_text,
)
from ssl_xcit.runtime import distributed
from ssl_xcit.runtime.distributed import Distributed
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.runtime.files import write_text
from ssl_xcit.runtime.precision import autocast, settled
from ssl_xcit.training.run_folder import stored_precision

FILES = {".pth", ".pt", ".bin", ".safetensors"}
Z95 = 1.959963984540054  # 97.5 % of the normal distribution lie below


def evaluate_supervised(config: SupervisedConfig) -> dict:
    """What `config` asks for: the table of published models, one evaluation, or a folder's.

    Prints it, an evaluation as one JSON line too, and writes what it returns to `config.out`. With
    torchrun the ranks share the images, and rank 0 reports.

    Raises UserError for a file that is no such model, images whose classes are not the
    classifier's, and, at the end, a folder with files that could not be evaluated.
    """
    if config.list:
        table = compare_zoo()
        print(zoo_text(table))
        if config.out:
            write_result(table, config.out)
        return table
    ranks = distributed.setup(config.device)
    try:
        if config.all:
            return _evaluate_folder(config, ranks)
        config = settled(config, ranks)
        path = Path(config.checkpoint)
        candidate = _read(config, path, _sha256(path) if path.is_file() else None)
        result = _evaluate(candidate, config, ranks)
    finally:
        distributed.teardown()
    if ranks.rank == 0:
        print(result_text(result))
        print(json.dumps(result))
        if config.out:
            write_result(result, config.out)
    return result


class NotFiniteError(UserError):
    """The network's answers are no numbers: a fault of its weights, not of the images."""


class Candidate(NamedTuple):
    """A checkpoint that has been read, and all that decides how it is evaluated."""

    weights: Weights
    model: ZooModel | None
    sha256: str | None  # of a file
    resolution: int
    view: EvalView
    images: Images
    order: ClassOrder
    warnings: list[str]


def evaluation_view(resolution: int, preprocess: str) -> EvalView:
    """How an image becomes a square of `resolution` pixels, always bicubic.

    mmpretrain: at 224 the central crop of short side 256, at 384 a square whatever the image's
    shape (its configs/xcit); full-crop: the central crop of the whole short side (XCiT's
    --full_crop; timm, crop_pct 1). Raises UserError for a resolution without a definition.
    """
    if preprocess == "full-crop":
        return EvalView(resolution, resolution)
    known = {224: EvalView(256, 224), 384: EvalView(384)}
    if resolution not in known:
        raise UserError(
            f"mmpretrain's preprocessing is defined at 224 and 384 pixels, not at {resolution}: "
            "add --preprocess full-crop"
        )
    return known[resolution]


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion in percent (Wilson 1927, equation for z = 1.96).

    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)
    """
    share, spread = hits / count, Z95**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = Z95 * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def identify(path: Path, sha256: str | None, name: str = "") -> tuple[ZooModel | None, list[str]]:
    """The published model that a file is, by `name`, sha256 or its own name; and warnings.

    A file that is not byte for byte the published one is one to warn of: converted, trained
    further, or damaged. Its accuracy tells.
    """
    hashed = by_hash(sha256) if sha256 else None
    model = zoo()[name] if name else hashed or by_file_name(path)
    if model is None or sha256 is None or model.sha8 == sha256[:8]:
        return model, []
    if hashed is not None:
        return model, [f"{path.name} is the published file of {hashed.name}, not of {model.name}"]
    return model, [
        f"{path.name} is not mmpretrain's file {model.checkpoint}: its sha256 begins with "
        f"{sha256[:8]}"
    ]


@torch.inference_mode()
def count_hits(
    network: nn.Module,
    loader: Iterable,
    outputs: Int64[Tensor, " labels"],
    ranks: Distributed,
    precision: str,
) -> tuple[int, int, int]:
    """(images, right at once, right among the five most likely) over all ranks.

    `outputs` says which output of the classifier is which label. Raises NotFiniteError, on all
    ranks alike, for logits that are not finite.
    """
    counts = torch.zeros(4, dtype=torch.int64)
    hidden = ranks.rank > 0 or not sys.stderr.isatty()
    for images, labels, _ in tqdm(loader, unit="batch", leave=False, disable=hidden):
        images = normalise(images.to(ranks.device, non_blocking=True), loader.mean, loader.std)
        with autocast(ranks.device, precision):
            logits = network(images)
        ranked = logits.float().topk(min(5, logits.shape[1]), dim=1).indices.cpu()
        hits = (ranked == outputs[labels][:, None]).sum(dim=0)
        broken = (~logits.isfinite()).any(dim=1).sum().cpu()
        counts += torch.stack([torch.tensor(len(labels)), hits[0], hits.sum(), broken])
    count, top1, top5, broken = distributed.gather_variable(counts[None]).sum(dim=0).tolist()
    if broken:
        raise NotFiniteError(
            f"the logits of {broken} images are not finite: the weights are damaged"
            + ("" if precision == "fp32" else f", or too large for --precision {precision}")
        )
    return count, top1, top5


def _read(
    config: SupervisedConfig, path: Path, sha256: str | None, images: Images | None = None
) -> Candidate:
    """The checkpoint at `path`, ready to be evaluated. Raises UserError."""
    model, warnings = identify(path, sha256, config.model)
    resolution = config.resolution or (model.image_size if model else 0)
    if not resolution:
        raise UserError(
            f"neither its name nor its sha256 says which published model {path} is: add --model "
            "NAME (--list shows them), or for another checkpoint --resolution PIXELS"
        )
    view = evaluation_view(resolution, config.preprocess)
    weights = read(path, config.role, model.arch if model else "")
    if weights.num_classes == 0:
        raise UserError(
            f"{path} has no classifier: evaluate a backbone by eval/linear.py or eval/knn.py"
        )
    if model and weights.num_classes != 1000:
        raise UserError(
            f"{path} has {weights.num_classes} classes, {model.name} 1,000: drop --model "
            "and give --resolution"
        )
    images = open_images(config.data, weights.in_chans) if images is None else images
    check_channels(weights.in_chans, images)
    order = class_order(images, weights.num_classes, config.classes)
    warnings += [order.warning] if order.warning else []
    return Candidate(weights, model, sha256, resolution, view, images, order, warnings)


def _evaluate(candidate: Candidate, config: SupervisedConfig, ranks: Distributed) -> dict:
    """The result of one checkpoint, the same on every rank."""
    start = time.perf_counter()
    weights, model, view = candidate.weights, candidate.model, candidate.view
    mean, std = weights.statistics
    loader = evaluation_loader(
        candidate.images,
        view,
        config.batch_size,
        ranks,
        num_threads=config.num_workers,
        mean=mean,
        std=std,
    )
    network = weights.build().to(ranks.device)
    outputs = candidate.order.outputs
    count, top1, top5 = count_hits(network, loader, outputs, ranks, config.precision)
    assert count == len(candidate.images), "an image was read twice or not at all"
    measured = {"top1": 100 * top1 / count, "top5": 100 * top5 / count}
    published = difference = None
    if model and candidate.resolution == model.image_size:
        values = model.published(config.preprocess == "full-crop")
        published = dict(zip(("top1", "top5"), values, strict=True))
        difference = {key: round(measured[key] - published[key], 4) for key in measured}
    return {
        "model": model.name if model else None,
        "arch": weights.arch,
        "checkpoint": weights.path,
        "step": weights.step,
        "role": weights.role,
        "format": weights.format,
        "sha256": candidate.sha256,
        "published_file": candidate.sha256[:8] == model.sha8
        if model and candidate.sha256
        else None,
        **measured,
        "top1_interval": [round(bound, 4) for bound in wilson_interval(top1, count)],
        "top5_interval": [round(bound, 4) for bound in wilson_interval(top5, count)],
        "interval": "Wilson, 95 %",
        "published": published,
        "difference": difference,
        "images": count,
        "resolution": candidate.resolution,
        "preprocess": {
            "name": config.preprocess,
            "resize": view.resize,
            "crop": view.crop,
            "interpolation": view.interpolation,
            "mean": list(mean),
            "std": list(std),
        },
        "precision": config.precision,
        "data": describe_images(candidate.images),
        "classes_checked_by": candidate.order.checked,
        "warnings": candidate.warnings,
        "seconds": round(time.perf_counter() - start, 3),
        "device": str(ranks.device),
        "ranks": ranks.world_size,
        "versions": describe_software(),
    }


def _evaluate_folder(config: SupervisedConfig, ranks: Distributed) -> dict:
    """Every file in `config.all` that belongs to a published model; what is done is not redone.

    The report is written after each file, so a killed evaluation continues.
    """
    folder, out = Path(config.all), Path(config.out)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: --all expects one with checkpoint files")
    files = sorted(p for p in folder.iterdir() if p.suffix in FILES and p.name[0] != ".")
    if not files:
        raise UserError(f"{folder} holds no checkpoint file ({' '.join(sorted(FILES))})")
    images = open_images(config.data)
    config = settled(config, ranks, stored_precision(out))
    settings = {
        "data": describe_images(images),
        **{key: getattr(config, key) for key in ("preprocess", "precision", "role", "classes")},
    }
    done = _done_before(out, settings)
    distributed.barrier()  # nobody writes the report while somebody reads it
    report = {"settings": settings, "files": []}
    for path in files:
        entry = {"file": path.name} | _evaluate_one(path, images, done, config, ranks)
        report["files"].append(entry)
        if ranks.rank == 0:
            print(_progress(entry), flush=True)
            write_result(report | {"files": report["files"] + _left(done, report)}, out)
            write_text(out.with_suffix(".md"), results_markdown(report))
    failed = [entry for entry in report["files"] if entry["status"] == "failed"]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(files)} files could not be evaluated: "
            + "; ".join(f"{entry['file']}: {entry['reason']}" for entry in failed)
        )
    return report


def _evaluate_one(
    path: Path, images: Images, done: dict, config: SupervisedConfig, ranks: Distributed
) -> dict:
    """The result of a file with "status" done, or "failed" or "skipped" and a "reason"."""
    error, found = "", None
    try:
        found = _prepare(path, images, done, config)
    except UserError as problem:
        error = str(problem)
    except OSError as problem:
        error = f"{path} cannot be read: {problem.strerror}"
    # What one rank cannot read no rank evaluates, or they would wait for each other for ever.
    failed = distributed.gather_variable(torch.tensor([bool(error)], dtype=torch.uint8))
    if failed.any():
        return {"status": "failed", "reason": error or "another rank could not read it"}
    if isinstance(found, dict):
        return found
    try:
        return {"status": "done"} | _evaluate(found, config, ranks)
    except NotFiniteError as problem:
        return {"status": "failed", "reason": f"{path}: {problem}"}


def _prepare(path: Path, images: Images, done: dict, config: SupervisedConfig) -> Candidate | dict:
    """The file, read; or its entry if it need not be evaluated. Raises UserError and OSError."""
    sha256 = _sha256(path)
    if identify(path, sha256)[0] is None:
        return {"status": "skipped", "reason": "neither name nor sha256 of a published model"}
    if path.name in done and done[path.name]["sha256"] == sha256:
        return done[path.name]
    return _read(config, path, sha256, images)


def _done_before(out: Path, settings: dict) -> dict[str, dict]:
    """Finished entries of an earlier report with the same settings, by file name."""
    if not out.exists():
        return {}
    try:
        report = json.loads(out.read_text())
        entries = {e["file"]: e for e in report["files"] if e["status"] == "done"}
        same = report["settings"] == json.loads(json.dumps(settings))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{out} is no report of --all, so it is not overwritten: choose another --out"
        ) from error
    if not same:
        raise UserError(
            f"{out} was made with other images or settings: choose another --out, or remove it"
        )
    return entries


def _left(done: dict[str, dict], report: dict) -> list[dict]:
    """Results of before that this evaluation has not come to yet: a kill must not lose them."""
    seen = {entry["file"] for entry in report["files"]}
    return [entry for name, entry in done.items() if name not in seen]


def _progress(entry: dict) -> str:
    if entry["status"] != "done":
        return f"{entry['file']}: {entry['status']}: {entry['reason']}"
    return (
        f"{entry['model']}: top-1 {entry['top1']:.2f} (published {entry['published']['top1']:.2f}, "
        f"{entry['difference']['top1']:+.2f}), top-5 {entry['top5']:.2f}"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
