"""Fine-tuning: its pieces against naive loops, timm and torchvision; and whole runs."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
from conftest import photo_tiles
from scipy.stats import beta, kstest
from shallow import PROGRAM, networks
from test_train import weights
from timm.data.mixup import mixup_target
from torchvision import models
from torchvision.transforms import v2

from ssl_xcit.checkpoints import folder as checkpoint
from ssl_xcit.checkpoints.read import read
from ssl_xcit.data.loader import EvalLoader
from ssl_xcit.data.pixels import IMAGENET_MEAN, IMAGENET_STD
from ssl_xcit.finetune.augment import Mixing, RandAugment, random_erase
from ssl_xcit.finetune.average import WeightAverage
from ssl_xcit.finetune.config import FinetuneConfig
from ssl_xcit.finetune.distillation import distillation_loss, load_teacher
from ssl_xcit.finetune.train import Finetuning, finetune
from ssl_xcit.models.xcit import build_xcit
from ssl_xcit.runtime import distributed, draws
from ssl_xcit.runtime.config import CONFIGS, load_config
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.training import engine
from ssl_xcit.training.guard import BatchStatistics
from ssl_xcit.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "eval" / "finetune.py")
SMALL = {  # an xcit_nano_12_p16 on views of 32 pixels: 0.1 s a step
    "arch": "xcit_nano_12_p16",
    "from_scratch": True,
    "image_size": 32,
    "batch_size_per_gpu": 12,
    "epochs": 2,
    "warmup_epochs": 1,
    "precision": "fp32",
    "device": "cpu",
    "num_workers": 2,
    "log_every": 1,
}
EVERYTHING = {  # that is random
    "augment": "randaugment",
    "random_erasing": 0.5,
    "drop_path_rate": 0.2,
    "repeated_augment": 2,
    "ema_decay": 0.9,
}
PLAIN = {"augment": "plain", "random_erasing": 0, "mixup": 0, "cutmix": 0, "label_smoothing": 0}


def flags(photos: Path, out: Path, **changes) -> list[str]:
    settings = SMALL | {"data": photos, "test": photos, "out": out} | changes
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def config(photos: Path, out: Path, **changes) -> FinetuneConfig:
    return load_config(FinetuneConfig, argv=flags(photos, out, **changes))


def task(photos: Path, out: Path, **changes) -> Finetuning:
    return Finetuning(config(photos, out, **changes), distributed.setup("cpu"))


def batches(run: Finetuning, epoch: int = 0):
    run.loader.set_epoch(epoch, 0)
    return iter(run.loader)


def command(*arguments: str, script=(SCRIPT,), run=forked.run) -> subprocess.CompletedProcess:
    start = [sys.executable, *script, *arguments]
    return run(
        start,
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


# -- mixing --------------------------------------------------------------------------------------


def numbered(n: int, side: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that hold their number alone, and labels of 5 classes."""
    images = torch.arange(1.0, n + 1).view(n, 1, 1, 1).expand(n, 3, side, side).clone()
    return images, torch.arange(n) * 2 % 5


def lambda_of(mixed: torch.Tensor) -> float:
    """The share of the second image's own number: it is 2, the one before it has 1."""
    return (mixed[1].double().mean() - 1).item()


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
def test_mixed_images_and_targets_are_those_of_a_loop_and_of_timm(mixup, cutmix):
    images, labels = numbered(6)
    mixing = Mixing(5, mixup, cutmix, 1.0, 0.5)
    for key in range(20):
        mixed, targets = mixing(images.clone(), labels, key)
        share = lambda_of(mixed)
        assert 0 <= share <= 1
        for i in range(6):
            expected = torch.zeros(5)
            expected[labels[i]] += share
            expected[labels[i - 1]] += 1 - share
            torch.testing.assert_close(targets[i], expected, rtol=0, atol=1e-5)
            if mixup:
                value = share * images[i] + (1 - share) * images[i - 1]
                torch.testing.assert_close(mixed[i], value, rtol=0, atol=1e-4)
                continue
            other = mixed[i] != images[i]  # a rectangle of the image before, in all channels
            assert (mixed[i][other] == images[i - 1][other]).all()
            rows, columns = other[0].any(1).sum(), other[0].any(0).sum()
            assert rows * columns == other[0].sum()
            assert (other == other[0]).all()
        # Of two images each is the other's partner, in timm's pairing too.
        _, pair = mixing(images[:2].clone(), labels[:2], key)
        theirs = mixup_target(labels[:2], 5, share, 0.1)
        torch.testing.assert_close(0.9 * pair + 0.1 / 5, theirs, rtol=0, atol=1e-5)


