import copy
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import shallow
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression as ScikitLearn
from sklearn.preprocessing import StandardScaler
from torch import nn

from ssl_xcit.checkpoints.folder import save_checkpoint
from ssl_xcit.data.beton import Beton
from ssl_xcit.data.loader import EvalLoader, MultiCropLoader
from ssl_xcit.data.views import EvalView, supervised_views
from ssl_xcit.data.writer import write_beton
from ssl_xcit.dino.config import Crops, TrainConfig
from ssl_xcit.evaluation import linear_classifiers
from ssl_xcit.evaluation.config import LinearConfig
from ssl_xcit.evaluation.linear import evaluate_linear
from ssl_xcit.evaluation.linear_classifiers import (
    LinearGrid,
    LogisticRegression,
    ranked_classes,
    split,
)
from ssl_xcit.evaluation.linear_file import Classifier, load_classifier, save_classifier
from ssl_xcit.evaluation.linear_protocols import select
from ssl_xcit.models.xcit import build_xcit
from ssl_xcit.runtime import precision
from ssl_xcit.runtime.config import save_config
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.runtime.sealed import read_sealed

CPU = torch.device("cpu")
ARCH = "xcit_nano_12_p16"
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


@pytest.fixture(scope="module", autouse=True)
def _shallow_networks():
    with shallow.networks():
        yield


# The grid


def grid_batches(sizes, steps, b=8, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            {k: torch.randn(b, d, generator=generator).double() for k, d in sizes.items()},
            torch.randint(classes, (b,), generator=generator),
        )
        for _ in range(steps)
    ]


def train_alone(size, lr, classes, seed, batches, epochs):
    """One classifier by torch's own module, optimiser and schedule."""
    classifier = nn.Linear(size, classes).double()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        initial = torch.empty(classes, size).normal_(0.0, 0.01, generator=generator)
        classifier.weight.copy_(initial)
        classifier.bias.zero_()
    optimizer = torch.optim.SGD(classifier.parameters(), lr, momentum=0.9, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=0)
    for _ in range(epochs):
        for features, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(classifier(features), labels).backward()
            optimizer.step()
        schedule.step()
    return classifier


def cosine_decay(epoch, epochs):
    return (1 + np.cos(np.pi * epoch / epochs)) / 2


def test_every_entry_of_the_grid_equals_the_classifier_trained_alone():
    sizes, lrs, epochs = {"cls": 6, "cls+patch": 12}, (0.003, 0.1, 2.0), 5
    batches = grid_batches(sizes, steps=4)
    grid = LinearGrid(sizes, lrs, 5, seed=3, device=CPU, dtype=torch.float64)
    for epoch in range(epochs):
        for features, labels in batches:
            grid.step(features, labels, cosine_decay(epoch, epochs))
    assert grid.entries == [(kind, lr) for kind in sizes for lr in lrs]
    for entry, (kind, lr) in enumerate(grid.entries):
        mine = [(features[kind], labels) for features, labels in batches]
        alone = train_alone(sizes[kind], lr, 5, 3, mine, epochs)
        weight, bias = grid.classifier(entry)
        torch.testing.assert_close(weight, alone.weight.detach(), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(bias, alone.bias.detach(), rtol=1e-6, atol=1e-9)


def test_a_step_returns_the_losses_before_it():
    sizes = {"cls": 6, "patch": 4}
    grid = LinearGrid(sizes, (0.1, 1.0), 5, seed=0, device=CPU, dtype=torch.float64)
    for features, labels in grid_batches(sizes, steps=3):
        before = [[part.clone() for part in grid.classifier(i)] for i in range(4)]
        losses = grid.step(features, labels, 1.0)
        for loss, (kind, _), (weight, bias) in zip(losses, grid.entries, before, strict=True):
            expected = F.cross_entropy(F.linear(features[kind], weight, bias), labels)
            torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)


def test_an_entry_that_diverges_leaves_the_others_as_they_are():
    sizes = {"cls": 6}
    wild, tame = (LinearGrid(sizes, (lr, 0.1), 5, 0, CPU) for lr in (1e38, 0.01))
    for features, labels in grid_batches(sizes, steps=6):
        features = {kind: rows.float() for kind, rows in features.items()}
        for grid in (wild, tame):
            grid.step(features, labels, 1.0)
    assert not wild.classifier(0)[0].isfinite().all()
    assert all(
        torch.equal(a, b) for a, b in zip(wild.classifier(1), tame.classifier(1), strict=True)
    )


def test_a_grid_goes_on_from_its_saved_state_bit_for_bit():
    sizes = {"cls": 6, "patch": 4}
    batches = grid_batches(sizes, steps=6)
    whole, first, second = (
        LinearGrid(sizes, (0.1, 1.0), 5, seed, CPU, torch.float64) for seed in (0, 0, 1)
    )
    for features, labels in batches:
        whole.step(features, labels, 1.0)
    for features, labels in batches[:3]:
        first.step(features, labels, 1.0)
    second.state = copy.deepcopy(first.state)
    for features, labels in batches[3:]:
        second.step(features, labels, 1.0)
    for entry in range(4):
        assert torch.equal(second.classifier(entry)[0], whole.classifier(entry)[0])
        assert torch.equal(second.classifier(entry)[1], whole.classifier(entry)[1])


