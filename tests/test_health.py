"""The health metrics against loops in float64 and numpy's SVD, and in the rows of a run."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import assert_same, config, scientific, weights

from ssl_xcit.dino import algorithm, train
from ssl_xcit.dino.health import batch_means, health, means_size, rankme
from ssl_xcit.dino.loss import DINOLoss
from ssl_xcit.dino.probe import some_images
from ssl_xcit.dino.train import Pretraining
from ssl_xcit.models import xcit
from ssl_xcit.runtime import distributed
from ssl_xcit.training import engine
from ssl_xcit.training.guard import BatchStatistics
from ssl_xcit.training.metrics import read_metrics
from ssl_xcit.training.task import StepLoss

N, VIEWS, K, D = 3, 4, 7, 5
STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.07


def batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Logits and features of N images."""
    torch.manual_seed(seed)
    return {
        "student": 0.3 * torch.randn(VIEWS * N, K, dtype=dtype),
        "teacher": 0.3 * torch.randn(2 * N, K, dtype=dtype),
        "features": torch.randn(2 * N, D, dtype=dtype) + 0.5,
        "center": 0.1 * torch.randn(1, K, dtype=dtype),
    }


def means_of(of: dict[str, torch.Tensor]) -> torch.Tensor:
    loss = DINOLoss(K, STUDENT_TEMP).to(of["center"].dtype)
    loss.center.copy_(of["center"])
    return batch_means(
        loss(of["student"], of["teacher"], TEACHER_TEMP),
        of["student"].split(N),
        of["teacher"].split(N),
        of["features"],
        of["center"],
        (STUDENT_TEMP, TEACHER_TEMP),
    )


def softmax(logits: list[float], temperature: float) -> list[float]:
    exps = [math.exp(z / temperature) for z in logits]
    return [e / sum(exps) for e in exps]


def entropy(probs: list[float]) -> float:
    return -sum(p * math.log(p) for p in probs if p > 0)