def test_lambda_has_its_beta_distribution_and_the_two_kinds_their_shares():
    images, labels = numbered(2, side=4)
    mixing = Mixing(5, 0.8, 1.0, 0.75, 0.4)
    kinds, shares = {"none": 0, "mixup": 0, "cutmix": 0}, []
    for key in range(1500):
        mixed, _ = mixing(images.clone(), labels, key)
        if torch.equal(mixed, images):
            kinds["none"] += 1  # some rectangles of CutMix are empty, too
        elif mixed[0].unique().numel() == 1 and not (mixed == 1).logical_or(mixed == 2).all():
            kinds["mixup"] += 1
            shares.append(lambda_of(mixed))
        else:
            kinds["cutmix"] += 1
    assert kstest(shares, beta(0.8, 0.8).cdf).pvalue > 1e-3
    assert kinds["mixup"] / 1500 == pytest.approx(0.75 * 0.6, abs=0.04)
    assert 0.25 < kinds["none"] / 1500 < 0.42


def test_mixing_is_a_function_of_its_key_and_leaves_the_generator_alone():
    images, labels = numbered(4)
    mixing = Mixing(5, 0.8, 1.0, 1.0, 0.5)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = mixing(images.clone(), labels, -7)
    assert torch.equal(torch.rand(3), expected)
    again = mixing(images.clone(), labels, -7)
    other = mixing(images.clone(), labels, -8)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


# -- augmentation of tensors ---------------------------------------------------------------------


def photo_bytes(n: int = 8, channels: int = 3, side: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, channels, side, side), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_is_torchvisions_seeded_by_each_images_key(channels):
    images, keys = photo_bytes(channels=channels), draws.stream(0, 1, torch.arange(8), 2)
    mean = (0.5, 0.25, 0.75)[:channels]
    ours = RandAugment(3, 9, mean)(images.clone(), keys)
    fill = [round(255 * value) for value in mean]
    reference = v2.RandAugment(3, 9, interpolation=v2.InterpolationMode.BILINEAR, fill=fill)
    for i in range(8):
        torch.manual_seed(int(keys[i]))
        assert torch.equal(ours[i], reference(images[i]))
    assert sum(not torch.equal(a, b) for a, b in zip(ours, images, strict=True)) >= 6
    # another batch, another order
    backwards = RandAugment(3, 9, mean)(images.flip(0), keys.flip(0))
    assert torch.equal(backwards.flip(0), ours)


def test_erasing_is_a_rectangle_of_normal_noise_within_timms_bounds():
    n, side = 600, 40
    keys = draws.stream(3, 0, torch.arange(n), 4_000)
    erased = random_erase(torch.full((n, 2, side, side), 9.0), keys, 0.25)
    noise, areas = [], []
    for image in erased:
        changed = image != 9
        if not changed.any():
            continue
        assert torch.equal(changed[0], changed[1])
        rows, columns = changed[0].any(1).sum().item(), changed[0].any(0).sum().item()
        assert changed[0].sum() == rows * columns
        areas.append(rows * columns / side**2)
        assert rows < side
        assert columns < side
        assert 0.3 / 1.4 < rows / columns < 1.4 / 0.3  # sides are rounded to pixels
        noise.append(image[changed])
    assert len(areas) / n == pytest.approx(0.25, abs=0.06)
    assert 0.01 < min(areas) < 0.05
    assert 0.28 < max(areas) < 0.36
    assert kstest(torch.cat(noise).numpy(), "norm").pvalue > 1e-3