@pytest.mark.parametrize(("classes", "top"), [(3, 3), (9, 5)])
def test_classes_are_ranked_by_their_logits(classes, top, monkeypatch):
    monkeypatch.setattr(linear_classifiers, "CHUNK", 4)
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(classes, *s, generator=generator).double() for s in ((7,), ()))
    features = torch.randn(10, 7, generator=generator)
    found = ranked_classes(weight, bias, features)
    logits = features.numpy() @ weight.numpy().T + bias.numpy()
    assert np.array_equal(found.numpy(), np.argsort(-logits, axis=1)[:, :top])


# Logistic regression


@pytest.fixture(scope="module")
def digits():
    """Handwritten digits, of which some pixels are always 0."""
    images, labels = load_digits(return_X_y=True)
    assert (images[:600].std(axis=0) == 0).any()
    return torch.from_numpy(images[:600]).float(), torch.from_numpy(labels[:600]).long()


def scikit_learn_fit(features, labels, l2):
    """(weight, bias) for raw features at the same objective, and the fitted models."""
    scaler = StandardScaler().fit(features.double().numpy())
    model = ScikitLearn(C=1 / (l2 * len(labels)), tol=1e-11, max_iter=20_000)
    model.fit(scaler.transform(features.double().numpy()), labels.numpy())
    weight = model.coef_ / scaler.scale_
    return weight, model.intercept_ - weight @ scaler.mean_, (scaler, model)


@pytest.mark.parametrize(("l2", "kept"), [(1.0, True), (0.03, False), (0.003, True)])
def test_a_fit_equals_scikit_learn(digits, l2, kept, monkeypatch):
    features, labels = digits
    _, bias, (scaler, model) = scikit_learn_fit(features, labels, l2)
    monkeypatch.setattr(linear_classifiers, "CHUNK", 97)  # the sums are over chunks
    monkeypatch.setattr(linear_classifiers, "KEPT", 600 * 64 - (not kept))
    # An objective near 1 tells no smaller gradients apart than the root of float64's precision,
    # 1.5e-8: below, it depends on the processor's order of summation whether a search ends well.
    tolerance = 3e-8 if l2 == 1.0 else 1e-8
    fit = LogisticRegression(features, labels, 10, CPU).fit(l2, 5000, tolerance=tolerance)
    assert fit.gradient <= tolerance
    # where a pixel hardly varies, its raw weight is large and so is its error: compare scaled ones
    np.testing.assert_allclose(fit.weight.numpy() * scaler.scale_, model.coef_, atol=2e-5)
    np.testing.assert_allclose(fit.bias.numpy(), bias, rtol=1e-3, atol=2e-4)
    rest = torch.from_numpy(load_digits().data[600:]).float()
    probs = (rest.double() @ fit.weight.T + fit.bias).softmax(dim=1)
    scaled = scaler.transform(rest.double().numpy())
    np.testing.assert_allclose(probs.numpy(), model.predict_proba(scaled), rtol=0, atol=1e-5)
    found = ranked_classes(fit.weight, fit.bias, rest)[:, 0]
    assert np.array_equal(found.numpy(), model.predict(scaled))


