"""k-NN classification of frozen features: DINO's weighted vote, and the evaluation by it.

Let j run over the k training images most similar to a test image, with cosine similarity s_j and
class y_j. The score of class c is the sum of exp(s_j / temperature) over all j with y_j = c.
Equation and defaults (temperature 0.07, k = 10, 20, 100, 200) are those of DINO's eval_knn.py,
after Wu et al. 2018 (arXiv:1805.01978, section 3.4). All ties are broken by rule, so a result
depends neither on the block size nor on the device:

- of equally similar training images, the first in the training set is nearer;
- of classes with equal scores, the smaller number ranks first.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float64, Int64, Real
from torch import Tensor

from ssl_xcit.data.loader import rank_share
from ssl_xcit.evaluation.accuracy import accuracy
from ssl_xcit.evaluation.cache import cached_features, load_facts, load_features
from ssl_xcit.evaluation.config import KnnConfig
from ssl_xcit.evaluation.features import Extraction, Features, require_finite
from ssl_xcit.evaluation.results import (
    Result,
    describe_images,
    describe_machine,
    describe_subject,
    run_evaluation,
    write_result,
)
from ssl_xcit.runtime import distributed
from ssl_xcit.runtime.distributed import Distributed
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.runtime.precision import settled
from ssl_xcit.training.run_folder import stored_precision

GRID_BITS = 31  # similarities are rounded to multiples of 2^-31 = 4.7e-10
INDEX_MASK = 2**31 - 1  # the largest index of a training image
BLOCK_ELEMENTS = 2**23  # of float64: 64 MiB
COLUMNS = (("features", 10), ("k", 6), ("T", 8), ("top-1 %", 10), ("top-5 %", 10))


def cosine_top_k(
    train: Real[Tensor, "n d"], test: Real[Tensor, "m d"], k: int, chunk: int | None = None
) -> tuple[Float64[Tensor, "m k"], Int64[Tensor, "m k"]]:
    """Cosine similarities and indices of the min(k, n) nearest training rows, nearest first.

    Works on blocks of `chunk` test rows by `chunk` training rows and keeps the best k of each test
    row so far, so memory does not grow with m * n; by default each of the few live blocks takes at
    most 64 MiB. Inputs may be of any real type and need no normalisation; a zero vector has
    similarity 0 to everything.

    Products are summed in float64 and rounded to a grid of 2^-31. That is far finer than float32
    features can resolve, and far coarser than the summation error of float64, which depends on the
    block size: equal vectors tie exactly. A rounded similarity and its index are packed into one
    int64 that orders by similarity first and by the lower index second. All these integers differ,
    so top-k has a single answer, whatever the blocks and the device.
    """
    chunk = chunk or max(1, min(int(BLOCK_ELEMENTS**0.5), BLOCK_ELEMENTS // train.size(1)))
    best = [_nearest(train, queries, k, chunk) for queries in test.split(chunk)]
    keys = torch.cat(best)
    similarities = (keys >> GRID_BITS).double() / 2**GRID_BITS  # arithmetic shift: rounds down
    return similarities, INDEX_MASK - (keys & INDEX_MASK)


def _nearest(
    train: Real[Tensor, "n d"], queries: Real[Tensor, "q d"], k: int, chunk: int
) -> Int64[Tensor, "q k"]:
    """The k largest (similarity, index) keys of each query, largest first."""
    queries = _unit(queries)
    best = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(train), chunk):
        block = _unit(train[start : start + chunk])
        keys = (queries @ block.T).mul_(2**GRID_BITS).round_().long()  # (q, chunk)
        order = torch.arange(start, start + len(block), device=keys.device)
        keys.bitwise_left_shift_(GRID_BITS).add_(INDEX_MASK - order)
        nearest = keys.topk(min(k, len(block)), sorted=False).values
        candidates = torch.cat((best, nearest), dim=1)
        best = candidates.topk(min(k, candidates.size(1))).values
    return best


def _unit(rows: Real[Tensor, "n d"]) -> Float64[Tensor, "n d"]:
    return F.normalize(rows.double(), dim=1)


def weighted_vote(
    similarities: Real[Tensor, "m neighbours"],
    neighbour_labels: Int64[Tensor, "m neighbours"],
    num_classes: int,
    k: int,
    temperature: float,
) -> Int64[Tensor, "m top"]:
    """The min(5, k, num_classes) best classes of each row by the weighted vote, best first.

    The first k columns vote; they are sorted by falling similarity, as `cosine_top_k` returns
    them, with `neighbour_labels` in 0 .. num_classes - 1. Weights are exp((s - s_max) / T): the
    common factor exp(s_max / T) changes no rank, and would overflow at low temperatures. If fewer
    classes than that have votes, those without follow, smallest number first (DINO's script leaves
    their order to the sort).
    """
    similarities, neighbour_labels = similarities[:, :k].double(), neighbour_labels[:, :k]
    weights = torch.exp((similarities - similarities[:, :1]) / temperature)
    scores = weights.new_zeros(len(weights), num_classes)
    # One neighbour at a time fixes the order of a row's addends, even with CUDA's atomics
    for label, weight in zip(neighbour_labels.split(1, 1), weights.split(1, 1), strict=True):
        scores.scatter_add_(1, label, weight)
    ranked = []
    for _ in range(min(5, weights.size(1), num_classes)):
        winner = scores.argmax(dim=1, keepdim=True)  # the first of equal maxima
        ranked.append(winner)
        scores.scatter_(1, winner, -1.0)  # below every score
    return torch.cat(ranked, dim=1)


def predictions(
    train_features: Real[Tensor, "n d"],
    train_labels: Int64[Tensor, " n"],
    test_features: Real[Tensor, "m d"],
    temperatures: Sequence[float],
    ks: Sequence[int],
) -> Iterator[Int64[Tensor, "m top"]]:
    """The best classes of each test image by `weighted_vote`: at each temperature, for every k.

    One search serves all. A k beyond the training set lets all n images vote. Raises UserError for
    a k below 1 and for features that are not finite.
    """
    if min(ks) < 1:
        raise UserError(f"k must be at least 1, got {min(ks)}")
    require_finite(train_features, "the training features")
    require_finite(test_features, "the test features")
    similarities, indices = cosine_top_k(train_features, test_features, max(ks))
    # Sorted classes keep the rule for ties
    classes, train_classes = train_labels.unique(return_inverse=True)
    rows = max(1, BLOCK_ELEMENTS // len(classes))  # bounds the table of class scores
    parts = zip(similarities.split(rows), train_classes[indices].split(rows), strict=True)
    blocks = [(*part, len(classes)) for part in parts]
    for temperature, k in itertools.product(temperatures, ks):
        yield classes[torch.cat([weighted_vote(*block, k, temperature) for block in blocks])]


def knn(
    train: Features,
    test: Features,
    ks: Sequence[int],
    temperatures: Sequence[float],
    ranks: Distributed,
) -> list[dict]:
    """Accuracy for every temperature and k, from one search that the ranks share.

    Returns rows of k, temperature, voters (the training images that vote: fewer than k if there
    are no more) and top1, top5 in percent, the same on every rank. Labels may be any integers; a
    test label that no training image has counts as wrong. Raises UserError as `predictions` does.
    """
    places = np.arange(len(test.labels))
    mine = torch.from_numpy(rank_share(places, ranks.rank, ranks.world_size))
    parts = [part.to(ranks.device) for part in (train.features, train.labels, test.features[mine])]
    ranked = predictions(*parts, temperatures, ks)
    rows = []
    for temperature, k in itertools.product(temperatures, ks):
        top1, top5 = accuracy(distributed.gather_variable(next(ranked).cpu()), test.labels)
        row = {"k": k, "temperature": temperature, "voters": min(k, len(train.labels))}
        rows.append(row | {"top1": top1, "top5": top5})
    return rows


def evaluate_knn(config: KnnConfig) -> dict:
    """k-NN accuracy of a checkpoint, of an untrained network or of the pixels, as `config` says.

    Prints a table, and writes what it returns as JSON to `config.out` if that is set: "accuracy"
    has a row for each kind of features, temperature and k, see `knn`; the rest is what decided
    them. With torchrun the ranks share the images and the search, and rank 0 reports. Raises
    UserError for images that are missing or do not belong together, a checkpoint that is no
    backbone or is for other images, and features that are not finite.
    """
    return run_evaluation(lambda ranks: _measure(config, ranks), config.device, config.out)


def _measure(config: KnnConfig, ranks: Distributed) -> Result:
    start = time.perf_counter()
    if config.load_features:
        folder = Path(config.load_features)
        facts = load_facts(folder)
        train, test = (load_features(folder, name) for name in ("train", "test"))
    else:
        train, test, facts = _extract(config, ranks)
    extracted = time.perf_counter()
    rows = [
        {"features": kind} | row
        for kind in facts["features"]
        for row in knn(train[kind], test[kind], config.k, config.temperature, ranks)
    ]
    searched = time.perf_counter() - extracted
    seconds = {"features": round(extracted - start, 3), "search": round(searched, 3)}
    heading = [
        f"k-NN: {describe_subject(facts)}",
        f"{facts['test']['images']:,} test images, {facts['train']['images']:,} training images, "
        f"{facts['train']['classes']:,} classes",
    ]
    facts = {**facts, "accuracy": rows, "seconds": seconds, **describe_machine(ranks)}
    return Result(facts, heading, COLUMNS, map(_cells, rows))


def _extract(config: KnnConfig, ranks: Distributed) -> tuple[dict, dict, dict]:
    """Features of both datasets by their kind, and the facts about them."""
    folder = Path(config.save_features) if config.save_features else None
    stored = folder and min(folder.glob("*-*.safetensors"), default=None)
    config = settled(config, ranks, stored_precision(stored))
    extraction = Extraction(config, ranks, config.batch_size, config.train)
    kinds = ["pixels"] if config.pixels else list(config.features)
    train = extraction.open(config.train)
    datasets = {"train": train, "test": extraction.open(config.test, train)}
    facts = {
        **extraction.facts(),
        "features": kinds,
        **{name: describe_images(images) for name, images in datasets.items()},
    }
    features = [
        cached_features(extraction, images, kinds, folder, name)
        for name, images in datasets.items()
    ]
    if folder is not None and ranks.rank == 0:
        write_result(facts, folder / "features.json")
    return *features, facts


def _cells(row: dict) -> list[str]:
    few = row["voters"] < row["k"]
    return [
        row["features"],
        f"{row['k']}",
        f"{row['temperature']:g}",
        f"{row['top1']:.2f}",
        f"{row['top5']:.2f}",
        f"   only {row['voters']} training images: all of them vote" if few else "",
    ]