def test_erasing_an_image_depends_on_its_key_alone():
    images, keys = torch.zeros(6, 3, 20, 20), draws.stream(0, 0, torch.arange(6), 0)
    all_at_once = random_erase(images.clone(), keys, 1.0)
    assert all((image != 0).any() for image in all_at_once)
    for i in range(6):
        assert torch.equal(
            random_erase(images[:1].clone(), keys[i : i + 1], 1.0)[0], all_at_once[i]
        )
    assert torch.equal(random_erase(images.clone(), keys, 0.0), images)


# -- moving average ------------------------------------------------------------------------------


def test_the_average_is_its_closed_form():
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).double()
    average = WeightAverage(network, 0.9)
    history = [{k: v.clone() for k, v in network.state_dict().items()}]
    for step in range(5):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += torch.randn_like(parameter)
        network(torch.randn(6, 3).double() + step)  # moves the running statistics
        average.update(network, torch.tensor(False))
        history.append({k: v.clone() for k, v in network.state_dict().items()})
    for name, ours in average.network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert ours == 5
            continue
        expected = 0.9**5 * history[0][name]
        for i in range(1, 6):
            expected = expected + 0.1 * 0.9 ** (5 - i) * history[i][name]
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert not average.network.training
    assert not any(p.requires_grad for p in average.network.parameters())


# -- distillation --------------------------------------------------------------------------------


def test_the_distillation_losses_are_those_of_a_loop():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7).double(), 3 * torch.randn(5, 7).double()
    hard = soft = 0.0
    for b in range(5):
        best = max(range(7), key=lambda k: teacher[b, k])
        total = math.log(sum(math.exp(x) for x in student[b]))
        hard += (total - student[b, best].item()) / 5
        warm = [[math.exp(x / 2.5) for x in row] for row in (student[b], teacher[b])]
        p, q = ([x / sum(row) for x in row] for row in warm)
        soft += 2.5**2 * sum(t * (math.log(t) - math.log(s)) for s, t in zip(p, q, strict=True)) / 5
    assert distillation_loss("hard", student, teacher, 2.5).item() == pytest.approx(hard, rel=1e-12)
    assert distillation_loss("soft", student, teacher, 2.5).item() == pytest.approx(soft, rel=1e-12)


