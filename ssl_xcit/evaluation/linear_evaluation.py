"""The linear evaluation of a checkpoint: choose on held-out training images, then test once.

The order of events is the point. Everything that is learnt or chosen comes from the training images
and is stored in the output folder; only then are the test images opened.
"""

import json
import time
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from ssl_xcit.data.beton import Beton
from ssl_xcit.data.datasets import Images, check_channels, check_datasets, open_images
from ssl_xcit.data.views import EvalView
from ssl_xcit.evaluation.cache import cached_features, fingerprint
from ssl_xcit.evaluation.classifier import Classifier, load_classifier, save_classifier
from ssl_xcit.evaluation.config import LinearConfig
from ssl_xcit.evaluation.knn import accuracy
from ssl_xcit.evaluation.linear import ranked_classes, split
from ssl_xcit.evaluation.linear_protocols import WIDTHS, Material, fit_fast, train_official
from ssl_xcit.evaluation.results import (
    describe_images,
    describe_software,
    describe_subject,
    write_result,
)
from ssl_xcit.evaluation.subject import Subject, checkpoint_subject, untrained_subject
from ssl_xcit.runtime import distributed
from ssl_xcit.runtime.config import config_differences, read_config, save_config
from ssl_xcit.runtime.distributed import Distributed
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.runtime.precision import settled
from ssl_xcit.training.run_folder import stored_precision

FORMAT = 1  # of the output folder; raised when an older program could misread it
MAY_CHANGE = {"out", "test", "mode", "device", "num_workers", "save_every"}
"""Settings that touch neither a training that is under way nor features that are stored."""


def evaluate_linear(config: LinearConfig) -> dict:
    """Linear classification by frozen features, as `config` says; or the test of a stored one.

    Prints a table, and writes what it returns as JSON to `config.out`: result.json, or
    evaluation.json for --evaluate. "official" and "fast" have the held-out accuracy of every
    classifier tried, which one was selected, and its "top1" and "top5" on the test images, in
    percent. The selected classifiers lie beside, in official/ and fast/, see
    `ssl_xcit.evaluation.classifier`. With torchrun the ranks share the images, and rank 0 reports.

    A killed evaluation continues when it is started again. Raises UserError for what the user can
    mend: images that are missing or do not belong together, a checkpoint that is no backbone or
    for other images, an output folder of another evaluation, a classifier that does not fit.
    """
    ranks = distributed.setup(config.device)
    try:
        result = _test_stored(config, ranks) if config.evaluate else _evaluate(config, ranks)
    finally:
        distributed.teardown()
    if ranks.rank == 0:
        print(_table(result))
        if config.out:
            name = "evaluation.json" if config.evaluate else "result.json"
            write_result(result, Path(config.out) / name)
    return result


def _evaluate(config: LinearConfig, ranks: Distributed) -> dict:
    start = time.perf_counter()
    config = settled(config, ranks, stored_precision(Path(config.out) / "config.yaml"))
    material = _prepare(config, ranks)
    protocols = {"fast": fit_fast, "official": train_official}
    found, classifiers = {}, {}
    for name, protocol in protocols.items():
        if config.mode in (name, "both"):
            found[name], weight, bias = protocol(material)
            facts = _classifier_facts(material, name, found[name]["selected"])
            classifiers[name] = Classifier(weight, bias, facts)
            if ranks.rank == 0:
                save_classifier(Path(config.out) / name, classifiers[name])
    # Every choice is made and stored: only from here on the test images are opened.
    test = open_images(config.test, material.subject.in_chans)
    check_datasets(material.train, test)
    check_channels(material.subject.in_chans, test)
    measured = _accuracies(config, ranks, material.subject, test, list(classifiers.values()))
    for name, (top1, top5) in zip(found, measured, strict=True):
        found[name] |= {"top1": top1, "top5": top5}
    return {
        **_common_facts(config, ranks, material.subject),
        "train": describe_images(material.train),
        "test": describe_images(test),
        "classes": material.num_classes,
        "held_out": {
            "share": config.held_out,
            "images": len(material.held_out),
            "seed": config.seed,
        },
        **found,
        "seconds": round(time.perf_counter() - start, 3),
    }