def test_a_warm_start_ends_where_a_cold_one_ends(digits):
    features, labels = digits
    regression = LogisticRegression(features, labels, 10, CPU)
    strong = regression.fit(0.01, 2000, tolerance=1e-8)
    cold = regression.fit(0.008, 2000, tolerance=1e-8)
    warm = regression.fit(0.008, 2000, tolerance=1e-8, start=strong)
    torch.testing.assert_close(warm.weight, cold.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(warm.bias, cold.bias, rtol=1e-4, atol=1e-4)
    # A raw fit means the same as the standardised one it was made from: there is nothing to do.
    assert regression.fit(0.008, 2000, tolerance=1e-6, start=cold).iterations <= 1


def test_a_fit_stops_at_its_iterations_and_says_how_far_it_is(digits):
    regression = LogisticRegression(*digits, 10, CPU)
    fit = regression.fit(1e-6, 3)
    assert fit.iterations == 3
    assert fit.gradient > 1e-6


# Choosing


@pytest.mark.parametrize(
    ("n", "share", "count"), [(100, 0.1, 10), (7, 0.01, 1), (3, 0.99, 2), (50, 0.0, 0)]
)
def test_a_split_holds_out_its_share_and_loses_nobody(n, share, count):
    fit, held_out = split(n, share, seed=5)
    assert len(held_out) == count
    assert sorted([*fit.tolist(), *held_out.tolist()]) == list(range(n))
    assert fit.tolist() == sorted(fit.tolist())


def test_a_split_depends_on_the_seed_and_on_each_image_alone():
    held_out = {seed: set(split(1000, 0.2, seed)[1].tolist()) for seed in (0, 1)}
    assert 10 < len(held_out[0] & held_out[1]) < 90  # 40 expected by chance
    assert set(split(1000, 0.1, 0)[1].tolist()) < held_out[0]
    fewer = set(split(900, 0.2, 0)[1].tolist())
    assert len(fewer & held_out[0]) > 160  # the same hashes, cut at about the same height
    counts = np.bincount([i // 100 for i in held_out[0]], minlength=10)
    assert counts.min() >= 8  # spread over the file, not a block of it


def test_the_best_is_the_first_of_equals_that_has_not_diverged():
    rows = [{"held_out_top1": v, "diverged": v is None} for v in (None, 40.0, 90.0, 90.0)]
    assert select(rows) == 2
    assert select([{"l2": 0.1}]) == 0
    with pytest.raises(UserError, match="every classifier has diverged: add a lower --lr"):
        select(rows[:1])


# Stored classifiers

FACTS = dict.fromkeys(("features", "trained_on", "backbone", "class_names", "transform"), "x")


def some_classifier():
    return Classifier(torch.randn(3, 4), torch.randn(3), FACTS)


def test_a_stored_classifier_comes_back_with_what_it_says(tmp_path):
    classifier = some_classifier()
    save_classifier(tmp_path / "a", classifier)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "linear.json",
        "linear.safetensors",
    ]
    for path in (tmp_path / "a", tmp_path / "a/linear.json", tmp_path / "a/linear.safetensors"):
        found = load_classifier(path)
        assert torch.equal(found.weight, classifier.weight)
        assert torch.equal(found.bias, classifier.bias)
        assert FACTS.items() <= found.facts.items()


def test_a_classifier_that_is_not_what_was_stored_is_refused(tmp_path):
    folder = tmp_path / "a"

    def refused(pattern):
        with pytest.raises(UserError, match=pattern):
            load_classifier(folder)

    save_classifier(folder, some_classifier())
    others = {"weight": torch.randn(3, 4), "bias": torch.zeros(3)}
    save_file(others, folder / "linear.safetensors")  # a random classifier in its place
    refused("is damaged: the sha256 of linear.safetensors differs")
    (folder / "linear.safetensors").unlink()
    refused("is damaged: .*No such file")
    save_classifier(folder, some_classifier())
    (folder / "linear.json").write_text("{")
    refused("is damaged")
    save_classifier(folder, some_classifier())
    facts = read_sealed(folder / "linear.json")
    (folder / "linear.json").write_text(json.dumps({**facts, "format": 2}))
    refused("format 2, this program reads up to 1")
    del facts["backbone"]
    (folder / "linear.json").write_text(json.dumps(facts))
    refused("does not say backbone")
    (folder / "linear.json").unlink()
    refused("no linear.json in")
    broken = some_classifier()
    broken.weight[1, 2] = torch.nan
    save_classifier(folder, broken)
    refused("contains NaN")
    save_classifier(folder, broken._replace(weight=torch.zeros(2, 4)))
    refused(r"expected a weight .*got \(2, 4\) and \(3,\)")
    save_classifier(tmp_path / "runs" / "official", some_classifier())
    with pytest.raises(UserError, match=f"give {tmp_path}/runs/official"):
        load_classifier(tmp_path / "runs")


def test_dinos_linear_file_is_read_and_no_other(tmp_path):
    classifier, path = some_classifier(), tmp_path / "linear.pth"
    state = {"module.linear.weight": classifier.weight, "module.linear.bias": classifier.bias}
    torch.save({"epoch": 100, "state_dict": state, "best_acc": 77.8}, path)
    found = load_classifier(path)
    assert torch.equal(found.weight, classifier.weight)
    assert torch.equal(found.bias, classifier.bias)
    assert found.facts == {}
    weight, bias = state.values()
    for content, pattern in (
        ({"networks": state}, "holds no network"),
        ({"state_dict": {}}, "is no state dict"),
        ({"state_dict": {"module.linear.weight": weight}}, "expected linear.weight and linear.bia"),
        ({"state_dict": {"fc.weight": weight, "fc.bias": bias}}, "expected linear.weight"),
        ({"state_dict": {**state, "module.norm.weight": bias}}, "expected linear.weight"),
        ([weight, bias], "holds no state dict but a list"),
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=pattern):
            load_classifier(path)
    path.write_bytes(b"no pickle")
    with pytest.raises(UserError, match="cannot be read safely"):
        load_classifier(path)


# The evaluation


def write_digits(folder, start, count, channels=3):
    """A .beton, beside its folder, of digits drawn 32 x 32."""
    data = load_digits()
    for i in range(start, start + count):
        image = Image.fromarray((data.images[i] * 15.9).astype(np.uint8)).resize((32, 32))
        (folder / str(data.target[i])).mkdir(parents=True, exist_ok=True)
        image.convert("RGB").save(folder / str(data.target[i]) / f"{i:04d}.png")
    write_beton(folder, folder.with_suffix(".beton"), progress=False)
    return str(folder.with_suffix(".beton"))


@pytest.fixture(scope="module")
def betons(tmp_path_factory):
    folder = tmp_path_factory.mktemp("linear")
    return write_digits(folder / "train", 0, 150), write_digits(folder / "test", 200, 80)


def lively_backbone(seed):
    """Random weights that let through what tells images apart; the initial ones hardly do."""
    torch.manual_seed(seed)
    model = build_xcit(ARCH, num_classes=0)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim > 1 and tensor.shape[-1] > 1:
                tensor.normal_(0, tensor[0].numel() ** -0.5)
    return model.eval()


def write_run(folder):
    """A run folder with random networks, whose crops had their own statistics."""
    states = {}
    for seed, role in enumerate(("student", "teacher")):
        backbone = lively_backbone(seed)
        states[role] = {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
    save_checkpoint(folder / "checkpoints", 12, states, {"arch": ARCH})
    crops = Crops(mean=MEAN, std=STD)
    save_config(
        TrainConfig(arch=ARCH, data="x.beton", out=str(folder), crops=crops), folder / "config.yaml"
    )
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "a")


def linear_config(betons, run, out, **options):
    small = {"resize": 32, "crop": 32, "num_workers": 1, "device": "cpu", "batch_size": 32}
    small |= {"epochs": 10, "scale": (0.6, 1.0), "lr": (0.1, 1.0), "l2": (0.1, 0.001)}
    small |= {"held_out": 0.2, "seed": 4, "precision": "fp32"}
    small |= {"train": betons[0], "test": betons[1], "checkpoint": str(run), "out": str(out)}
    return LinearConfig(**(small | options))


@pytest.fixture(scope="module")
def finished(betons, run, tmp_path_factory):
    """(result, folder) of both protocols with two kinds of features."""
    out = tmp_path_factory.mktemp("finished") / "out"
    config = linear_config(betons, run, out, features=("cls", "inputs2"))
    return evaluate_linear(config), out


def naive_features(model, images):
    """float64, from bytes, by hooks on the layers: independent of `features.embed`."""
    entering = []
    hooks = [
        block.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[:2]))
        for block in model.cls_attn_blocks
    ]
    statistics = (torch.tensor(values).double().view(3, 1, 1) for values in (MEAN, STD))
    mean, std = statistics
    with torch.no_grad():
        cls = model((images.double() / 255 - mean) / std)
        (_, first), (second_cls, second) = entering
        parts = [model.norm(first).mean(1), model.norm(second_cls), model.norm(second).mean(1)]
    for hook in hooks:
        hook.remove()
    return {"cls": cls, "inputs2": torch.cat(parts, dim=1)}


