import copy
import dataclasses
import functools
import gzip
import json
import math
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import forked
import numpy as np
import pytest
import shallow
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_xcit.checkpoints.folder import save_checkpoint
from ssl_xcit.data.beton import Beton
from ssl_xcit.data.datasets import check_datasets
from ssl_xcit.data.loader import EvalLoader
from ssl_xcit.data.views import EvalView
from ssl_xcit.data.writer import write_beton
from ssl_xcit.dino.config import Crops, TrainConfig
from ssl_xcit.dino.config import Probe as ProbeSettings
from ssl_xcit.dino.probe import Probe
from ssl_xcit.evaluation import knn
from ssl_xcit.evaluation.cache import fingerprint, load_features
from ssl_xcit.evaluation.config import KnnConfig
from ssl_xcit.evaluation.features import Features
from ssl_xcit.evaluation.knn import cosine_top_k, evaluate_knn, predictions, weighted_vote
from ssl_xcit.models.variants import VARIANTS
from ssl_xcit.models.xcit import build_xcit
from ssl_xcit.runtime import distributed, precision
from ssl_xcit.runtime.config import save_config
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.runtime.sealed import read_sealed
from ssl_xcit.training.config import Run

CPU = torch.device("cpu")
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(scope="module", autouse=True)
def _shallow_networks():
    with shallow.networks():
        yield


def clusters(n, classes, d, seed, spread=1.0, dtype=torch.float64):
    """Features around one random centre per class, overlapping, of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (n,), generator=generator)
    features = centres[labels] + spread * torch.randn(n, d, generator=generator)
    lengths = 10 ** (4 * torch.rand(n, 1, generator=generator) - 2)
    return (features.double() * lengths).to(dtype), labels


def duplicates(n, distinct, d, classes, seed):
    """Few distinct vectors, each many times under different labels: ties everywhere."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(distinct, d, generator=generator)
    features = vectors[torch.randint(distinct, (n,), generator=generator)]
    return features, torch.randint(classes, (n,), generator=generator)


def knn_predictions(train, labels, test, ks, temperature=0.07):
    """{k: classes of each test image, best first}"""
    return dict(zip(ks, predictions(train, labels, test, (temperature,), ks), strict=True))


def knn_accuracy(train, train_labels, test, test_labels, ks, temperature=0.07):
    """{k: (top-1, top-5) in percent}"""
    sets = (train, train_labels), (test, test_labels)
    features = [Features(rows, labels, torch.arange(len(labels))) for rows, labels in sets]
    rows = knn.knn(*features, ks, (temperature,), distributed.Distributed(0, 1, 0, CPU))
    return {row["k"]: (row["top1"], row["top5"]) for row in rows}


def sklearn_knn(k, temperature, train, labels):
    classifier = KNeighborsClassifier(
        n_neighbors=k,
        metric="cosine",
        algorithm="brute",
        weights=lambda distances: np.exp((1 - distances) / temperature),
    )
    return classifier.fit(train.double().numpy(), labels.numpy())


def naive_ranking(similarities, labels, num_classes, k, temperature):
    """The vote of one test image: a dictionary of scores, sorted."""
    scores = defaultdict(float)
    for similarity, label in list(zip(similarities, labels, strict=True))[:k]:
        scores[label] += math.exp(similarity / temperature)
    ranking = sorted(range(num_classes), key=lambda c: (-scores[c], c))
    return ranking[: min(5, k, len(labels))]


def naive_neighbours(train, query, k):
    """(similarity, index), nearest first, of one query: exact sums, equal vectors tie."""

    def dot(a, b):
        return math.fsum(x * y for x, y in zip(a, b, strict=True))

    def cosine(a, b):
        lengths = math.sqrt(dot(a, a) * dot(b, b))
        return dot(a, b) / lengths if lengths else 0.0

    pairs = [(-cosine(row, query), i) for i, row in enumerate(train)]
    return [(-s, i) for s, i in sorted(pairs)[:k]]


@pytest.mark.parametrize(("classes", "d"), [(2, 3), (7, 16), (100, 24)])
def test_every_prediction_and_neighbour_equals_scikit_learn_on_clusters(classes, d):
    train, labels = clusters(600, classes, d, seed=1, spread=1.5)
    test, _ = clusters(250, classes, d, seed=2, spread=1.5)
    ks = (1, 2, 5, 20, 200)
    for temperature in (0.02, 0.07, 1.0):
        found = knn_predictions(train, labels, test, ks, temperature)
        for k in ks:
            oracle = sklearn_knn(k, temperature, train, labels)
            assert np.array_equal(found[k][:, 0].numpy(), oracle.predict(test.numpy()))
    similarities, indices = cosine_top_k(train, test, 200)
    distances, neighbours = oracle.kneighbors(test.numpy())
    assert np.array_equal(indices.numpy(), neighbours)
    np.testing.assert_allclose(similarities.numpy(), 1 - distances, rtol=0, atol=1e-9)


