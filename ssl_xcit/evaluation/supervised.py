"""Accuracy of supervised checkpoints with their own classifiers, beside the published one.

The published accuracies were measured with the same weights on the same 50,000 validation images. A
complete measurement differs from them only by preprocessing, decoder and arithmetic, which is a few
images. The interval says how far a measurement on some of the images can be from the whole.
"""

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ssl_xcit.checkpoints.read import Weights, read
from ssl_xcit.checkpoints.zoo import ZooModel, by_file_name, by_hash, zoo
from ssl_xcit.data.datasets import Images, check_channels, evaluation_loader, open_images
from ssl_xcit.data.views import EvalView
from ssl_xcit.evaluation.accuracy import count_hits, wilson_interval
from ssl_xcit.evaluation.class_order import ClassOrder, class_order
from ssl_xcit.evaluation.config import SupervisedConfig
from ssl_xcit.evaluation.results import (
    Result,
    describe_images,
    describe_machine,
    describe_view,
    run_evaluation,
    write_result,
)
from ssl_xcit.evaluation.supervised_tables import compare_zoo, results_markdown
from ssl_xcit.runtime import distributed
from ssl_xcit.runtime.distributed import Distributed
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.runtime.files import write_text
from ssl_xcit.runtime.precision import settled
from ssl_xcit.runtime.sealed import read_sealed

FILES = {".pth", ".pt", ".bin", ".safetensors"}


def evaluate_supervised(config: SupervisedConfig) -> dict:
    """The table of published models, the accuracy of one checkpoint, or of all in a folder.

    Prints it (one checkpoint's as a JSON line, too), and writes what it returns to `config.out`.
    With torchrun the ranks share the images, and rank 0 reports.

    Raises UserError for a file that is no such model, images whose classes are not the
    classifier's, and, at the end, a folder with files that could not be evaluated.
    """
    if config.list:
        return compare_zoo().report(config.out)
    if config.all:
        return run_evaluation(lambda ranks: _evaluate_folder(config, ranks), config.device)
    return run_evaluation(lambda ranks: _evaluate_file(config, ranks), config.device, config.out)


class NotFiniteError(UserError):
    """The network's logits are not finite: a fault of its weights, not of the images."""


class Candidate(NamedTuple):
    """A checkpoint that has been read, and everything that decides how it is evaluated."""

    weights: Weights
    model: ZooModel | None
    sha256: str | None  # of a file
    view: EvalView
    images: Images
    order: ClassOrder
    warnings: list[str]