def test_a_torchvision_teacher_sees_images_normalised_for_itself(tmp_path):
    torch.manual_seed(0)
    reference = models.squeezenet1_1(num_classes=4).eval()
    torch.save(reference.state_dict(), tmp_path / "teacher.pth")
    mean, std = (0.4, 0.5, 0.6), (0.3, 0.2, 0.1)
    teacher = load_teacher(
        str(tmp_path / "teacher.pth"), "torchvision:squeezenet1_1", 4, (mean, std)
    )
    pixels = torch.rand(2, 3, 64, 64)
    ours = teacher(v2.functional.normalize(pixels, mean, std))
    theirs = reference(v2.functional.normalize(pixels, IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for arch, classes, words in (
        ("torchvision:squeezenet1_1", 5, "squeezenet1_1 for 5 classes"),
        ("torchvision:resnet9999", 4, "no classifier called resnet9999"),
    ):
        with pytest.raises(UserError, match=words):
            load_teacher(str(tmp_path / "teacher.pth"), arch, classes, (mean, std))


# -- the step ------------------------------------------------------------------------------------


def test_a_step_is_that_of_the_equations(photos, finished, tmp_path):
    """AdamW with layer-wise rates on the loss of smoothed labels and of a soft teacher."""
    changes = PLAIN | {
        "label_smoothing": 0.2, "distill": "soft", "teacher": finished, "distill_alpha": 0.3,
        "distill_temp": 2.0, "lr": 0.1, "warmup_epochs": 0, "layer_decay": 0.9, "seed": 5,
    }  # fmt: skip
    run = task(photos, tmp_path, **changes)
    views, indices = next(batches(run))
    views, indices = views.clone(), indices.clone()
    model = build_xcit("xcit_nano_12_p16", num_classes=2).double()
    model.load_state_dict(run.bare_model.state_dict())
    state = read(finished).state
    teacher = build_xcit("xcit_nano_12_p16", num_classes=2).double().eval()
    teacher.load_state_dict(state)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine.train_step(run, iter([(views, indices)]), 0, BatchStatistics(run.modules()))

    x = views[0].double()
    logits, taught = model.train()(x), teacher(x).detach()
    loss = 0.0
    for b in range(12):
        log_p = logits[b].log_softmax(0)
        label = run.data.labels[indices[b]]
        target = [0.8 * (k == label) + 0.1 for k in range(2)]
        p, q = (logits[b] / 2).softmax(0), (taught[b] / 2).softmax(0)
        divergence = (q * (q.log() - p.log())).sum()
        loss = loss + 0.7 * -(target[0] * log_p[0] + target[1] * log_p[1]) / 12
        loss = loss + 0.3 * 4 * divergence / 12
    loss.backward()
    assert run.meters.means()[0].item() == pytest.approx(loss.item(), rel=1e-5)
    rate = 0.1 * 12 / 512
    layers = {"blocks": lambda i: i + 1, "cls_attn_blocks": lambda i: i + 13}
    checked = 0
    for name, parameter in model.named_parameters():
        part, *rest = name.split(".")
        layer = {"head": 15, "norm": 14}.get(part, 0)
        layer = layers[part](int(rest[0])) if part in layers else layer
        decay = 0.05 * (parameter.ndim > 1 and not name.endswith(".bias") and part != "cls_token")
        lr, g = rate * 0.9 ** (15 - layer), parameter.grad
        expected = before[name] * (1 - lr * decay) - lr * g / (g.abs() + 1e-8)
        clear = g.abs() > 1e-5  # beneath, rounding decides the sign of Adam's step
        ours = run.bare_model.get_parameter(name).double()
        torch.testing.assert_close(ours[clear], expected[clear], rtol=1e-4, atol=1e-5, msg=name)
        checked += clear.sum()
    assert checked > 100_000


def test_repeats_of_an_image_are_different_views_with_its_label(photos, tmp_path):
    changes = PLAIN | {"repeated_augment": 3, "drop_path_rate": 0.2}
    run = task(photos, tmp_path, **changes)
    assert run.steps_per_epoch == 4  # 48 views of 48 images, 12 a step
    views, indices = next(batches(run))
    assert (views.shape[:2], indices.shape) == ((3, 4), (4,))
    images, targets, keys = run.prepare((views, indices), epoch=0, step=0, place=0)
    labels = torch.from_numpy(run.data.labels)[indices]
    assert targets.argmax(1).tolist() == 3 * labels.tolist()
    assert len(keys.unique()) == 12
    for i in range(4):
        a, b, c = images[i::4]
        assert not torch.equal(a, b)
        assert not torch.equal(b, c)
    seen = [next(batches(run, epoch))[1].tolist() for epoch in range(2)]
    assert seen[0] != seen[1]


def test_every_random_draw_follows_from_seed_epoch_step_and_place(photos, tmp_path):
    def prepared(seed: int = 0, **where: int) -> tuple:
        run = task(photos, tmp_path, **EVERYTHING, seed=seed)
        torch.manual_seed(time.perf_counter_ns())  # the generator's history must not matter
        run.loader.set_epoch(0, 0)
        return run.prepare(next(iter(run.loader)), **{"epoch": 0, "step": 0, "place": 0} | where)

    first, again = prepared(), prepared()
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    for other in ({"seed": 1}, {"epoch": 1}, {"step": 1}, {"place": 1}):
        changed = prepared(**other)
        assert not torch.equal(first[0], changed[0]), other
        drop_path_changes = other.keys() <= {"seed", "epoch"}
        assert torch.equal(first[2], changed[2]) != drop_path_changes, other


# -- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run with all that is random."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    finetune(config(photos, out, **EVERYTHING))
    return out


DEPTHS = [2, pytest.param(12, marks=pytest.mark.long)]  # blocks of the network


@pytest.mark.parametrize("depth", DEPTHS)
def test_kill_9_and_the_same_command_give_the_weights_of_an_undisturbed_run(
    photos, tmp_path, depth
):
    settings = EVERYTHING | {"epochs": 6, "save_every": 0.001, "log_every": 3}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with networks(depth):
        finetune(config(photos, whole, **settings))
    script = [PROGRAM, str(depth), SCRIPT]
    process = forked.Popen(
        [sys.executable, *script, *flags(photos, broken, **settings)],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if any(int(path.name[5:]) >= 5 for path in broken.glob("checkpoints/step_*")):
            process.send_signal(signal.SIGKILL)
        time.sleep(0.01)
    assert process.wait() == -signal.SIGKILL  # it had not finished
    result = command(*flags(photos, broken, **settings), script=script)
    assert result.returncode == 0, result.stderr
    ours, theirs = weights(broken), weights(whole)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    rows = [read_metrics(out / "metrics.jsonl") for out in (whole, broken)]
    for a, b in zip(*rows, strict=True):
        same = {"step", "epoch"} | {key for key in a if key.startswith(("train/", "test/"))}
        assert {key: a[key] for key in same} == {key: b[key] for key in same}
    results = [json.loads((out / "result.json").read_text()) for out in (whole, broken)]
    assert results[0] == results[1]


def test_two_ranks_equal_one_process_with_two_micro_batches(photos, tmp_path):
    """After one step Adam's moments are the gradients; what follows amplifies their rounding."""
    settings = EVERYTHING | {"epochs": 1, "sync_bn": "false"}  # statistics of a micro-batch
    two, one = tmp_path / "two", tmp_path / "one"
    arguments = flags(photos, two, **settings, batch_size_per_gpu=24)
    forked.run_ranks(2, [sys.executable, SCRIPT, *arguments])
    finetune(config(photos, one, **settings, batch_size_per_gpu=24, accumulation_steps=2))
    ours, theirs = weights(two), weights(one)
    gradients = [key for key in ours if key.endswith("/exp_avg")]
    assert len(gradients) > 200
    largest = max(theirs[key].abs().max() for key in gradients)
    assert largest > 1e-3
    for key in gradients:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-6 * largest.item())
    [a], [b] = (read_metrics(out / "metrics.jsonl") for out in (two, one))
    assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-6)
    # the ranks share the evaluation
    alone = task(photos, tmp_path / "alone", **settings, batch_size_per_gpu=48)
    alone.load(checkpoint.load_latest(two / "checkpoints")[0].tensors)
    for key, value in alone.evaluate(lambda: None).items():
        assert a[key] == pytest.approx(value, abs=1e-9), key


def test_the_result_is_the_averages_accuracy_on_the_test_images(photos, finished):
    result = json.loads((finished / "result.json").read_text())
    assert result["weights"] == "moving average"
    for role, prefix in (("model", "test_"), ("model_ema", "test_ema_")):
        weights = read(finished, role)
        assert (weights.arch, weights.num_classes) == ("xcit_nano_12_p16", 2)
        network = weights.build()
        run = task(photos, finished / "other")
        loader = EvalLoader(run.data, run.test_view, 48, dtype=torch.float32)
        [(images, labels, _)] = list(loader)
        with torch.no_grad():
            right = network(images).argmax(1) == labels
        assert result[f"{prefix}top1"] == pytest.approx(100 * right.double().mean().item())
        assert result[f"{prefix}top5"] == 100.0  # of two classes
    assert result["top1"] == result["test_ema_top1"]
    model = read(finished, "model").state
    average = read(finished, "model_ema").state
    assert any(not torch.equal(model[key], average[key]) for key in model)


@pytest.mark.parametrize("depth", DEPTHS)
def test_training_learns_the_two_photographs(photos, tmp_path, depth):
    changes = PLAIN | {"epochs": 8, "simple_crop": True, "lr": 0.04}
    with networks(depth):
        result = finetune(config(photos, tmp_path / "run", **changes))
    assert result["top1"] >= 90
    assert (result["source"], result["weights"]) == ("random_init", "last")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "test/top1" in row] == list(range(3, 32, 4))