def central(path, images=None):
    """(features of each kind, labels) of the central views."""
    subset = None if images is None else np.array(images)
    loader = EvalLoader(path, EvalView(32, 32), 999, num_threads=1, subset=subset)
    ((views, labels, _),) = loader
    return naive_features(lively_backbone(1).double(), views), labels


def percent(right):
    return 100 * right.double().mean().item()


def stored(folder):
    return load_file(Path(folder) / "linear.safetensors")


def test_the_official_protocol_equals_plain_torch_for_every_entry(betons, finished):
    result, out = finished
    fit, held_out = split(150, 0.2, 4)
    views = supervised_views(32, (0.6, 1.0), "bilinear")
    loader = MultiCropLoader(betons[0], views, 32, seed=4, num_threads=1, subset=fit.numpy())
    labels = torch.from_numpy(Beton(betons[0]).labels)
    model, epochs = lively_backbone(1).double(), []
    for epoch in range(10):
        loader.set_epoch(epoch)
        epochs.append([(naive_features(model, v[0]), labels[i]) for v, i in loader])
    (tried, tried_labels), (test, test_labels) = (
        central(*args) for args in ((betons[0], held_out), (betons[1],))
    )
    found = result["official"]
    assert [(row["features"], row["lr"]) for row in found["grid"]] == [
        (kind, lr) for kind in ("cls", "inputs2") for lr in (0.1, 1.0)
    ]
    accuracies = []
    for row in found["grid"]:
        kind = row["features"]
        size = epochs[0][0][0][kind].shape[1]
        classifier = nn.Linear(size, 10).double()
        with torch.no_grad():
            generator = torch.Generator().manual_seed(4)
            classifier.weight.copy_(torch.empty(10, size).normal_(0, 0.01, generator=generator))
            classifier.bias.zero_()
        optimizer = torch.optim.SGD(classifier.parameters(), row["lr"] * 32 / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        for batches in epochs:
            for features, batch_labels in batches:
                optimizer.zero_grad()
                F.cross_entropy(classifier(features[kind]), batch_labels).backward()
                optimizer.step()
            schedule.step()
        right = classifier(tried[kind]).argmax(1) == tried_labels
        accuracies.append(percent(right))
        assert row["held_out_top1"] == pytest.approx(accuracies[-1])
        if row == found["selected"]:
            logits = classifier(test[kind])
            top5 = (logits.topk(5).indices == test_labels[:, None]).any(1)
            assert found["top1"] == pytest.approx(percent(logits.argmax(1) == test_labels))
            assert found["top5"] == pytest.approx(percent(top5))
            weights = stored(out / "official")
            for name, parameter in classifier.named_parameters():
                expected = parameter.detach().float()
                torch.testing.assert_close(weights[name], expected, rtol=1e-3, atol=1e-4)
    assert len(set(accuracies)) > 1
    assert found["selected"] == found["grid"][int(np.argmax(accuracies))]


def test_the_fast_protocol_equals_scikit_learn_for_every_entry(betons, finished):
    result, out = finished
    fit, held_out = split(150, 0.2, 4)
    (train, labels), (test, test_labels) = (central(path) for path in betons)
    found = result["fast"]
    assert [(row["features"], row["l2"]) for row in found["grid"]] == [
        (kind, l2) for kind in ("cls", "inputs2") for l2 in (0.1, 0.001)
    ]
    for row in found["grid"]:
        rows = train[row["features"]]
        weight, bias, _ = scikit_learn_fit(rows[fit], labels[fit], row["l2"])
        logits = rows[held_out] @ torch.from_numpy(weight).T + torch.from_numpy(bias)
        assert row["held_out_top1"] == pytest.approx(percent(logits.argmax(1) == labels[held_out]))
    best = max(row["held_out_top1"] for row in found["grid"])
    assert found["selected"] == next(r for r in found["grid"] if r["held_out_top1"] == best)
    kind, l2 = found["selected"]["features"], found["selected"]["l2"]
    weight, bias, _ = scikit_learn_fit(train[kind], labels, l2)  # of all images
    weights = stored(out / "fast")
    scale = np.abs(weight).max()
    np.testing.assert_allclose(weights["weight"].numpy(), weight, rtol=0, atol=2e-3 * scale)
    logits = test[kind] @ torch.from_numpy(weight).T + torch.from_numpy(bias)
    assert found["top1"] == pytest.approx(percent(logits.argmax(1) == test_labels))


def test_the_result_says_what_decided_it(betons, run, finished):
    result, out = finished
    document = read_sealed(out / "result.json")
    assert document == json.loads(json.dumps(result))
    assert document["checkpoint"] == str(run / "checkpoints" / "step_00000012")
    assert (document["role"], document["arch"], document["classes"]) == ("teacher", ARCH, 10)
    assert document["transform"]["mean"] == list(MEAN)
    assert document["test"] == {"path": betons[1], "images": 80, "classes": 10}
    assert document["held_out"] == {"share": 0.2, "images": 30, "seed": 4}
    assert document["official"]["training_images"] == 120
    assert document["fast"]["training_images"] == 150
    for name in ("official", "fast"):
        facts = json.loads((out / name / "linear.json").read_text())
        assert facts["features"] == document[name]["selected"]["features"]
        assert facts["class_names"] == [str(digit) for digit in range(10)]
        assert len(facts["backbone"]) == 64


def files(out):
    """Everything that was learnt."""
    return {
        f"{name}/{file}": (out / name / file).read_bytes()
        for name in ("official", "fast")
        for file in ("linear.safetensors", "linear.json")
    }


def test_test_images_decide_nothing(betons, run, finished, tmp_path):
    result, out = finished
    learnt = files(out)
    # other labels
    folder = tmp_path / "others"
    shutil.copytree(Path(betons[1]).with_suffix(""), folder)
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        (folder / name).rename(folder / f"x{name}")
    for name, new in zip(names, names[1:] + names[:1], strict=True):
        (folder / f"x{name}").rename(folder / new)
    # none at all, and a file that cannot be read
    write_beton(folder, tmp_path / "none.beton", labels=False, progress=False)
    (tmp_path / "broken.beton").write_text("not a beton")
    options = {"features": ("cls", "inputs2")}
    permuted = evaluate_linear(
        linear_config((betons[0], str(folder)), run, tmp_path / "0", **options)
    )
    assert files(tmp_path / "0") == learnt
    for mode in ("official", "fast"):
        assert permuted[mode]["grid"] == result[mode]["grid"]
        assert permuted[mode]["selected"] == result[mode]["selected"]
        assert permuted[mode]["top1"] != result[mode]["top1"]
    for i, (name, message) in enumerate(
        {"none.beton": "has no labels", "broken.beton": "broken.beton"}.items()
    ):
        config = linear_config(
            (betons[0], str(tmp_path / name)), run, tmp_path / f"x{i}", **options
        )
        with pytest.raises(UserError, match=message):
            evaluate_linear(config)
        assert files(tmp_path / f"x{i}") == learnt
        assert not (tmp_path / f"x{i}" / "result.json").exists()
    # once the file is mended, the same folder goes on to the test
    mended = evaluate_linear(linear_config(betons, run, tmp_path / "x1", **options))
    assert mended["official"]["top1"] == result["official"]["top1"]


WATCHED: list = []


def _watch(event, arguments):
    if WATCHED and event in ("open", "os.listdir", "os.scandir", "mmap.__new__"):
        test, out, seen = WATCHED
        if str(arguments[0]).startswith(test):
            seen.append([(out / name / "linear.json").exists() for name in ("official", "fast")])


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_test_images_are_not_opened_before_everything_is_chosen(betons, run, tmp_path, kind):
    test = betons[1] if kind == "file" else betons[1].removesuffix(".beton")
    sys.addaudithook(_watch)  # sees every file that Python opens; cannot be removed
    seen: list = []
    WATCHED[:] = [test, tmp_path, seen]
    try:
        evaluate_linear(linear_config((betons[0], test), run, tmp_path, features=("cls",)))
    finally:
        WATCHED.clear()
    assert seen
    assert all(all(both) for both in seen)


SCRIPT = Path(__file__).parents[1] / "eval" / "linear.py"
COMMAND = [sys.executable, shallow.PROGRAM, "2", str(SCRIPT)]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def flags(config):
    """The command line of a configuration."""
    words = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{field.name}", *map(str, values)]
    return words


def test_a_killed_evaluation_ends_with_the_weights_of_an_undisturbed_one(
    betons, run, finished, tmp_path
):
    _, undisturbed = finished
    out = tmp_path / "out"
    config = linear_config(betons, run, out, features=("cls", "inputs2"), save_every=1e-9)
    command = [*COMMAND, *flags(config)]
    process = forked.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    deadline = time.monotonic() + 120
    half_way = out / "checkpoints" / "step_00000014"  # of 30, within an epoch of 3
    while not half_way.exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "official").exists()
    done = forked.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout
    assert "official: epoch 1/10" not in done.stdout
    assert files(out) == files(undisturbed)
    first, second = (
        json.loads((folder / "result.json").read_text()) for folder in (undisturbed, out)
    )
    for mode in ("official", "fast"):
        assert second[mode]["top1"] == first[mode]["top1"]
        assert second[mode]["grid"] == first[mode]["grid"]


