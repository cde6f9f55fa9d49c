"""The linear evaluation of a checkpoint: choose on held-out training images, then test once.

The order matters. Everything is learnt and chosen from the training images and stored in the output
folder before the test images are opened.
"""

import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from ssl_xcit.data.datasets import Images
from ssl_xcit.evaluation.accuracy import accuracy
from ssl_xcit.evaluation.cache import cached_features, fingerprint
from ssl_xcit.evaluation.config import LinearConfig
from ssl_xcit.evaluation.features import FEATURES, Extraction
from ssl_xcit.evaluation.linear_classifiers import ranked_classes, split
from ssl_xcit.evaluation.linear_file import Classifier, load_classifier, save_classifier
from ssl_xcit.evaluation.linear_protocols import Material, fit_fast, train_official
from ssl_xcit.evaluation.results import (
    Result,
    count_classes,
    describe_images,
    describe_machine,
    describe_subject,
    run_evaluation,
    write_result,
)
from ssl_xcit.evaluation.subject import Subject
from ssl_xcit.runtime import distributed
from ssl_xcit.runtime.config import config_differences, read_config, save_config
from ssl_xcit.runtime.distributed import Distributed
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.runtime.precision import settled
from ssl_xcit.runtime.sealed import read_sealed
from ssl_xcit.training.run_folder import stored_precision

FORMAT = 1  # of the output folder; raised when an older program could misread it
MAY_CHANGE = {"out", "test", "mode", "device", "num_workers", "save_every"}
"""Settings that touch neither a training under way nor stored features."""
COLUMNS = (("", -10), ("features", 10), ("lr or l2", 10), ("held out %", 12))
COLUMNS += (("top-1 %", 9), ("top-5 %", 9))


def evaluate_linear(config: LinearConfig) -> dict:
    """Train linear classifiers of frozen features, or test a stored one (--evaluate).

    Prints a table, and writes what it returns as JSON into the folder `config.out`: result.json, or
    evaluation.json for --evaluate. "official" and "fast" hold the held-out accuracy of every
    classifier tried, the one selected, and its "top1" and "top5" on the test images, in percent.
    The selected classifiers are stored in official/ and fast/, see
    `ssl_xcit.evaluation.linear_file`. With torchrun the ranks share the images, and rank 0 reports.

    The same command continues a killed evaluation. Raises UserError as `evaluate_knn` does, and for
    the output folder of another evaluation and a classifier that does not fit.
    """
    measure = _test_stored if config.evaluate else _choose_and_test
    name = "evaluation.json" if config.evaluate else "result.json"
    out = Path(config.out) / name if config.out else ""
    return run_evaluation(lambda ranks: measure(config, ranks), config.device, out)


def _choose_and_test(config: LinearConfig, ranks: Distributed) -> Result:
    start = time.perf_counter()
    config = settled(config, ranks, stored_precision(Path(config.out) / "config.yaml"))
    material = _prepare(config, ranks)
    held_out, found, classifiers = len(material.held_out), {}, {}
    for name, protocol in (("fast", fit_fast), ("official", train_official)):
        if config.mode in (name, "both"):
            found[name], weight, bias = protocol(material)
            facts = _classifier_facts(material, name, found[name]["selected"])
            classifiers[name] = Classifier(weight, bias, facts)
            if ranks.rank == 0:
                save_classifier(Path(config.out) / name, classifiers[name])
    # Every choice is made and stored: only now are the test images opened.
    test = material.extraction.open(config.test, material.train)
    for name, top1, top5 in _accuracies(material.extraction, test, classifiers):
        found[name] |= {"top1": top1, "top5": top5}
    facts = {
        **material.extraction.facts(),
        **describe_machine(ranks),
        "train": describe_images(material.train),
        "test": describe_images(test),
        "classes": material.num_classes,
        "held_out": {"share": config.held_out, "images": held_out, "seed": config.seed},
        **found,
        "seconds": round(time.perf_counter() - start, 3),
    }
    heading = [
        f"linear classification: {describe_subject(facts)}",
        f"{len(test):,} test images, {material.num_classes:,} classes, "
        f"{len(material.train):,} training images, of which {held_out:,} held out to choose",
    ]
    order = [name for name in ("official", "fast") if name in found]
    rows = [row for name in order for row in _rows(name, found[name])]
    return Result(facts, heading, COLUMNS, rows)