@pytest.mark.parametrize("augment", ["3augment", "randaugment", "plain"])
def test_every_augmentation_trains(photos, tmp_path, augment):
    changes = {"augment": augment, "epochs": 1, "image_size": 40, "precision": "bf16"}
    result = finetune(config(photos, tmp_path / "run", **changes))
    assert math.isfinite(result["train_loss"])
    assert result["transform"]["crop"] == 40


def test_the_test_images_may_be_a_folder(photos, tmp_path):
    folder = photo_tiles(tmp_path / "tiles", 24)  # of which `photos` was written
    found = [task(photos, tmp_path, test=test).evaluate(lambda: None) for test in (photos, folder)]
    assert found[0] == found[1]
    assert found[0].keys() == {"test/top1", "test/top5"}


# -- where it starts -----------------------------------------------------------------------------


def test_the_backbone_is_loaded_and_the_classifier_is_new(photos, finished, tmp_path, capsys):
    init = {"init": finished, "from_scratch": "false", "arch": "", "seed": 3}
    state = read(finished).state
    run = task(photos, tmp_path, **init)
    started = run.bare_model.state_dict()
    for name, tensor in state.items():
        assert torch.equal(started[name], tensor) == (not name.startswith("head.")), name
    said = capsys.readouterr().out
    assert f"{len(state) - 2} tensors loaded" in said
    assert "new, from seed 3: head.weight, head.bias" in said
    assert "not used: head.weight, head.bias" in said
    kept = task(photos, tmp_path, **init, keep_head=True)
    assert all(torch.equal(kept.bare_model.state_dict()[name], state[name]) for name in state)
    assert "new, from seed 3: nothing" in capsys.readouterr().out