def test_two_ranks_learn_what_one_process_learns(betons, run, finished, tmp_path):
    result, out = finished
    config = linear_config(betons, run, tmp_path / "out", features=("cls", "inputs2"))
    forked.run_ranks(2, [*COMMAND, *flags(config)])
    both = json.loads((tmp_path / "out" / "result.json").read_text())
    assert both["ranks"] == 2
    for mode in ("official", "fast"):
        assert [both[mode][key] for key in ("top1", "top5")] == [
            result[mode][key] for key in ("top1", "top5")
        ]
        assert [row["held_out_top1"] for row in both[mode]["grid"]] == [
            row["held_out_top1"] for row in result[mode]["grid"]
        ]
        one, two = stored(out / mode), stored(tmp_path / "out" / mode)
        # L-BFGS ends where no entry of the gradient exceeds 1e-5. On torch 2.11 rounding lets it
        # end elsewhere, at another gradient: it can be held to its own tolerance only.
        ends = [found[mode].get("fit", {"gradient": 0})["gradient"] for found in (both, result)]
        tolerance = 1e-5 if ends[0] == pytest.approx(ends[1], rel=1e-3) else 1e-3
        for name in ("weight", "bias"):
            scale = one[name].abs().max()
            atol = tolerance * scale.item()
            torch.testing.assert_close(two[name], one[name], rtol=0, atol=atol)