@pytest.mark.skipif(not FASHION_MNIST.exists(), reason="needs Debian's dataset-fashion-mnist")
@pytest.mark.parametrize(
    ("n", "m", "ks"),
    [
        (6000, 500, (1, 5, 20, 200)),  # three blocks of training images
        pytest.param(60000, 10000, (5,), marks=pytest.mark.long),
    ],
)
def test_every_prediction_equals_scikit_learn_on_fashion_mnist_pixels(n, m, ks):
    def read(split, count):
        images = gzip.decompress((FASHION_MNIST / f"{split}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((FASHION_MNIST / f"{split}-labels-idx1-ubyte.gz").read_bytes())
        images = np.frombuffer(images, np.uint8, count * 784, offset=16).reshape(count, 784)
        labels = np.frombuffer(labels, np.uint8, count, offset=8).astype(np.int64)
        return torch.tensor(images), torch.tensor(labels)

    (train, train_labels), (test, test_labels) = read("train", n), read("t10k", m)
    found = knn_predictions(train, train_labels, test, ks)
    accuracy = knn_accuracy(train, train_labels, test, test_labels, ks)
    for k in ks:
        oracle = sklearn_knn(k, 0.07, train, train_labels)
        expected = oracle.predict(test.double().numpy())
        assert np.array_equal(found[k][:, 0].numpy(), expected)
        assert accuracy[k][0] == pytest.approx(100 * (expected == test_labels.numpy()).mean())
    assert accuracy[5][0] > 70  # the pixels are those of the labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
def test_neighbours_equal_a_sorted_loop_and_ties_go_to_the_earlier_training_image(dtype):
    train, _ = duplicates(60, 9, 5, 4, seed=3)
    train = (train * 20).abs().to(dtype)
    test = torch.cat((train[5:15], train.flip(1)[:10]))
    similarities, indices = cosine_top_k(train, test, 17)
    for row, query in enumerate(test.tolist()):
        expected = naive_neighbours(train.tolist(), query, 17)
        assert indices[row].tolist() == [i for _, i in expected]
        assert similarities[row].tolist() == pytest.approx([s for s, _ in expected], abs=1e-9)


def test_any_block_size_gives_the_same_bits():
    train, labels = duplicates(90, 20, 33, 5, seed=4)
    test, _ = duplicates(20, 20, 33, 5, seed=5)
    expected = cosine_top_k(train, test, 20)
    for chunk in (1, 3, 64, 1000):
        found = cosine_top_k(train, test, 20, chunk)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        neighbours = labels[found[1]]
        votes = weighted_vote(found[0], neighbours, 5, 20, 0.07)
        assert torch.equal(votes, knn_predictions(train, labels, test, [20])[20])


def test_the_length_of_a_feature_does_not_matter_and_a_zero_is_similar_to_nothing():
    train, _ = clusters(50, 3, 8, seed=6)
    test, _ = clusters(20, 3, 8, seed=7)
    expected = cosine_top_k(train, test, 10)
    scaled = cosine_top_k(train * torch.logspace(-3, 3, 50)[:, None], test * 7, 10)
    assert all(torch.equal(a, b) for a, b in zip(scaled, expected, strict=True))
    similarities, indices = cosine_top_k(train, torch.zeros(1, 8), 3)
    assert similarities.tolist() == [[0, 0, 0]]
    assert indices.tolist() == [[0, 1, 2]]


def test_no_tensor_of_the_search_and_the_vote_outgrows_its_block(monkeypatch):
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if isinstance(result, torch.Tensor) and not result._is_view():
                self.elements = max(self.elements, result.numel())
            return result

    train, labels = clusters(300, 60, 3, seed=8)
    test, _ = clusters(250, 60, 3, seed=9)
    expected = knn_predictions(train, labels, test, [4])[4]
    monkeypatch.setattr(knn, "BLOCK_ELEMENTS", 1024)
    with Largest() as largest:
        found = knn_predictions(train, labels, test, [4])[4]
    assert torch.equal(found, expected)
    # all pairs are 75,000, all class scores 15,000; neighbours and predictions 1,000 and 1,250
    assert largest.elements <= 1250


def test_wide_features_get_narrow_blocks(monkeypatch):
    sizes = []
    nearest = knn._nearest

    def spy(train, queries, k, chunk):
        sizes.append(chunk)
        return nearest(train, queries, k, chunk)

    monkeypatch.setattr(knn, "_nearest", spy)
    monkeypatch.setattr(knn, "BLOCK_ELEMENTS", 400)
    for d, expected in ((5, 20), (100, 4), (1000, 1)):
        cosine_top_k(torch.rand(30, d), torch.rand(3, d), 2)
        assert sizes.pop() == expected


@pytest.mark.parametrize("num_classes", [1, 2, 4, 30])
@pytest.mark.parametrize("temperature", [0.03, 0.07, 0.5])
def test_the_vote_equals_a_naive_loop_at_every_rank(num_classes, temperature):
    generator = torch.Generator().manual_seed(10)
    similarities = torch.rand(40, 25, generator=generator, dtype=torch.float64) * 2 - 1
    similarities = similarities.sort(dim=1, descending=True).values
    labels = torch.randint(num_classes, (40, 25), generator=generator)
    for k in (1, 3, 5, 10, 25, 100):
        found = weighted_vote(similarities, labels, num_classes, k, temperature)
        for row, ranking in enumerate(found.tolist()):
            assert ranking == naive_ranking(
                similarities[row].tolist(), labels[row].tolist(), num_classes, k, temperature
            )


def test_few_near_neighbours_outvote_many_far_ones_only_at_a_low_temperature():
    similarities = torch.tensor([[0.9, 0.7, 0.7, 0.7]])
    labels = torch.tensor([[1, 0, 0, 0]])
    assert weighted_vote(similarities, labels, 2, 4, 0.07).tolist() == [[1, 0]]
    assert weighted_vote(similarities, labels, 2, 4, 1.0).tolist() == [[0, 1]]
    assert weighted_vote(similarities, labels, 2, 1, 1.0).tolist() == [[1]]


def test_equal_scores_rank_by_class_number_also_among_classes_without_votes():
    similarities = torch.full((1, 6), 0.25)
    labels = torch.tensor([[6, 3, 6, 3, 5, 5]])
    assert weighted_vote(similarities, labels, 8, 6, 0.07).tolist() == [[3, 5, 6, 0, 1]]


def test_a_tiny_temperature_neither_overflows_nor_loses_the_nearest():
    train, labels = clusters(100, 5, 4, seed=11)
    test, _ = clusters(30, 5, 4, seed=12)
    found = knn_predictions(train, labels, test, [1, 50], 1e-5)  # exp(1e5) is infinite
    assert torch.equal(found[50][:, 0], found[1][:, 0])


def naive_accuracy(train, train_labels, test, test_labels, k, temperature):
    classes = sorted(set(train_labels.tolist()))
    hits = [0, 0]
    for query, label in zip(test.tolist(), test_labels.tolist(), strict=True):
        neighbours = naive_neighbours(train.tolist(), query, k)
        voters = [classes.index(train_labels[i]) for _, i in neighbours]
        similarities = [s for s, _ in neighbours]
        ranking = naive_ranking(similarities, voters, len(classes), k, temperature)
        ranking = [classes[c] for c in ranking]
        hits[0] += ranking[0] == label
        hits[1] += label in ranking
    return tuple(100 * h / len(test) for h in hits)


@pytest.mark.parametrize("n", [1, 3, 7, 80])
@pytest.mark.parametrize("m", [1, 7])
def test_accuracy_equals_a_naive_loop_for_any_number_of_images_and_k(n, m):
    train, train_labels = clusters(n, 12, 4, seed=13, spread=2, dtype=torch.float32)
    test, test_labels = clusters(m, 12, 4, seed=14, spread=2, dtype=torch.float32)
    ks = (1, 4, 20, 200)
    found = knn_accuracy(train, train_labels, test, test_labels, ks, 0.07)
    assert tuple(found) == ks
    for k in ks:
        expected = naive_accuracy(train, train_labels, test, test_labels, k, 0.07)
        assert found[k] == pytest.approx(expected)


def test_a_k_beyond_the_training_set_is_the_whole_training_set():
    train, train_labels = clusters(30, 3, 4, seed=15)
    test, test_labels = clusters(50, 3, 4, seed=16)
    found = knn_accuracy(train, train_labels, test, test_labels, (30, 31, 1000))
    assert found[30] == found[31] == found[1000]


def test_a_single_class_is_always_right():
    features, _ = clusters(9, 1, 4, seed=17)
    labels = torch.full((9,), 3)
    found = knn_accuracy(features, labels, features, labels, (1, 20))
    assert found == {1: (100.0, 100.0), 20: (100.0, 100.0)}


def test_class_numbers_may_be_anything_and_an_unseen_one_is_wrong():
    train, train_labels = clusters(80, 4, 6, seed=18)
    test, test_labels = clusters(40, 4, 6, seed=19)
    names = torch.tensor([-5, 0, 3, 10**15])  # a table indexed by label would not fit
    plain = knn_accuracy(train, train_labels, test, test_labels, (5,))
    assert knn_accuracy(train, names[train_labels], test, names[test_labels], (5,)) == plain
    unseen = torch.full_like(test_labels, 4)
    assert knn_accuracy(train, train_labels, test, unseen, (5,)) == {5: (0.0, 0.0)}


def test_one_search_serves_every_k(monkeypatch):
    train, train_labels = clusters(120, 6, 5, seed=20)
    test, test_labels = clusters(60, 6, 5, seed=21)
    alone = [knn_accuracy(train, train_labels, test, test_labels, (k,))[k] for k in (100, 3, 17)]
    searches = []

    def counted(*arguments):
        searches.append(arguments)
        return cosine_top_k(*arguments)

    monkeypatch.setattr(knn, "cosine_top_k", counted)
    together = knn_accuracy(train, train_labels, test, test_labels, (100, 3, 17))
    assert list(together.values()) == alone
    assert len(set(alone)) > 1
    assert len(searches) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["training", "test"])
def test_features_that_are_not_finite_are_refused(bad, which):
    train, labels = clusters(10, 2, 3, seed=22)
    test = train.clone()
    (train if which == "training" else test)[4, 1] = bad
    with pytest.raises(UserError, match=f"the {which} features contain NaN"):
        knn_accuracy(train, labels, test, labels, (1,))


def test_k_below_one_is_refused():
    features, labels = clusters(10, 2, 3, seed=23)
    with pytest.raises(UserError, match="at least 1, got 0"):
        knn_accuracy(features, labels, features, labels, (10, 0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_gpu_gives_the_same_predictions():
    train, labels = duplicates(3000, 500, 64, 20, seed=24)
    test, _ = duplicates(1000, 500, 64, 20, seed=25)
    expected = knn_predictions(train, labels, test, (1, 20, 200))
    found = knn_predictions(train.cuda(), labels.cuda(), test.cuda(), (1, 20, 200))
    for k in expected:
        assert torch.equal(found[k].cpu(), expected[k])


ARCH = "xcit_nano_12_p16"


def knn_config(betons, **options):
    view = {"resize": 32, "crop": 32, "num_workers": 1, "device": "cpu"}
    options = {"precision": "fp32"} | options
    return KnnConfig(train=betons[0], test=betons[1], **view, **options)


def write_images(folder, counts, seed, mode="RGB", **options):
    """A .beton of 32 x 32 images, `counts[name]` in class `name`: noise on a colour per class."""
    random = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        colour = 60 + 40 * (ord(name[0]) % 4)
        for i in range(count):
            pixels = np.clip(random.normal(colour, 60, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).convert(mode).save(folder / name / f"{i}.png")
    path = folder.with_suffix(".beton")
    write_beton(folder, path, progress=False, **options)
    return str(path)


@pytest.fixture(scope="module")
def betons(tmp_path_factory):
    folder = tmp_path_factory.mktemp("knn")
    train = write_images(folder / "train", {"a": 20, "b": 15, "c": 5}, seed=1)
    return train, write_images(folder / "test", {"a": 20, "b": 20, "c": 10}, seed=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder whose student and teacher differ, and whose crops had their own statistics."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    states = {}
    for seed, role in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        backbone = build_xcit(ARCH, num_classes=0)
        states[role] = {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
        states[role]["head.mlp.0.weight"] = torch.zeros(3)
    save_checkpoint(folder / "checkpoints", 12, states, {"arch": ARCH})
    crops = Crops(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    save_config(
        TrainConfig(arch=ARCH, data="x.beton", out=str(folder), crops=crops), folder / "config.yaml"
    )
    return folder


def top1(result):
    """{k: percent} of a result with one temperature."""
    assert len({row["temperature"] for row in result["accuracy"]}) == 1
    return {row["k"]: row["top1"] for row in result["accuracy"]}


@functools.cache
def expected_features(depth, seed, path, mean, std):
    """({kind: features}, labels) from the model and the images, in float64."""
    torch.manual_seed(seed)
    model = build_xcit(ARCH, num_classes=0).double().eval()
    ((images, labels, _),) = EvalLoader(path, EvalView(32, 32), 64, num_threads=1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    with torch.no_grad():
        cls, patches = model.forward_features((images.double() / 255 - mean) / std)
    patch = patches.mean(dim=1)
    return {"cls": cls, "patch": patch, "cls+patch": torch.cat((cls, patch), dim=1)}, labels


def expected_accuracy(seed, betons, which, ks, mean, std):
    """From the model and the images, by scikit-learn."""
    depth, sets = VARIANTS["xcit_nano_12"].depth, []
    for path in betons:
        features, labels = expected_features(depth, seed, path, mean, std)
        sets.append((features[which], labels))
    (train, train_labels), (test, test_labels) = sets
    return {k: 100 * sklearn_knn(k, 0.07, train, train_labels).score(test, test_labels) for k in ks}


@pytest.mark.parametrize("which", ["cls", "patch", "cls+patch"])
@pytest.mark.parametrize(("role", "seed"), [("student", 0), ("teacher", 1)])
def test_a_run_folder_is_evaluated_with_its_own_weights_and_statistics(
    betons, run, which, role, seed
):
    ks = (1, 3, 5, 9, 15, 40)
    config = knn_config(betons, checkpoint=str(run), role=role, features=(which,), k=ks)
    result = evaluate_knn(config)
    expected = expected_accuracy(seed, betons, which, ks, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert top1(result) == pytest.approx(expected)
    assert (result["source"], result["role"], result["arch"]) == ("checkpoint", role, ARCH)
    assert result["step"] == 12
    assert result["checkpoint"] == str(run / "checkpoints" / "step_00000012")
    assert result["transform"]["mean"] == [0.1, 0.2, 0.3]


def test_the_result_is_printed_and_stored_with_all_that_decided_it(betons, run, capsys, tmp_path):
    out = tmp_path / "new" / "result.json"
    seven = write_images(tmp_path / "seven", {"a": 3, "b": 2, "c": 2}, seed=2)
    betons = (betons[0], seven)
    config = knn_config(betons, checkpoint=str(run), k=(2, 200), out=str(out))
    result = evaluate_knn(config)
    stored = read_sealed(out)
    assert stored == json.loads(json.dumps(result))
    assert [path.name for path in out.parent.iterdir()] == ["result.json"]
    assert stored["train"] == {"path": betons[0], "images": 40, "classes": 3}
    assert stored["test"] == {"path": betons[1], "images": 7, "classes": 3}
    assert [(row["k"], row["voters"]) for row in stored["accuracy"]] == [(2, 2), (200, 40)]
    assert stored["accuracy"][1]["top5"] == 100.0
    assert stored["features"] == ["cls"]
    assert {row["temperature"] for row in stored["accuracy"]} == {0.07}
    assert stored["transform"]["interpolation"] == "bicubic"
    assert stored["versions"]["torch"] == torch.__version__
    assert min(stored["seconds"].values()) > 0
    printed = capsys.readouterr().out
    assert f"k-NN: {ARCH}, teacher of {run}" in printed
    assert "7 test images, 40 training images, 3 classes\n" in printed
    row = result["accuracy"][0]
    assert f"       cls     2    0.07{row['top1']:>10.2f}{row['top5']:>10.2f}\n" in printed
    assert "100.00   only 40 training images: all of them vote\n" in printed


@pytest.fixture
def _networks(depth):
    with shallow.networks(depth):
        yield


@shallow.either_depth
@pytest.mark.usefixtures("_networks")
def test_the_untrained_network_is_that_of_its_seed_and_no_other_draw_changes(betons):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    results = {}
    for seed in (0, 1):
        config = knn_config(betons, arch=ARCH, random_init=True, seed=seed, k=(1, 5))
        results[seed] = evaluate_knn(config)
        assert torch.equal(torch.get_rng_state(), state)
        assert (results[seed]["source"], results[seed]["seed"]) == ("random_init", seed)
    for seed, result in results.items():
        imagenet = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
        assert result["transform"]["mean"] == list(imagenet["mean"])
        assert top1(result) == pytest.approx(
            expected_accuracy(seed, betons, "cls", (1, 5), **imagenet)
        )


def test_pixels_are_compared_as_they_lie_in_the_files(betons):
    result = evaluate_knn(knn_config(betons, pixels=True, k=(1, 5)))
    sets = []
    for path in betons:
        files = sorted(Path(path).with_suffix("").glob("*/*.png"))
        pixels = torch.stack([torch.tensor(np.array(Image.open(file))).flatten() for file in files])
        sets.append((pixels, torch.tensor(["abc".index(file.parent.name) for file in files])))
    (train, train_labels), (test, test_labels) = sets
    for k in (1, 5):
        oracle = sklearn_knn(k, 0.07, train, train_labels)
        assert top1(result)[k] == pytest.approx(100 * oracle.score(test, test_labels))
    assert (result["source"], result["features"], result["arch"]) == ("pixels", ["pixels"], None)


def test_the_search_gets_the_views_and_settings_of_the_configuration(betons, monkeypatch):
    calls = []

    def spy(*arguments):
        calls.append(arguments)
        return predictions(*arguments)

    monkeypatch.setattr(knn, "predictions", spy)
    config = knn_config(betons, pixels=True, k=(3, 4), temperature=(0.5, 0.01), batch_size=16)
    config = dataclasses.replace(config, resize=27, crop=20, interpolation="bilinear")
    result = evaluate_knn(config)
    ((train, train_labels, test, *settings),) = calls  # one search
    assert settings == [(0.5, 0.01), (3, 4)]
    sets = [next(iter(EvalLoader(p, EvalView(27, 20, "bilinear"), 99))) for p in betons]
    assert torch.equal(train, sets[0][0].flatten(1))
    assert torch.equal(train_labels, sets[0][1])
    assert torch.equal(test, sets[1][0].flatten(1))
    found = {(row["k"], row["temperature"]): row["top1"] for row in result["accuracy"]}
    for (k, temperature), percent in found.items():
        oracle = sklearn_knn(k, temperature, train, train_labels)
        assert percent == pytest.approx(100 * oracle.score(test.double().numpy(), sets[1][1]))
    assert len(found) == 4


def test_files_whose_labels_do_not_fit_are_refused_by_name(betons, tmp_path):
    train, test = betons
    cases = {
        "unlabelled": ({"a": 2, "b": 1}, {"labels": False}, "has no labels"),
        "fewer": ({"a": 2, "b": 1}, {}, "other classes .* different: c"),
        "others": ({"a": 1, "b": 1, "d": 1}, {}, "different: c, d"),
    }
    for name, (counts, options, message) in cases.items():
        path = write_images(tmp_path / name, counts, 3, **options)
        for pair in ((train, path), (path, test)):
            with pytest.raises(UserError, match=message) as error:
                evaluate_knn(knn_config(pair, pixels=True))
            assert path in str(error.value)


def test_classes_without_training_images_are_refused_where_names_are_unknown(betons):
    few, many = (Beton(path) for path in betons)
    few.class_names = many.class_names = None  # as in a file of stock ffcv
    few.labels, many.labels = np.array([0, 2, 2]), np.array([0, 1, 2, 3])
    check_datasets(many, few)
    with pytest.raises(UserError, match=r"test.beton has 2 classes that .*train.beton .* 1, 3"):
        check_datasets(few, many)


def test_a_checkpoint_of_another_architecture_or_channel_count_is_refused(betons, run, tmp_path):
    with pytest.raises(UserError, match="is a xcit_nano_12_p16, not a xcit_nano_12_p8"):
        evaluate_knn(knn_config(betons, checkpoint=str(run), arch="xcit_nano_12_p8"))
    gray = [
        write_images(tmp_path / name, {"a": 2, "b": 2}, 4, mode="L", channels=1)
        for name in ("train", "test")
    ]
    with pytest.raises(UserError, match=r"takes images of 3 channels, .*train.beton has 1"):
        evaluate_knn(knn_config(gray, checkpoint=str(run)))


def test_a_checkpoint_with_missing_and_unknown_keys_is_refused(betons, tmp_path):
    state = build_xcit(ARCH, num_classes=0).state_dict()
    state["pos_embed.weight"] = state.pop("pos_embeder.token_projection.weight")
    torch.save(state, tmp_path / "foreign.pth")
    config = knn_config(betons, checkpoint=str(tmp_path / "foreign.pth"))
    with pytest.raises(
        UserError,
        match=r"foreign.pth is no .*1 missing \(pos_embeder.*1 unknown \(pos_embed.weight\)",
    ):
        evaluate_knn(config)


def test_a_result_that_cannot_be_written_is_still_printed(betons, tmp_path, capsys):
    (tmp_path / "file").touch()
    config = knn_config(betons, pixels=True, k=(1,), out=str(tmp_path / "file" / "x.json"))
    with pytest.raises(UserError, match=r"file: cannot be written: .*choose another place"):
        evaluate_knn(config)
    assert "top-1" in capsys.readouterr().out


def test_a_probe_equals_the_evaluation_and_leaves_the_model_as_it_was(betons):
    torch.manual_seed(3)
    model = build_xcit(ARCH, num_classes=0, drop_path_rate=0.5).train()
    model.blocks[0].local_mp.bn.eval()
    before, draws = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    sources = dict(zip(("probe_train", "probe_test"), betons, strict=True))
    probe = ProbeSettings(every=1, probe_k=5, probe_resize=32, probe_crop=32, **sources)
    run = Run(precision="fp32", device="cpu", num_workers=1)
    settings = TrainConfig(ARCH, data="", out="", probe=probe, run=run)
    found = Probe(settings, distributed.setup("cpu"))(model)
    imagenet = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    for kind in ("cls", "patch"):
        expected = expected_accuracy(3, betons, kind, (5,), **imagenet)[5]
        assert found[f"probe/top1_{kind}"] == pytest.approx(expected)
    assert [module.training for module in model.modules()] == modes
    torch.set_rng_state(draws)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_folders_of_images_give_the_result_of_the_files_written_from_them(betons, run):
    folders = [path.removesuffix(".beton") for path in betons]  # PNGs, stored as they are
    found = [
        evaluate_knn(knn_config(pair, checkpoint=str(run), k=(1, 5, 20)))
        for pair in (betons, folders, (betons[0], folders[1]))
    ]
    assert top1(found[0]) == top1(found[1]) == top1(found[2])
    assert found[1]["train"] == {"path": folders[0], "images": 40, "classes": 3}


SMALL_PARTS = """
import time
from ssl_xcit.evaluation import cache, features
from ssl_xcit.runtime.config import run_command
from ssl_xcit.evaluation.config import KnnConfig

def slowly(*arguments, extract=features.extract_features, **options):
    time.sleep(0.05)  # or the last part might be there before a kill comes
    return extract(*arguments, **options)

cache.PART = 8
features.extract_features = slowly
run_command(KnnConfig, "ssl_xcit.evaluation.knn:evaluate_knn")
"""


def knn_command(tmp_path, betons, run, *options):
    script = tmp_path / "small_parts.py"
    script.write_text(SMALL_PARTS)
    view = ["--resize", "32", "--crop", "32", "--num_workers", "1", "--device", "cpu"]
    view += ["--precision", "fp32"]
    data = ["--train", betons[0], "--test", betons[1], "--checkpoint", str(run)]
    return [
        sys.executable,
        shallow.PROGRAM,
        "2",
        str(script),
        *data,
        *view,
        "--k",
        "1",
        "5",
        "20",
        *options,
    ]


def test_a_killed_evaluation_continues_with_the_features_it_has(betons, run, tmp_path):
    folder, out = tmp_path / "features", tmp_path / "result.json"
    options = ["--save-features", str(folder), "--out", str(out)]
    command = knn_command(tmp_path, betons, run, *options)
    process = forked.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("train-*.safetensors"))) < 2 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert not (folder / "features.json").exists()
    made = {path: path.stat().st_mtime_ns for path in folder.glob("train-*.safetensors")}
    assert len(made) >= 2
    forked.run(command, check=True, timeout=120, capture_output=True)
    assert len(list(folder.glob("train-*.safetensors"))) == 5  # of 8 images
    assert len(list(folder.glob("test-*.safetensors"))) == 6
    assert all(path.stat().st_mtime_ns == when for path, when in made.items())
    options = {"k": (1, 5, 20), "checkpoint": str(run)}
    undisturbed = evaluate_knn(knn_config(betons, **options))
    assert json.loads(out.read_text())["accuracy"] == undisturbed["accuracy"]

    # and the search alone, from the folder
    loaded = evaluate_knn(KnnConfig(load_features=str(folder), k=(1, 5, 20)))
    stored = json.loads(json.dumps(undisturbed))
    for key in ("accuracy", "arch", "checkpoint", "step", "train", "test", "transform"):
        assert json.loads(json.dumps(loaded[key])) == stored[key]


def test_several_kinds_of_features_are_what_each_is_alone(betons, run, tmp_path):
    folder, kinds = tmp_path / "features", ("patch", "cls")
    options = {"checkpoint": str(run), "k": (1, 5)}
    several = evaluate_knn(knn_config(betons, **options, features=kinds, save_features=str(folder)))
    alone = [evaluate_knn(knn_config(betons, **options, features=(kind,))) for kind in kinds]
    assert several["features"] == list(kinds)
    assert several["accuracy"] == [row for result in alone for row in result["accuracy"]]
    assert [row["features"] for row in several["accuracy"]] == ["patch", "patch", "cls", "cls"]
    search = KnnConfig(load_features=str(folder), k=(1, 5))
    assert evaluate_knn(search)["accuracy"] == several["accuracy"]
    # a folder of a version that knew one kind
    facts = read_sealed(folder / "features.json") | {"features": "cls"}
    (folder / "features.json").write_text(json.dumps(facts))
    assert evaluate_knn(search)["accuracy"] == alone[1]["accuracy"]


def test_two_ranks_predict_what_one_process_predicts(betons, run, tmp_path):
    out = tmp_path / "result.json"
    options = ["--save-features", str(tmp_path / "features"), "--out", str(out)]
    forked.run_ranks(2, knn_command(tmp_path, betons, run, *options))
    result = json.loads(out.read_text())
    assert result["ranks"] == 2
    alone = evaluate_knn(knn_config(betons, checkpoint=str(run), k=(1, 5, 20)))
    assert result["accuracy"] == alone["accuracy"]
    for name, path in zip(("train", "test"), betons, strict=True):
        features = load_features(tmp_path / "features", name)["cls"]
        assert features.indices.tolist() == list(range(len(Beton(path))))
        assert features.labels.tolist() == Beton(path).labels.tolist()


def test_features_of_another_evaluation_are_refused_and_not_overwritten(betons, run, tmp_path):
    folder = tmp_path / "features"
    config = knn_config(betons, checkpoint=str(run), k=(1,), save_features=str(folder))
    evaluate_knn(config)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    others = {
        "subject, statistics": {"checkpoint": "", "random_init": True, "arch": ARCH},
        "view": {"resize": 36},
        "kinds": {"features": ("patch",)},
        "images": {"train": betons[1]},
        "precision": {"precision": "bf16"},
    }
    for different, change in others.items():
        with pytest.raises(UserError, match=rf"train-00000000.* \(different: {different}\)"):
            evaluate_knn(dataclasses.replace(config, **change))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before

    file = folder / "test-00000000.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"test-00000000\.safetensors is damaged .*: remove it"):
        evaluate_knn(KnnConfig(load_features=str(folder)))
    with pytest.raises(UserError, match="damaged"):
        evaluate_knn(config)
    file.unlink()
    evaluate_knn(config)  # makes it again
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "features.json").unlink()
    with pytest.raises(UserError, match=f"{folder} holds no complete features"):
        evaluate_knn(KnnConfig(load_features=str(folder)))


@pytest.mark.parametrize("kind", ["beton", "stock beton", "folder"])
def test_features_of_other_images_of_the_same_sizes_and_labels_are_refused(
    betons, run, tmp_path, kind, monkeypatch
):
    source = Path(betons[0].removesuffix(".beton"))
    other = tmp_path / "other"
    shutil.copytree(source, other)
    for path in other.rglob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    sources = [str(source), str(other)]
    if kind != "folder":
        sources = [betons[0], str(tmp_path / "other.beton")]
        write_beton(other, sources[1], progress=False)
        assert np.array_equal(*(Beton(path).sizes for path in sources))
        assert np.array_equal(*(Beton(path).labels for path in sources))
    if kind == "stock beton":
        monkeypatch.setattr(Beton, "_read_notes", lambda *_: None)  # nor has it checksums
        assert Beton(sources[0]).checksums is None
    options = {"checkpoint": str(run), "k": (1,), "save_features": str(tmp_path / "features")}
    for path in (sources[0], sources[0]):  # the second time from the folder
        evaluate_knn(dataclasses.replace(knn_config(betons, **options), train=path))
    with pytest.raises(UserError, match=r"train-00000000.* \(different: images\)"):
        evaluate_knn(dataclasses.replace(knn_config(betons, **options), train=sources[1]))


def test_features_go_on_in_the_precision_in_which_they_were_begun(
    betons, run, tmp_path, monkeypatch
):
    options = {"checkpoint": str(run), "k": (1,), "save_features": str(tmp_path)}
    config = knn_config(betons, **options, precision="bf16")
    whole = evaluate_knn(config)
    (tmp_path / "features.json").unlink()
    (tmp_path / "test-00000000.safetensors").unlink()
    lesser = precision.Precision("fp32", "a reason")
    monkeypatch.setattr(precision, "quickest", lambda device: lesser)
    rest = evaluate_knn(dataclasses.replace(config, precision="auto"))
    assert (rest["precision"], rest["accuracy"]) == ("bf16", whole["accuracy"])
    fresh = dataclasses.replace(config, precision="auto", save_features="")
    assert evaluate_knn(fresh)["precision"] == "fp32"


def test_a_fingerprint_tells_names_shapes_types_and_values_apart():
    state = {"a": torch.arange(4.0), "b": torch.ones(2, 3)}
    assert fingerprint(state) == fingerprint(dict(reversed(state.items())))
    others = [
        {"a": state["a"], "c": state["b"]},
        {"a": state["a"], "b": state["b"].T},
        {"a": state["a"], "b": state["b"].double()},
        {"a": state["a"].nextafter(torch.tensor(9.0)), "b": state["b"]},
    ]
    assert len({fingerprint(other) for other in (state, *others)}) == 5