def _prepare(config: LinearConfig, ranks: Distributed) -> Material:
    """Open what is learnt from, check it, and make the output folder this evaluation's."""
    if config.mode != "fast" and Path(config.train).is_dir():
        raise UserError(
            f"--mode {config.mode} learns from random views, which are read from .beton files, but "
            f"{config.train} is a folder: write a file of it (ssl-xcit data write "
            f"{config.train} train.beton), or take --mode fast"
        )
    if not Path(config.test).exists():  # opened at the very end, missed now
        raise UserError(f"no images at {config.test}: --test takes a .beton or a folder")
    if config.batch_size % ranks.world_size:
        raise UserError(
            f"batch_size {config.batch_size} cannot be shared by {ranks.world_size} ranks: choose "
            "a multiple"
        )
    subject = _subject(config, config.train)
    train = open_images(config.train, subject.in_chans)
    check_datasets(train, train)
    check_channels(subject.in_chans, train)
    fit, held_out = split(len(train), config.held_out, config.seed)
    if config.held_out and len(held_out) < ranks.world_size:
        raise UserError(
            f"{len(held_out)} of the images of {train.path} are held out, fewer than the "
            f"{ranks.world_size} ranks: raise --held_out, or start fewer ranks"
        )
    if ranks.rank == 0:
        _claim(Path(config.out), config, subject, train)
    distributed.barrier()
    subject.backbone.to(ranks.device).requires_grad_(False)
    return Material(config, ranks, subject, train, _count_classes(train), fit, held_out)


def _subject(config: LinearConfig, images: str) -> Subject:
    """The network; an untrained one has the channels of `images`."""
    if config.checkpoint:
        return checkpoint_subject(config.checkpoint, config.arch, config.role)
    in_chans = 3 if Path(images).is_dir() else Beton(images).channels
    return untrained_subject(config.arch, config.seed, in_chans)


def _count_classes(images: Images) -> int:
    """By their names, else by the largest label."""
    return len(images.class_names) if images.class_names else int(images.labels.max()) + 1