def test_a_folder_of_another_evaluation_is_refused(betons, run, tmp_path):
    config = linear_config(betons, run, tmp_path / "out", features=("cls",), mode="fast")
    evaluate_linear(config)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for change, message in (
        ({"seed": 5}, "seed: 4 -> 5"),
        ({"lr": (0.1,)}, "lr: .*0.1, 1.0.* -> .*0.1"),
        ({"precision": "bf16"}, "precision: fp32 -> bf16"),
        ({"train": betons[1]}, "train: .*images:"),
        ({"role": "student"}, "role: teacher -> student; backbone: "),
    ):
        with pytest.raises(UserError, match=f"belongs to another evaluation .*{message}"):
            evaluate_linear(dataclasses.replace(config, **change))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    # what touches nothing stored may change
    changed = dataclasses.replace(
        config, test=betons[0], mode="both", num_workers=2, save_every=1.0
    )
    result = evaluate_linear(changed)
    assert result["test"]["path"] == betons[0]
    assert result["official"]["top1"] >= 0


def test_an_evaluation_goes_on_in_the_precision_in_which_it_was_begun(
    betons, run, tmp_path, monkeypatch
):
    options = {"features": ("cls",), "mode": "fast", "precision": "bf16"}
    config = linear_config(betons, run, tmp_path / "out", **options)
    evaluate_linear(config)
    lesser = precision.Precision("fp32", "a reason")
    monkeypatch.setattr(precision, "quickest", lambda device: lesser)
    again = evaluate_linear(dataclasses.replace(config, precision="auto"))
    assert again["precision"] == "bf16"
    stored = evaluate_config(betons, run, tmp_path / "out" / "fast", precision="auto")
    assert evaluate_linear(stored)["precision"] == "bf16"