def _prepare(config: LinearConfig, ranks: Distributed) -> Material:
    """Open and check what to learn from, and claim the output folder for this evaluation."""
    if config.mode != "fast" and Path(config.train).is_dir():
        raise UserError(
            f"--mode {config.mode} learns from random views, which need a .beton file, but "
            f"{config.train} is a folder: write a file of it (ssl-xcit data write "
            f"{config.train} train.beton), or take --mode fast"
        )
    if not Path(config.test).exists():  # opened at the very end, but missed now
        raise UserError(f"no images at {config.test}: --test takes a .beton or a folder")
    if config.batch_size % ranks.world_size:
        raise UserError(
            f"batch_size must be a multiple of the {ranks.world_size} ranks, got "
            f"{config.batch_size}"
        )
    extraction = Extraction(config, ranks, config.batch_size // ranks.world_size, config.train)
    train = extraction.open(config.train)
    fit, held_out = split(len(train), config.held_out, config.seed)
    if config.held_out and len(held_out) < ranks.world_size:
        raise UserError(
            f"{len(held_out)} of the images of {train.path} are held out, fewer than the "
            f"{ranks.world_size} ranks: raise --held_out, or start fewer ranks"
        )
    if ranks.rank == 0:
        _claim(Path(config.out), config, extraction.subject, train)
    distributed.barrier()
    extraction.subject.backbone.to(ranks.device).requires_grad_(False)
    return Material(config, extraction, train, count_classes(train), fit, held_out)


def _claim(out: Path, config: LinearConfig, subject: Subject, train: Images) -> None:
    """Claim the folder for this evaluation. Raises UserError if it belongs to another."""
    described = out / "config.yaml"
    facts = {
        "format": FORMAT,
        "backbone": fingerprint(subject.backbone.state_dict()),
        "images": [train.num_samples, zlib.crc32(np.ascontiguousarray(train.labels))],
    }
    if not described.exists():
        write_result(facts, out / "linear_run.json")
        save_config(config, described)
        return
    try:
        stored = read_sealed(out / "linear_run.json")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot use the folder {out}: {error}; choose another --out") from error
    differences = config_differences(read_config(LinearConfig, described), config)
    differences = [line for line in differences if line.split(":")[0] not in MAY_CHANGE]
    for name, value in facts.items():
        if stored.get(name) != value:
            differences.append(f"{name}: {stored.get(name)} -> {value}")
    if differences:
        raise UserError(
            f"{out} belongs to another evaluation ({'; '.join(differences)}); choose another --out,"
            " or repeat its own settings to continue it (backbone: name the step, "
            "--checkpoint RUN/checkpoints/step_...)"
        )


def _accuracies(
    extraction: Extraction, test: Images, classifiers: Mapping[str, Classifier]
) -> Iterator[tuple[str, float, float]]:
    """(name, top-1, top-5) of each classifier, from one pass over the test images."""
    kinds = dict.fromkeys(classifier.facts["features"] for classifier in classifiers.values())
    found = cached_features(extraction, test, list(kinds))
    for name, classifier in classifiers.items():
        features, labels, _ = found[classifier.facts["features"]]
        # float32, as it is stored: the stored classifier must give the same accuracy again
        weight, bias = (part.to(extraction.ranks.device, torch.float32) for part in classifier[:2])
        yield name, *accuracy(ranked_classes(weight, bias, features), labels)


def _test_stored(config: LinearConfig, ranks: Distributed) -> Result:
    """--evaluate: test a stored classifier, if it belongs to this network and these images."""
    start = time.perf_counter()
    path = Path(config.evaluate)
    classifier = load_classifier(path)
    config = settled(config, ranks, classifier.facts.get("precision"))
    batch_size = max(1, config.batch_size // ranks.world_size)
    extraction = Extraction(config, ranks, batch_size, config.test)
    test = extraction.open(config.test)
    ours = bool(classifier.facts)
    if ours:
        _check_facts(path, classifier, extraction, test)
    else:
        classifier = classifier._replace(facts={"features": "cls"})
    kind = classifier.facts["features"]
    classes, size = classifier.weight.shape
    expected = FEATURES[kind] * extraction.subject.backbone.embed_dim
    if size != expected:
        raise UserError(
            f"{path} is for {size} features, the network has {expected}: take the network that it "
            "was trained on"
        )
    if classes != count_classes(test):
        raise UserError(
            f"{path} has {classes} classes, {test.path} has {count_classes(test)}: take images of "
            "the same classes"
        )
    ((_, top1, top5),) = _accuracies(extraction, test, {"": classifier})
    facts = {
        **extraction.facts(),
        **describe_machine(ranks),
        "test": describe_images(test),
        "classes": classes,
        "evaluated": {
            "classifier": str(path.absolute()),
            "features": kind,
            "backbone_checked": ours,
            "top1": top1,
            "top5": top5,
        },
        "seconds": round(time.perf_counter() - start, 3),
    }
    heading = [
        f"linear classification: {describe_subject(facts)}",
        f"{path.absolute()}, features {kind}",
        f"{len(test):,} test images, {classes:,} classes",
    ]
    if not ours:
        heading.append("the file does not say which network it is for: only its size was checked")
    return Result(facts, [*heading, f"top-1 {top1:.2f} %, top-5 {top5:.2f} %"])


def _check_facts(path: Path, classifier: Classifier, extraction: Extraction, test: Images) -> None:
    """Raise UserError unless `classifier` is for this network, these classes and this view."""
    facts = classifier.facts
    if facts["backbone"] != fingerprint(extraction.subject.backbone.state_dict()):
        raise UserError(
            f"{path} was trained on another network ({facts['trained_on']}): take that network"
        )
    transform = extraction.facts()["transform"]
    odd = [name for name, value in transform.items() if facts["transform"].get(name) != value]
    if odd:
        flags = (f"--{name} {facts['transform'].get(name)}" for name in odd)
        raise UserError(f"{path} was trained with {' '.join(flags)}: give the same here")
    names = None if test.class_names is None else list(test.class_names)
    if facts["class_names"] and names and facts["class_names"] != names:
        odd = sorted(set(facts["class_names"]) ^ set(names)) or ["only their order"]
        raise UserError(
            f"{test.path} has other classes than {path} was trained on (different: "
            f"{', '.join(odd[:5])})"
        )


def _classifier_facts(material: Material, mode: str, selected: dict) -> dict:
    names, subject = material.train.class_names, material.extraction.subject
    return {
        "mode": mode,
        "features": selected["features"],
        "selected": selected,
        "arch": subject.facts["arch"],
        "trained_on": describe_subject(subject.facts),
        "backbone": fingerprint(subject.backbone.state_dict()),
        "classes": material.num_classes,
        "class_names": None if names is None else list(names),
        "transform": material.extraction.facts()["transform"],
        "precision": material.config.precision,
    }


def _rows(name: str, found: dict) -> Iterator[list[str]]:
    for row in found["grid"]:
        value, top1 = row.get("lr", row.get("l2")), row.get("held_out_top1")
        held_out = "diverged" if row.get("diverged") else "" if top1 is None else f"{top1:.2f}"
        test = ["", ""]
        if row is found["selected"]:
            test = [f"{found[key]:.2f}" for key in ("top1", "top5")]
        note = "" if row.get("converged", True) else "   not converged: raise --iterations"
        yield [name, row["features"], f"{value:g}", held_out, *test, note]