def naive(batches: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """The health metrics by loops over images, views and prototypes of all batches together."""
    teacher, student, divergences, shares, units = [], [], [], [0.0] * K, []
    for of in batches:
        center = of["center"][0].tolist()
        q = [
            softmax([z - c for z, c in zip(row, center, strict=True)], TEACHER_TEMP)
            for row in of["teacher"].tolist()
        ]
        p = [softmax(row, STUDENT_TEMP) for row in of["student"].tolist()]
        teacher += [entropy(row) for row in q]
        student += [entropy(row) for row in p]
        for t in range(2):
            for v in range(VIEWS):
                for b in range(N if v != t else 0):
                    pairs = zip(q[t * N + b], p[v * N + b], strict=True)
                    divergences.append(sum(x * math.log(x / y) for x, y in pairs))
        shares = [s + sum(row[k] for row in q) for k, s in enumerate(shares)]
        for row in of["features"].tolist():
            length = math.sqrt(sum(x * x for x in row))
            units.append([x / length for x in row])
    columns = [[row[j] for row in units] for j in range(D)]
    centres = [sum(column) / len(column) for column in columns]
    deviations = [
        math.sqrt(sum((x - m) ** 2 for x in column) / len(column))
        for column, m in zip(columns, centres, strict=True)
    ]
    mean = {name: sum(x) / len(x) for name, x in (("t", teacher), ("s", student))}
    kl = sum(divergences) / len(divergences)
    prototypes = math.exp(entropy([s / sum(shares) for s in shares]))
    images = N * len(batches)
    return {
        "teacher_entropy": mean["t"],
        "student_entropy": mean["s"],
        "kl": kl,
        "center_norm": math.sqrt(sum(c * c for c in batches[0]["center"][0].tolist())),
        "prototypes": prototypes,
        "prototypes_used": min(1.0, prototypes / min(K, images)),
        "feature_std": sum(deviations) / D * math.sqrt(D),
    }


def numbers(found: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in found.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_every_metric_equals_a_loop_over_images_and_prototypes(dtype, tolerance):
    of = batch(dtype=dtype)
    means = means_of(of)
    assert means.shape == (means_size(K, D),)
    found = numbers(health(means, of["center"], N))
    expected = naive([{name: tensor.double() for name, tensor in of.items()}])
    assert found == pytest.approx(expected, rel=tolerance)


def test_a_batch_in_parts_gives_the_metrics_of_the_whole_batch():
    parts = [batch(seed) for seed in range(2)]
    parts[1]["center"] = parts[0]["center"]
    found = health(sum(map(means_of, parts)) / 2, parts[0]["center"], 2 * N)
    assert numbers(found) == pytest.approx(naive(parts), rel=1e-10)


def test_half_precision_is_converted_to_float32_first():
    of = {name: tensor.bfloat16() for name, tensor in batch().items()}
    center = of["center"].float()
    wide = {name: tensor.float() for name, tensor in of.items()}
    found, expected = (
        batch_means(
            torch.ones(()),
            x["student"].split(N),
            x["teacher"].split(N),
            x["features"],
            center,
            (0.1, 0.07),
        )
        for x in (of, wide)
    )
    assert torch.equal(found, expected)


def test_autocast_rounds_nothing():
    of = batch(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = means_of(of)
    torch.testing.assert_close(found, means_of(of), rtol=1e-6, atol=1e-7)


def test_a_certain_teacher_has_entropy_0_and_equal_images_have_no_spread():
    logits, center = torch.zeros(4, 3), torch.zeros(1, 3)
    logits[:, 1] = 1000.0
    means = batch_means(
        torch.zeros(()), logits.split(2), logits.split(2), torch.ones(4, 5), center, (0.1, 0.04)
    )
    found = numbers(health(means, center, 2))
    assert found["teacher_entropy"] == found["student_entropy"] == 0.0
    assert found["prototypes"] == 1.0
    assert found["prototypes_used"] == 0.5
    assert found["feature_std"] < 1e-3


def test_evenly_spread_features_have_a_standard_deviation_of_1():
    features = torch.cat([torch.eye(8), -torch.eye(8)])
    logits, center = torch.zeros(16, 4), torch.zeros(1, 4)
    means = batch_means(torch.zeros(()), [logits], [logits], features, center, (0.1, 0.04))
    found = numbers(health(means, center, 8))
    assert found["feature_std"] == pytest.approx(1.0)
    assert found["prototypes"] == pytest.approx(4.0)
    assert found["prototypes_used"] == pytest.approx(1.0)


def test_a_skipped_step_has_no_metrics():
    found = numbers(health(torch.zeros(means_size(K, D)), torch.ones(1, K), N))
    assert found.pop("center_norm") == pytest.approx(math.sqrt(K))
    assert all(math.isnan(value) for value in found.values())


@pytest.mark.parametrize("rank", [1, 3, 20])
@pytest.mark.parametrize("rows", [12, 5000])
def test_rankme_is_exp_of_the_entropy_of_the_singular_values(rank, rows):
    generator = np.random.default_rng(0)
    features = generator.normal(size=(rows, rank)) @ generator.normal(size=(rank, 20))
    features = features.astype(np.float32)
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    expected = math.exp(entropy((values / values.sum()).tolist()))
    found = rankme(torch.from_numpy(features)).item()
    assert found == pytest.approx(expected, rel=1e-4)
    assert found < min(rank, rows) + 0.01


def test_rankme_of_equal_orthogonal_directions_is_their_number():
    assert rankme(torch.eye(6)[:, :4].repeat(3, 1)).item() == pytest.approx(4.0)
    assert rankme(torch.ones(9, 4)).item() == pytest.approx(1.0, abs=1e-4)


# -- in a run ------------------------------------------------------------------------------------


def set_depth(monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    """Give xcit_nano_12 this number of blocks. One is enough for most tests of the log."""
    variant = xcit.VARIANTS["xcit_nano_12"]._replace(depth=blocks)
    monkeypatch.setitem(xcit.VARIANTS, "xcit_nano_12", variant)


@pytest.fixture(autouse=True)
def depth(monkeypatch, request):
    """Use networks with one block, unless a test asks for another number."""
    set_depth(monkeypatch, getattr(request, "param", 1))


def one_step(photos: Path, out: Path, **changes) -> tuple[Pretraining, dict[str, float]]:
    run = Pretraining(config(photos, out, drop_path_rate=0, **changes), distributed.setup("cpu"))
    run.dino_loss.center.copy_(torch.linspace(-0.1, 0.1, 32))
    run.loader.set_epoch(0, 0)
    engine.train_step(run, iter(run.loader), 0, BatchStatistics(run.modules()))
    run.loader.close()
    return run, run.health()


@pytest.mark.parametrize("depth", [1, pytest.param(12, marks=pytest.mark.long)], indirect=True)
def test_the_metrics_of_a_recorded_step_are_those_of_its_networks(photos, tmp_path):
    run, found = one_step(photos, tmp_path)
    fresh = Pretraining(run.config, run.ranks)
    fresh.loader.set_epoch(0, 0)
    global_crops, local_crops, _ = next(iter(fresh.loader))
    fresh.loader.close()
    with torch.no_grad():
        features = fresh.teacher.backbone(global_crops.flatten(0, 1))
        center = torch.linspace(-0.1, 0.1, 32).double()
        q = torch.softmax((fresh.teacher.head(features).double() - center) / 0.04, dim=1)
        p = torch.softmax(fresh.bare_model([global_crops, local_crops]).double() / 0.1, dim=1)
    assert found["teacher_entropy"] == pytest.approx((-q * q.log()).sum(1).mean().item(), rel=1e-4)
    assert found["student_entropy"] == pytest.approx((-p * p.log()).sum(1).mean().item(), rel=1e-4)
    loss = run.meters.means()[0].item()
    assert found["kl"] == pytest.approx(loss - found["teacher_entropy"], rel=1e-4)
    shares = q.mean(0)
    assert found["prototypes"] == pytest.approx(
        (-shares * shares.log()).sum().exp().item(), rel=1e-4
    )
    units = features.double() / features.double().norm(dim=1, keepdim=True)
    spread = units.std(0, correction=0).mean() * 128**0.5
    assert found["feature_std"] == pytest.approx(spread.item(), rel=1e-3)
    assert found["center_norm"] == pytest.approx(run.dino_loss.center.norm().item())


def test_the_metrics_of_a_step_cover_all_its_micro_batches(photos, tmp_path, monkeypatch):
    parts = []

    def noted(*arguments) -> torch.Tensor:
        parts.append(batch_means(*arguments))
        return parts[-1]

    monkeypatch.setattr(algorithm, "batch_means", noted)
    run, found = one_step(photos, tmp_path, batch_size_per_gpu=4, accumulation_steps=3)
    assert len(parts) == 3
    mean = torch.stack(parts).double().mean(0)
    assert (parts[0] - parts[1]).abs().max() > 1e-3
    torch.testing.assert_close(run.health_means.double(), mean, rtol=1e-5, atol=1e-7)
    expected = numbers(health(mean, run.dino_loss.center.double(), 12))
    assert found == pytest.approx(expected, rel=1e-3)


def test_only_recorded_steps_compute_health_metrics(photos, tmp_path, monkeypatch):
    calls = []

    def counted(*arguments) -> torch.Tensor:
        calls.append(arguments)
        return batch_means(*arguments)

    monkeypatch.setattr(algorithm, "batch_means", counted)
    out = tmp_path / "run"
    parts = {"accumulation_steps": 2, "batch_size_per_gpu": 6}
    train.train(config(photos, out, log_every=3, epochs=2, **parts))
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 5, 7]
    assert len(calls) == 2 * 3
    assert [row["progress"] for row in rows] == pytest.approx([3 / 8, 6 / 8, 1.0], abs=1e-6)
    keys = [key for key in rows[0] if key.startswith("health/")]
    assert len(keys) == 7
    assert all(math.isfinite(row[key]) for row in rows for key in keys)


def test_a_bad_step_leaves_a_row_without_metrics_and_a_finite_checkpoint(
    photos, tmp_path, monkeypatch
):
    loss = Pretraining.loss

    def broken(run: Pretraining, batch: tuple, step: int, micro: int, now: dict) -> StepLoss:
        images, *others = batch
        return loss(run, (images * math.nan if step == 2 else images, *others), step, micro, now)

    monkeypatch.setattr(Pretraining, "loss", broken)
    out = tmp_path / "run"
    # Saving refuses NaN.
    train.train(config(photos, out, save_every=1e-6, epochs=1))
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows if row["train/loss"] is None] == [2]
    assert [row["step"] for row in rows if row["health/kl"] is None] == [2]
    assert rows[2]["health/center_norm"] == rows[1]["health/center_norm"]


def test_the_probes_time_share_and_the_rank_of_its_features_are_logged(photos, tmp_path, capsys):
    probe = {"probe.every": 2, "probe_train": photos, "probe_test": photos, "probe_k": 1}
    probe |= {"probe_resize": 32, "probe_crop": 32}
    out, plain = tmp_path / "run", tmp_path / "plain"
    train.train(config(photos, out, **probe, probe_limit=20, epochs=2))
    printed = capsys.readouterr().out
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "probe/top1_cls" in row]
    assert [row["step"] for row in rows] == [7]
    share = rows[0]["speed/evaluation_share"]
    assert 0 < share < 1
    assert f"evaluation {100 * share:.1f} % of the time" in printed
    assert 1 <= rows[0]["health/rankme"] <= 20
    assert rows[0]["health/rankme_share"] == pytest.approx(rows[0]["health/rankme"] / 20)
    train.train(config(photos, plain, epochs=2))
    assert_same(weights(out), weights(plain))
    keys = [key for key in rows[0] if key.startswith(("probe/", "health/rankme"))]
    assert len(keys) == 4
    unprobed = [
        {key: value for key, value in row.items() if key not in keys}
        for row in scientific(read_metrics(out / "metrics.jsonl"))
    ]
    assert unprobed == scientific(read_metrics(plain / "metrics.jsonl"))


def test_a_probes_subset_depends_on_the_seed_and_has_no_image_twice():
    assert some_images(5, 0, 0).tolist() == some_images(5, 9, 0).tolist() == [0, 1, 2, 3, 4]
    drawn = some_images(1000, 100, 3)
    assert drawn.tolist() == sorted(set(drawn.tolist()))
    assert len(drawn) == 100
    assert drawn.max() < 1000
    assert drawn.tolist() == some_images(1000, 100, 3).tolist()
    assert drawn.tolist() != some_images(1000, 100, 4).tolist()
    assert 350 < drawn.mean() < 650  # from the whole file, not from its beginning