def test_a_run_that_has_gone_on_is_another_backbone(betons, run, tmp_path):
    moving = tmp_path / "run"
    shutil.copytree(run, moving, symlinks=True)
    config = linear_config(betons, moving, tmp_path / "out", features=("cls",), mode="fast")
    evaluate_linear(config)
    torch.manual_seed(9)
    state = {f"backbone.{k}": v for k, v in build_xcit(ARCH, num_classes=0).state_dict().items()}
    states = {"student": state, "teacher": state}
    save_checkpoint(moving / "checkpoints", 13, states, {"arch": ARCH})
    with pytest.raises(UserError, match=r"\(backbone: .*name the step, --checkpoint RUN/checkp"):
        evaluate_linear(config)


def evaluate_config(betons, run, path, **options):
    small = {"resize": 32, "crop": 32, "num_workers": 1, "device": "cpu", "checkpoint": str(run)}
    small |= {"precision": "fp32"}
    return LinearConfig(**(small | {"test": betons[1], "evaluate": str(path)} | options))


@pytest.mark.parametrize("mode", ["official", "fast"])
def test_a_stored_classifier_is_evaluated_to_the_same_accuracy(
    betons, run, finished, tmp_path, mode
):
    result, out = finished
    config = evaluate_config(betons, run, out / mode, out=str(tmp_path))
    found = evaluate_linear(config)["evaluated"]
    assert (found["top1"], found["top5"]) == (result[mode]["top1"], result[mode]["top5"])
    assert found["backbone_checked"] is True
    assert json.loads((tmp_path / "evaluation.json").read_text())["evaluated"] == found
    # the accuracy is that of these weights: with others it is another
    classifier = load_classifier(out / mode)
    save_classifier(tmp_path / "other", classifier._replace(weight=-classifier.weight))
    other = evaluate_linear(evaluate_config(betons, run, tmp_path / "other"))["evaluated"]
    assert other["top1"] < found["top1"]