def _claim(out: Path, config: LinearConfig, subject: Subject, train: Images) -> None:
    """Make the folder this evaluation's, or refuse it when it is another's."""
    described = out / "config.yaml"
    facts = {
        "format": FORMAT,
        "backbone": fingerprint(subject.backbone.state_dict()),
        "images": [train.num_samples, zlib.crc32(np.ascontiguousarray(train.labels))],
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not described.exists():
            (out / "linear_run.json").write_text(json.dumps(facts, indent=1) + "\n")
            save_config(config, described)
            return
        stored = json.loads((out / "linear_run.json").read_text())
        differences = config_differences(read_config(LinearConfig, described), config)
        differences = [line for line in differences if line.split(":")[0] not in MAY_CHANGE]
        differences += [
            f"{name}: {stored.get(name)} -> {value}"
            for name, value in facts.items()
            if stored.get(name) != value
        ]
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot use the folder {out}: {error}; choose another --out") from error
    if differences:
        raise UserError(
            f"{out} belongs to another evaluation ({'; '.join(differences)}); choose another --out,"
            " or repeat its own settings to continue it (backbone: name the step, "
            "--checkpoint RUN/checkpoints/step_...)"
        )


def _accuracies(
    config: LinearConfig,
    ranks: Distributed,
    subject: Subject,
    test: Images,
    classifiers: Sequence[Classifier],
) -> list[tuple[float, float]]:
    """(top-1, top-5) of each classifier, from one pass over the test images."""
    kinds = dict.fromkeys(classifier.facts["features"] for classifier in classifiers)
    found = cached_features(
        subject,
        test,
        EvalView(config.resize, config.crop, config.interpolation),
        list(kinds),
        ranks,
        batch_size=max(1, config.batch_size // ranks.world_size),
        num_workers=config.num_workers,
        precision=config.precision,
        folder=None,
        name="test",
    )
    measured = []
    for classifier in classifiers:
        features, labels, _ = found[classifier.facts["features"]]
        # float32, as it is stored: a stored classifier must give the same again
        weight, bias = (part.to(ranks.device, torch.float32) for part in classifier[:2])
        measured.append(accuracy(ranked_classes(weight, bias, features), labels))
    return measured


def _test_stored(config: LinearConfig, ranks: Distributed) -> dict:
    """--evaluate: the accuracy of a stored classifier, if it belongs to this network and images."""
    start = time.perf_counter()
    path = Path(config.evaluate)
    classifier = load_classifier(path)
    config = settled(config, ranks, classifier.facts.get("precision"))
    subject = _subject(config, config.test)
    test = open_images(config.test, subject.in_chans)
    check_datasets(test, test)
    check_channels(subject.in_chans, test)
    ours = bool(classifier.facts)
    if ours:
        _check_facts(path, classifier, config, subject, test)
    else:
        classifier = classifier._replace(facts={"features": "cls"})
    classes, size = classifier.weight.shape
    expected = WIDTHS[classifier.facts["features"]] * subject.backbone.embed_dim
    if size != expected:
        raise UserError(
            f"{path} is for {size} features, the network has {expected}: take the network it was "
            "trained with"
        )
    if classes != _count_classes(test):
        raise UserError(
            f"{path} tells {classes} classes apart, {test.path} has {_count_classes(test)}: take "
            "images of the same classes"
        )
    ((top1, top5),) = _accuracies(config, ranks, subject, test, [classifier])
    return {
        **_common_facts(config, ranks, subject),
        "test": describe_images(test),
        "classes": classes,
        "evaluated": {
            "classifier": str(path.absolute()),
            "features": classifier.facts["features"],
            "backbone_checked": ours,
            "top1": top1,
            "top5": top5,
        },
        "seconds": round(time.perf_counter() - start, 3),
    }


def _check_facts(
    path: Path, classifier: Classifier, config: LinearConfig, subject: Subject, test: Images
) -> None:
    """Raises UserError unless `classifier` is for this network and these classes and views."""
    facts = classifier.facts
    if facts["backbone"] != fingerprint(subject.backbone.state_dict()):
        raise UserError(
            f"{path} was trained on another network ({facts['trained_on']}): it says nothing about "
            "this one"
        )
    transform = _transform(config, subject)
    odd = [name for name, value in transform.items() if facts["transform"].get(name) != value]
    if odd:
        flags = (f"--{name} {facts['transform'].get(name)}" for name in odd)
        raise UserError(f"{path} was trained with {' '.join(flags)}: repeat it")
    names = None if test.class_names is None else list(test.class_names)
    if facts["class_names"] and names and facts["class_names"] != names:
        odd = sorted(set(facts["class_names"]) ^ set(names)) or ["only their order"]
        raise UserError(
            f"{test.path} has other classes than {path} was trained on (different: "
            f"{', '.join(odd[:5])})"
        )


def _classifier_facts(material: Material, mode: str, selected: dict) -> dict:
    """What linear.json says."""
    names = material.train.class_names
    return {
        "mode": mode,
        "features": selected["features"],
        "selected": selected,
        "arch": material.subject.facts["arch"],
        "trained_on": describe_subject(material.subject.facts),
        "backbone": fingerprint(material.subject.backbone.state_dict()),
        "classes": material.num_classes,
        "class_names": None if names is None else list(names),
        "transform": _transform(material.config, material.subject),
        "precision": material.config.precision,
    }


def _transform(config: LinearConfig, subject: Subject) -> dict:
    """The central view."""
    return {
        "resize": config.resize,
        "crop": config.crop,
        "interpolation": config.interpolation,
        "mean": list(subject.mean),
        "std": list(subject.std),
    }


def _common_facts(config: LinearConfig, ranks: Distributed, subject: Subject) -> dict:
    """What every result says."""
    return {
        **subject.facts,
        "precision": config.precision,
        "transform": _transform(config, subject),
        "device": str(ranks.device),
        "ranks": ranks.world_size,
        "versions": describe_software(),
    }


def _table(result: dict) -> str:
    """The result as a table."""
    lines = [f"linear classification: {describe_subject(result)}"]
    test = f"{result['test']['images']:,} test images, {result['classes']:,} classes"
    if "evaluated" in result:
        found = result["evaluated"]
        lines += [f"{found['classifier']}, features {found['features']}", test]
        if not found["backbone_checked"]:
            lines.append("the file does not say which network it is for: only its size was checked")
        return "\n".join([*lines, f"top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} %"])
    lines.append(
        f"{test}, {result['train']['images']:,} training images, of which "
        f"{result['held_out']['images']:,} held out to choose"
    )
    lines.append(
        f"{'':10}{'features':>10}{'lr or l2':>10}{'held out %':>12}{'top-1 %':>9}{'top-5 %':>9}"
    )
    for name in ("official", "fast"):
        if name in result:
            lines += _rows(name, result[name])
    return "\n".join(lines)


def _rows(name: str, found: dict) -> Iterable[str]:
    for row in found["grid"]:
        value, top1 = row.get("lr", row.get("l2")), row.get("held_out_top1")
        held_out = "diverged" if row.get("diverged") else "" if top1 is None else f"{top1:.2f}"
        line = f"{name:10}{row['features']:>10}{value:>10g}{held_out:>12}"
        if row is found["selected"]:
            line += f"{found['top1']:>9.2f}{found['top5']:>9.2f}"
        if not row.get("converged", True):
            line += "   not converged: raise --iterations"
        yield line