def evaluation_view(resolution: int, preprocess: str) -> EvalView:
    """How an image becomes a square of `resolution` pixels, always bicubic.

    mmpretrain (its configs/xcit): at 224 the central crop after the short side becomes 256, at 384
    the whole image stretched to a square. full-crop (XCiT's --full_crop; timm's crop_pct 1): the
    central crop of the whole short side. Raises UserError for a resolution that mmpretrain does not
    define.
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


def identify(path: Path, sha256: str | None, name: str = "") -> tuple[ZooModel | None, list[str]]:
    """The published model that a file is, by `name`, sha256 or its own name; and warnings.

    A file that is not byte for byte the published one gets a warning: it was converted, trained
    further, or damaged. Its accuracy tells which.
    """
    hashed = by_hash(sha256) if sha256 else None
    model = zoo()[name] if name else hashed or by_file_name(path)
    if model is None or sha256 is None or model.sha8 == sha256[:8]:
        return model, []
    if hashed is not None:
        return model, [f"{path.name} is the published file of {hashed.name}, not of {model.name}"]
    known = f"mmpretrain's file {model.checkpoint}"
    return model, [f"{path.name} is not {known}: its sha256 begins with {sha256[:8]}"]


def _read(
    config: SupervisedConfig, path: Path, sha256: str | None, images: Images | None = None
) -> Candidate:
    """The checkpoint at `path`, ready to be evaluated. Raises UserError."""
    model, warnings = identify(path, sha256, config.model)
    resolution = config.resolution or (model.image_size if model else 0)
    if not resolution:
        raise UserError(
            f"neither the name nor the sha256 of {path} is that of a published model: add --model "
            "NAME (--list shows them), or for another checkpoint --resolution PIXELS"
        )
    view = evaluation_view(resolution, config.preprocess)
    weights = read(path, config.role, model.arch if model else "", config.prefix)
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
    return Candidate(weights, model, sha256, view, images, order, warnings)


def _evaluate_file(config: SupervisedConfig, ranks: Distributed) -> Result:
    """--checkpoint: lines for people, the last one the JSON for programs."""
    config = settled(config, ranks)
    path = Path(config.checkpoint)
    candidate = _read(config, path, _sha256(path) if path.is_file() else None)
    facts = _evaluate(candidate, config, ranks)
    view = candidate.view
    shape = f"central {view.crop} of short side" if view.crop else "square of side"
    lines = [
        f"{facts['model'] or 'no published model'}: {facts['arch']}, {facts['role']} of "
        f"{facts['checkpoint']}",
        f"{facts['images']:,} images, {config.preprocess} ({shape} {view.resize}, "
        f"{view.interpolation}), {facts['precision']}",
    ]
    for key, title in (("top1", "top-1"), ("top5", "top-5")):
        low, high = facts[f"{key}_interval"]
        line = f"{title} {facts[key]:6.2f} %  (95 % Wilson interval {low:.2f} to {high:.2f})"
        if facts["published"]:
            line += f"  published {facts['published'][key]:.2f}, difference "
            line += f"{facts['difference'][key]:+.2f}"
        lines.append(line)
    lines += [f"warning: {warning}" for warning in facts["warnings"]]
    return Result(facts, [*lines, json.dumps(facts)])


def _evaluate(candidate: Candidate, config: SupervisedConfig, ranks: Distributed) -> dict:
    """Facts of one result, on every rank. Raises NotFiniteError, on all ranks alike."""
    start = time.perf_counter()
    weights, model, sha256, view, images, order, warnings = candidate
    threads = config.num_workers
    loader = evaluation_loader(images, view, config.batch_size, ranks, num_threads=threads)
    hidden = ranks.rank > 0 or not sys.stderr.isatty()
    batches = tqdm(loader, unit="batch", leave=False, disable=hidden)
    network = weights.build().to(ranks.device)
    hits = count_hits(network, batches, weights.statistics, ranks, config.precision, order.outputs)
    if hits.not_finite:
        raise NotFiniteError(
            f"the logits of {hits.not_finite} images are not finite: the weights are damaged"
            + ("" if config.precision == "fp32" else f", or too large for {config.precision}")
        )
    assert hits.images == len(images), "an image was read twice or not at all"
    measured = hits.percent()
    intervals = [wilson_interval(n, hits.images) for n in (hits.first, hits.within_five)]
    published = difference = None
    if model and view.size == model.image_size:
        values = model.published(config.preprocess == "full-crop")
        published = dict(zip(measured, values, strict=True))
        difference = {key: round(measured[key] - published[key], 4) for key in measured}
    return {
        "model": model.name if model else None,
        "arch": weights.arch,
        "checkpoint": weights.path,
        "step": weights.step,
        "role": weights.role,
        **({"prefix": weights.prefix} if weights.prefix else {}),
        "format": weights.format,
        "sha256": sha256,
        "published_file": sha256[:8] == model.sha8 if model and sha256 else None,
        **measured,
        "top1_interval": [round(bound, 4) for bound in intervals[0]],
        "top5_interval": [round(bound, 4) for bound in intervals[1]],
        "interval": "Wilson, 95 %",
        "published": published,
        "difference": difference,
        "images": hits.images,
        "resolution": view.size,
        "preprocess": {"name": config.preprocess, **describe_view(view, *weights.statistics)},
        "precision": config.precision,
        "data": describe_images(images),
        "classes_checked_by": order.checked,
        "warnings": warnings,
        "seconds": round(time.perf_counter() - start, 3),
        **describe_machine(ranks),
    }


def _evaluate_folder(config: SupervisedConfig, ranks: Distributed) -> Result:
    """Every file in `config.all` that is a published model, except those already evaluated.

    The report is written after each file, so the same command continues after a kill.
    """
    folder, out = Path(config.all), Path(config.out)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: --all expects one with checkpoint files")
    files = sorted(p for p in folder.iterdir() if p.suffix in FILES and p.name[0] != ".")
    if not files:
        raise UserError(f"{folder} holds no checkpoint file ({' '.join(sorted(FILES))})")
    images = open_images(config.data)
    before, done = _earlier_report(out)
    config = settled(config, ranks, before.get("precision"))
    settings = {
        "data": describe_images(images),
        **{key: getattr(config, key) for key in ("preprocess", "precision", "role", "classes")},
        **({"prefix": config.prefix} if config.prefix else {}),
    }
    if before and before != json.loads(json.dumps(settings)):
        raise UserError(
            f"{out} was made with other images or settings: choose another --out, or remove it"
        )
    distributed.barrier()  # rank 0 overwrites the report once all ranks have read it
    report = {"settings": settings, "files": []}
    for path in files:
        entry = {"file": path.name} | _evaluate_one(path, images, done, config, ranks)
        report["files"].append(entry)
        done.pop(path.name, None)
        if ranks.rank == 0:
            print(_progress(entry), flush=True)
            # Earlier results whose turn has not come yet must survive a kill
            write_result(report | {"files": [*report["files"], *done.values()]}, out)
            write_text(out.with_suffix(".md"), results_markdown(report))
    failed = [entry for entry in report["files"] if entry["status"] == "failed"]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(files)} files could not be evaluated: "
            + "; ".join(f"{entry['file']}: {entry['reason']}" for entry in failed)
        )
    return Result(report, [f"results: {out} and {out.with_suffix('.md')}"])


def _evaluate_one(
    path: Path, images: Images, done: dict, config: SupervisedConfig, ranks: Distributed
) -> dict:
    """A file's result with "status" done; or status "failed" or "skipped" and a "reason"."""
    error, found = "", None
    try:
        sha256 = _sha256(path)
        if identify(path, sha256)[0] is None:
            reason = "neither name nor sha256 of a published model"
            found = {"status": "skipped", "reason": reason}
        elif path.name in done and done[path.name]["sha256"] == sha256:
            found = done[path.name]
        else:
            found = _read(config, path, sha256, images)
    except UserError as problem:
        error = str(problem)
    except OSError as problem:
        error = f"{path} cannot be read: {problem.strerror}"
    # If one rank cannot read it, none evaluates it: the others would wait forever
    if distributed.any_rank(bool(error)):
        return {"status": "failed", "reason": error or "another rank could not read it"}
    if isinstance(found, dict):
        return found
    try:
        return {"status": "done"} | _evaluate(found, config, ranks)
    except NotFiniteError as problem:
        return {"status": "failed", "reason": f"{path}: {problem}"}


def _earlier_report(out: Path) -> tuple[dict, dict[str, dict]]:
    """Settings and finished entries, by file name, of a report in `out`; empty if there is none."""
    if not out.exists():
        return {}, {}
    try:
        report = read_sealed(out)
        done = {entry["file"]: entry for entry in report["files"] if entry["status"] == "done"}
        return dict(report["settings"]), done
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{out} is no report of --all, so it is not overwritten: choose another --out"
        ) from error


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