def test_a_classifier_is_refused_where_it_does_not_belong(betons, run, finished, tmp_path):
    _, out = finished
    few = tmp_path / "few"
    shutil.copytree(Path(betons[1]).with_suffix(""), few)
    shutil.rmtree(few / "7")
    for options, message in (
        ({"role": "student"}, "was trained on another network .*teacher of"),
        ({"checkpoint": "", "random_init": True, "arch": ARCH}, "was trained on another network"),
        ({"resize": 40}, "was trained with --resize 32: give the same"),
        ({"interpolation": "bilinear"}, "was trained with --interpolation bicubic"),
        ({"test": str(few)}, "has other classes than .*different: 7"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_linear(evaluate_config(betons, run, out / "official", **options))


def test_dinos_linear_file_is_evaluated_on_the_class_token_and_said_to_be_unchecked(
    betons, run, tmp_path, capsys
):
    test, labels = central(betons[1])
    train, train_labels = central(betons[0])
    weight, bias, _ = scikit_learn_fit(train["cls"], train_labels, 0.01)
    weight, bias = torch.from_numpy(weight).float(), torch.from_numpy(bias).float()
    path = tmp_path / "linear.pth"

    def save(weight, bias):
        state = {"module.linear.weight": weight, "module.linear.bias": bias}
        torch.save({"state_dict": state}, path)

    save(weight, bias)
    found = evaluate_linear(evaluate_config(betons, run, path))["evaluated"]
    right = (test["cls"] @ weight.double().T + bias.double()).argmax(1) == labels
    assert found["top1"] == pytest.approx(percent(right))
    assert found["top1"] > 50  # chance is 10
    assert found["backbone_checked"] is False
    assert "does not say which network it is for" in capsys.readouterr().out
    for other, message in (
        ((weight[:, :-1], bias), "is for 127 features, the network has 128"),
        ((weight[:-1], bias[:-1]), "has 9 classes, .* has 10"),
        ((weight, bias[:-1]), r"no linear probe: weight \(10, 128\), bias \(9,\)"),
    ):
        save(*other)
        with pytest.raises(UserError, match=message):
            evaluate_linear(evaluate_config(betons, run, path))


@shallow.either_depth
def test_without_a_choice_all_images_may_be_learnt_from(betons, tmp_path, depth):
    options = {"held_out": 0.0, "features": ("cls",), "lr": (1.0,), "l2": (0.01,)}
    with shallow.networks(depth):
        run = write_run(tmp_path / "run")
        result = evaluate_linear(linear_config(betons, run, tmp_path / "out", **options))
        (train, labels), (test, test_labels) = (central(path) for path in betons)
    assert result["held_out"]["images"] == 0
    assert result["official"]["training_images"] == 150
    weight, bias, _ = scikit_learn_fit(train["cls"], labels, 0.01)
    logits = test["cls"] @ torch.from_numpy(weight).T + torch.from_numpy(bias)
    assert result["fast"]["top1"] == pytest.approx(percent(logits.argmax(1) == test_labels))


def test_the_fast_protocol_takes_folders_and_the_official_one_says_what_to_do(
    betons, run, finished, tmp_path
):
    folders = [path.removesuffix(".beton") for path in betons]
    options = {"features": ("cls", "inputs2")}
    config = linear_config(folders, run, tmp_path / "out", mode="fast", **options)
    assert evaluate_linear(config)["fast"]["top1"] == finished[0]["fast"]["top1"]
    config = linear_config(folders, run, tmp_path / "other", **options)
    with pytest.raises(UserError, match=r"is a folder: write a file of it .* take --mode fast"):
        evaluate_linear(config)
    assert not (tmp_path / "other").exists()


def test_every_kind_of_feature_is_cut_from_what_is_stored_for_it(betons, run, tmp_path):
    kinds = ("patch", "inputs1", "cls", "inputs2", "cls+patch")
    options = {"mode": "fast", "l2": (0.01,)}
    config = linear_config(betons, run, tmp_path / "all", features=kinds, **options)
    together = evaluate_linear(config)["fast"]["grid"]
    (part,) = (tmp_path / "all" / "features").glob("train-*.safetensors")
    assert load_file(part).keys() == {"cls+patch", "inputs2", "labels", "indices"}
    for kind, row in zip(kinds, together, strict=True):
        config = linear_config(betons, run, tmp_path / kind, features=(kind,), **options)
        (alone,) = evaluate_linear(config)["fast"]["grid"]
        assert row["held_out_top1"] == alone["held_out_top1"]
        assert row["iterations"] == alone["iterations"]


def test_an_untrained_network_is_evaluated_too(betons, run, tmp_path, capsys):
    options = {"checkpoint": "", "random_init": True, "arch": ARCH, "features": ("cls",)}
    result = evaluate_linear(linear_config(betons, run, tmp_path, mode="fast", **options))
    assert (result["source"], result["seed"]) == ("random_init", 4)
    assert "untrained (seed 4)" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["official", "fast"])
def test_a_network_that_has_diverged_is_refused(betons, tmp_path, mode):
    state = lively_backbone(1).state_dict()
    state["norm.bias"][3] = torch.nan
    torch.save(state, tmp_path / "a.pth")
    config = linear_config(betons, tmp_path / "a.pth", tmp_path / "out", mode=mode)
    with pytest.raises(UserError, match=r"features contain NaN .* take an earlier checkpoint"):
        evaluate_linear(config)


def test_what_does_not_fit_is_refused_before_anything_is_written(betons, run, tmp_path):
    out = tmp_path / "out"
    write_beton(
        Path(betons[0]).with_suffix(""), tmp_path / "none.beton", labels=False, progress=False
    )
    for options, message in (
        ({"test": "/no/such.beton"}, "no images at /no/such.beton"),
        ({"train": str(tmp_path / "none.beton")}, "none.beton has no labels"),
        ({"checkpoint": "/no/such"}, "no checkpoint at /no/such"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_linear(linear_config(betons, run, out, **options))
        assert not out.exists()
    with pytest.raises(UserError, match="fewer than one global batch"):
        evaluate_linear(linear_config(betons, run, out, batch_size=999))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": ""}, "exactly one of --checkpoint and --random-init"),
        ({"train": "", "out": ""}, "missing --train, --out"),
        ({"evaluate": "x"}, "drop --train"),
        ({"features": ()}, "features must name at least one"),
        ({"lr": (0.1, 0.1)}, "lr must name at least one value, each once"),
        ({"held_out": 0.0}, "held_out must be above 0 to choose among 4 values of features"),
        ({"held_out": 0.0, "features": ("cls",)}, "choose among 2 values of lr"),
        ({"held_out": 1.0}, r"held_out must be in \[0, 1\)"),
        ({"l2": (0.1, 0.0)}, "l2 must be > 0"),
        ({"scale": (0.5, 0.2)}, "scale must be"),
        ({"crop": 64}, "crop must be <= resize"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(betons, options, message):
    with pytest.raises(UserError, match=message):
        linear_config(betons, "run", **({"out": "out"} | options))