def test_images_are_normalised_as_the_start_was_trained(photos, finished, tmp_path):
    other = {"mean": "[0.1,0.2,0.3]", "std": "[0.5,0.6,0.7]", "epochs": 1}
    finetune(config(photos, tmp_path / "first", **PLAIN, **other))
    init = {"init": tmp_path / "first", "from_scratch": "false", "arch": ""}
    run = task(photos, tmp_path / "second", **init)
    assert run.statistics == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    assert task(photos, tmp_path / "third").statistics == (IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init": "nowhere"}, "exactly one of --init PATH and --from_scratch"),
        ({"from_scratch": "false", "init": "nowhere"}, "nowhere"),
        ({"arch": "xcit_nano_12_p9"}, "xcit_nano_12_p9"),
        ({"repeated_augment": 5}, "multiple of repeated_augment = 5, got 12"),
        ({"distill": "hard"}, "teacher PATH"),
        ({"keep_head": True}, "keep_head"),
        ({"mean": "[0.5]", "std": "[0.5]"}, "3 channels"),
        ({"eval_resize": 20}, "eval_resize must be >= the crop"),
        ({"test": "nowhere.beton"}, "nowhere.beton"),
        ({"batch_size_per_gpu": 40, "repeated_augment": 4}, None),
        ({"batch_size_per_gpu": 49}, "fewer than one global batch"),
        ({"batch_size_per_gpu": 96, "repeated_augment": 4}, "less than one global batch"),
    ],
)
def test_bad_input_is_one_clear_line(photos, tmp_path, changes, words):
    if words is None:
        assert task(photos, tmp_path / "run", **changes).steps_per_epoch == 1
        return
    with pytest.raises(UserError, match=words) as raised:
        finetune(config(photos, tmp_path / "run", **changes))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_command_without_a_start_says_so_with_status_2(photos, tmp_path):
    arguments = flags(photos, tmp_path / "run", from_scratch="false")
    result = command(*arguments, run=subprocess.run)  # whose imports may warn
    assert result.returncode == 2
    assert result.stderr.startswith("error: give exactly one of --init PATH and --from_scratch")
    assert len(result.stderr.splitlines()) == 1


RECIPES = sorted((CONFIGS / "finetune").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_command_in_a_recipes_header_loads_it(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    comment = recipe.read_text().replace("\\\n#", "")
    command = re.search(r"eval/finetune\.py (.*)", comment)[1].split()
    loaded = load_config(FinetuneConfig, argv=command)
    assert command[:2] == ["--config", f"configs/finetune/{recipe.name}"]
    assert loaded.optim.epochs > 1
