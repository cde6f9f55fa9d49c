"""Supervised checkpoints with their own classifiers.

Oracles: the published table, timm's XCiT and torchvision's transforms of Pillow's images, hits
counted by a loop, scipy's Wilson interval.
"""

import dataclasses
import hashlib
import json
import statistics
import sys
from importlib import resources
from pathlib import Path

import forked
import numpy as np
import pytest
import shallow
import timm
import torch
from PIL import Image
from scipy.stats import binomtest
from sklearn.datasets import load_sample_images
from timm.models.xcit import checkpoint_filter_fn
from torchvision import transforms as T

from ssl_xcit.checkpoints.folder import save_checkpoint
from ssl_xcit.checkpoints.formats import to_mmpretrain
from ssl_xcit.checkpoints.zoo import by_file_name, by_hash, zoo
from ssl_xcit.data.datasets import ImageFolder, evaluation_loader, open_images
from ssl_xcit.data.writer import write_beton
from ssl_xcit.evaluation import supervised
from ssl_xcit.evaluation.accuracy import count_hits, wilson_interval
from ssl_xcit.evaluation.class_order import IMAGENET_WNIDS, class_order
from ssl_xcit.evaluation.config import SupervisedConfig
from ssl_xcit.evaluation.supervised import (
    evaluate_supervised,
    evaluation_view,
    identify,
)
from ssl_xcit.models.variants import VARIANTS
from ssl_xcit.models.xcit import build_xcit
from ssl_xcit.runtime.config import run_command
from ssl_xcit.runtime.distributed import Distributed
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.runtime.sealed import read_sealed

SHARED = Path(__file__).parents[2] / "shared"
SEED_MODELS = SHARED / "fixtures" / "seed_models.json"
SAMPLE = SHARED / "data" / "imagenet_sample" / "train"
needs_table = pytest.mark.skipif(not SEED_MODELS.exists(), reason="the published table is not here")
needs_sample = pytest.mark.skipif(not SAMPLE.exists(), reason="the ImageNet sample is not here")

ROW = "xcit-nano-12-p16_3rdparty_in1k"
OFFICIAL = "xcit_nano_12_p16_224.pth"
BICUBIC = T.InterpolationMode.BICUBIC
PIPELINES = {
    (224, "mmpretrain"): T.Compose([T.Resize(256, BICUBIC), T.CenterCrop(224)]),
    (384, "mmpretrain"): T.Resize((384, 384), BICUBIC),
    (224, "full-crop"): T.Compose([T.Resize(224, BICUBIC), T.CenterCrop(224)]),
    (384, "full-crop"): T.Compose([T.Resize(384, BICUBIC), T.CenterCrop(384)]),
}
ALONE = Distributed(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module", autouse=True)
def _shallow_networks():
    with shallow.networks():
        yield


@pytest.fixture
def _whole_networks():
    with shallow.networks(depth=12):
        yield


@pytest.fixture(scope="module")
def wnids():
    text = (resources.files("timm.data") / "_info" / "imagenet_synsets.txt").read_text()
    return text.split()


def write_weights(folder):
    """An XCiT nano with random weights and 1,000 classes, under an official file's name."""
    torch.manual_seed(0)
    model = build_xcit("xcit_nano_12_p16")
    with torch.no_grad():  # the initial weights answer nearly the same to every image
        for name, parameter in model.named_parameters():
            if "gamma" in name or name.startswith("head"):
                parameter.copy_(torch.randn_like(parameter))
    torch.save({"model": model.state_dict()}, folder / OFFICIAL)
    return folder / OFFICIAL


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights"))


def photographs():
    """16 pieces of scikit-learn's two photographs, no two of one shape."""
    for i in range(16):
        photo = load_sample_images().images[i % 2]
        top, left, height, width = 20 * i, 30 * i, 90 + 4 * i, 160 - 5 * i
        yield Image.fromarray(photo[top : top + height, left : left + width])


def ask_timm(weights, depth):
    """Preprocessing -> timm's five likeliest classes of each photograph."""
    model = timm.create_model("xcit_nano_12_p16_224", depth=depth)
    state = torch.load(weights, weights_only=True)
    model.load_state_dict(checkpoint_filter_fn(state, model))
    to_tensor = [T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    found = {}
    for resolution, preprocess in ((224, "mmpretrain"), (224, "full-crop")):
        pipeline = T.Compose([PIPELINES[resolution, preprocess], *to_tensor])
        images = torch.stack([pipeline(image) for image in photographs()])
        with torch.no_grad():
            found[preprocess] = model.eval()(images).topk(5).indices.tolist()
    return found


@pytest.fixture(scope="module")
def answers(weights):
    return ask_timm(weights, depth=2)


def choose_labels(answers):
    """The true class of each photograph: often among the five likeliest, so that hits differ."""
    places = [0, 0, 3, 4, 0, 1, None, 2, 0, None, 0, 3, None, 1, 0, None]
    best = answers["mmpretrain"]
    return [best[i][place] if place is not None else i for i, place in enumerate(places)]


@pytest.fixture(scope="module")
def labels(answers):
    return choose_labels(answers)


def write_folder(folder, wnids, labels):
    """The photographs as PNGs in a folder for each of ImageNet's classes, most of them empty."""
    for wnid in wnids:
        (folder / wnid).mkdir()
    for i, (image, label) in enumerate(zip(photographs(), labels, strict=True)):
        image.save(folder / wnids[label] / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, wnids, labels):
    return write_folder(tmp_path_factory.mktemp("val"), wnids, labels)


@pytest.fixture(scope="module")
def beton(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("beton") / "val.beton"
    write_beton(folder, path, mode="raw", progress=False)
    return path


def config(weights, data, **options):
    small = {"device": "cpu", "batch_size": 7, "num_workers": 1, "precision": "fp32"}
    options = small | options
    return SupervisedConfig(checkpoint=str(weights), data=str(data), **options)


# The table


@needs_table
@pytest.mark.usefixtures("_whole_networks")
def test_the_table_has_every_field_of_all_42_published_models():
    rows = json.loads(SEED_MODELS.read_text())
    assert len(rows) == len(zoo()) == 42
    assert list(zoo()) == [row["name"] for row in rows]
    for row, ours in zip(rows, zoo().values(), strict=True):
        variant, _, patch = ours.arch.rpartition("_p")
        sizes = VARIANTS[variant]
        found = {
            "name": ours.name,
            "arch": variant,
            "model": ours.arch,
            "size": variant.split("_")[1],
            "depth": sizes.depth,
            "patch": int(patch),
            "img_size": ours.image_size,
            "pretrain": "distill" if ours.distilled else "scratch",
            "top1": ours.top1,
            "top5": ours.top5,
            "checkpoint": ours.checkpoint,
            "date": ours.date,
            "sha8": ours.sha8,
            "embed_dim": sizes.embed_dim,
            "num_heads": sizes.num_heads,
            "cls_attn_layers": 2,
            "mlp_ratio": 4,
            "eta": sizes.eta,
            "tokens_norm": sizes.tokens_norm,
            "timm": ours.timm,
            "official_file": ours.official_file,
            "flops_exact": ours.flops,
            "params_exact": ours.params,
        }
        rounded = {"params_M", "flops_G", "params_M_str", "flops_G_str"}  # the exact ones are kept
        assert found == {k: v for k, v in row.items() if k not in rounded | {"config"}}


def test_full_crop_accuracies_are_timms_by_their_known_distances_from_the_others():
    """Means and extremes over each kind of model, as stated beside the table's origin."""
    distances: dict = {}
    for row in zoo().values():
        distances.setdefault((row.image_size, row.distilled), []).append(
            row.top1 - row.full_crop_top1
        )
        assert 85 < row.full_crop_top5 < 98
    stated = {
        (224, False): (-0.06, -0.23, 0.37),
        (224, True): (-0.11, -0.33, 0.13),
        (384, True): (-0.07, -0.53, 0.11),
    }
    assert distances.keys() == stated.keys()
    for kind, expected in stated.items():
        found = [summary(distances[kind]) for summary in (statistics.mean, min, max)]
        assert found == pytest.approx(expected, abs=0.006)  # two digits are stated


def test_files_are_known_by_every_way_of_naming_them_and_by_their_hash():
    for row in zoo().values():
        for name in (row.checkpoint, row.official_file, f"{row.timm}.safetensors", row.name):
            assert by_file_name(f"some/where/{name}") == row
        assert by_file_name(f"{row.name}_20991231-00000000.pth") == row
        assert by_hash(row.sha8 + 56 * "0") == row
    for name in ("xcit_nano_12_p16_224_my.pth", "xcit_nano_12_p16.pth", "resnet50.pth"):
        assert by_file_name(name) is None
    assert by_hash(64 * "0") is None


def test_a_name_a_hash_and_a_file_name_are_asked_in_this_order():
    first, second, third = list(zoo().values())[:3]
    file, sha256 = Path(third.official_file), second.sha8 + 56 * "0"
    assert identify(file, sha256) == (second, [])
    assert identify(file, None) == (third, [])
    assert identify(file, third.sha8 + 56 * "0", third.name) == (third, [])
    assert identify(Path("a.pth"), 64 * "0") == (None, [])
    model, (warning,) = identify(file, sha256, first.name)
    assert model == first
    assert f"is the published file of {second.name}, not of {first.name}" in warning
    model, (warning,) = identify(file, 64 * "1")
    assert model == third
    assert (
        f"is not mmpretrain's file {third.checkpoint}: its sha256 begins with 11111111" in warning
    )


@pytest.mark.usefixtures("_whole_networks")
def test_the_list_shows_42_of_42_equal(capsys, tmp_path):
    out = tmp_path / "list.json"
    result = evaluate_supervised(SupervisedConfig(list=True, out=str(out)))
    assert result["equal"] == len(result["models"]) == 42
    text = capsys.readouterr().out
    assert "DIFFERENT" not in text
    assert "equal to the published integers: 42 of 42" in text
    assert read_sealed(out) == result


@pytest.mark.usefixtures("_whole_networks")
def test_the_list_would_show_a_difference(capsys, monkeypatch):
    row = zoo()[ROW]
    table = dict(zoo()) | {ROW: dataclasses.replace(row, flops=row.flops + 1)}
    monkeypatch.setattr("ssl_xcit.evaluation.supervised_tables.zoo", lambda: table)
    assert evaluate_supervised(SupervisedConfig(list=True))["equal"] == 41
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "DIFFERENT" in line]
    assert line.startswith(ROW + " ")


# Preprocessing


@needs_sample
@pytest.mark.parametrize("kind", PIPELINES, ids=str)
@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.long)])
def test_views_of_a_beton_are_torchvisions_bit_for_bit(kind, every, sample):
    files = sorted(SAMPLE.glob("*/*"))
    assert len(files) == 250
    view, seen, subset = evaluation_view(*kind), 0, np.arange(0, 250, every)
    loader = evaluation_loader(open_images(sample), view, 50, ALONE, subset=subset)
    for images, _, indices in loader:
        for image, index in zip(images, indices.tolist(), strict=True):
            with Image.open(files[index]) as file:
                expected = np.asarray(PIPELINES[kind](file.convert("RGB")))
            assert np.array_equal(image.permute(1, 2, 0).numpy(), expected), files[index]
            seen += 1
    assert seen == len(subset)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    path = tmp_path_factory.mktemp("sample") / "sample.beton"
    write_beton(SAMPLE, path, progress=False)
    return path


def test_preprocessing_without_a_definition_is_refused():
    with pytest.raises(UserError, match="at 224 and 384 pixels, not at 288: add --preprocess full"):
        evaluation_view(288, "mmpretrain")
    assert evaluation_view(288, "full-crop").size == 288


# Accuracy


def hits(answers, labels):
    top1 = sum(best[0] == label for best, label in zip(answers, labels, strict=True))
    top5 = sum(label in best for best, label in zip(answers, labels, strict=True))
    return 100 * top1 / len(labels), 100 * top5 / len(labels)


@pytest.mark.parametrize("preprocess", ["mmpretrain", "full-crop"])
@pytest.mark.parametrize("source", ["folder", "beton"])
def test_accuracy_is_that_of_timms_model_on_torchvisions_images(
    preprocess, source, request, weights, answers, labels, capsys, tmp_path
):
    data, out = request.getfixturevalue(source), tmp_path / "result.json"
    result = evaluate_supervised(config(weights, data, preprocess=preprocess, out=str(out)))
    expected = hits(answers[preprocess], labels)
    if preprocess == "mmpretrain":
        assert expected == (100 * 6 / 16, 100 * 12 / 16)
    assert (result["top1"], result["top5"]) == expected
    assert result["model"] == ROW  # told by the file's name
    assert result["published_file"] is False
    published = {"mmpretrain": (70.35, 89.98), "full-crop": (69.982, 89.780)}[preprocess]
    assert tuple(result["published"].values()) == published
    assert result["difference"]["top5"] == pytest.approx(result["top5"] - published[1])
    assert (result["format"], result["classes_checked_by"]) == ("official", "names")
    *text, line = capsys.readouterr().out.splitlines()
    assert json.loads(line) == read_sealed(out)
    assert json.loads(line)["top1"] == expected[0]
    assert any(f"published {published[0]:.2f}, difference" in part for part in text)
    assert any("is not mmpretrain's file" in part for part in text)


@pytest.mark.long
@pytest.mark.usefixtures("_whole_networks")
def test_a_whole_network_has_the_accuracy_of_timms(wnids, tmp_path):
    weights = write_weights(tmp_path)
    answers = ask_timm(weights, depth=12)
    labels = choose_labels(answers)
    (tmp_path / "val").mkdir()
    folder = write_folder(tmp_path / "val", wnids, labels)
    for preprocess, best in answers.items():
        found = evaluate_supervised(config(weights, folder, preprocess=preprocess))
        assert (found["top1"], found["top5"]) == hits(best, labels)
        assert found["top1"] > 0


def test_the_published_file_is_recognised_by_its_hash_whatever_its_name(
    weights, beton, labels, answers, tmp_path, monkeypatch
):
    file = tmp_path / "renamed.pth"
    state = to_mmpretrain(torch.load(weights, weights_only=True)["model"])
    # the container that mmpretrain publishes
    torch.save({"state_dict": state}, file, _use_new_zipfile_serialization=False)
    sha8 = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(
        supervised, "by_hash", lambda sha: dataclasses.replace(zoo()[ROW], sha8=sha[:8])
    )
    result = evaluate_supervised(config(file, beton))
    assert (result["model"], result["published_file"], result["warnings"]) == (ROW, True, [])
    assert result["format"] == "mmpretrain"
    assert (result["top1"], result["top5"]) == hits(answers["mmpretrain"], labels)
    assert result["sha256"].startswith(sha8)


def test_bf16_is_near_float32(weights, beton, labels, answers):
    result = evaluate_supervised(config(weights, beton, precision="bf16"))
    assert result["precision"] == "bf16"
    assert abs(result["top5"] - hits(answers["mmpretrain"], labels)[1]) <= 100 * 4 / 16


def test_another_checkpoint_needs_a_resolution_and_has_nothing_published(
    tmp_path, photos, weights, beton
):
    torch.manual_seed(0)
    path = tmp_path / "mine.pth"
    torch.save({"model": build_xcit("xcit_nano_12_p16", num_classes=2).state_dict()}, path)
    with pytest.raises(UserError, match=r"add --model NAME .* or for another checkpoint --resol"):
        evaluate_supervised(config(path, photos))
    options = {"resolution": 64, "preprocess": "full-crop"}
    result = evaluate_supervised(config(path, photos, **options))
    assert (result["model"], result["published"], result["images"]) == (None, None, 48)
    assert result["top5"] == 100
    assert result["classes_checked_by"] == "number"
    with pytest.raises(UserError, match="has 2 classes, xcit-nano-12-p16_3rdparty_in1k 1,000"):
        evaluate_supervised(config(path, photos, model=ROW))
    # a published model at another resolution is not what was published
    assert evaluate_supervised(config(weights, beton, **options))["difference"] is None


def test_a_checkpoint_of_ours_brings_its_own_statistics_and_the_role_that_is_asked_for(
    tmp_path, photos
):
    torch.manual_seed(0)
    state = build_xcit("xcit_nano_12_p16", num_classes=2).state_dict()
    networks = {"model": state, "model_ema": state | {"head.bias": state["head.bias"] + 1}}
    facts = {"step": 7, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    path = save_checkpoint(tmp_path, 7, networks, facts).path
    options = {"resolution": 32, "preprocess": "full-crop"}
    result = evaluate_supervised(config(path, photos, role="model", **options))
    assert (result["role"], result["step"], result["images"]) == ("model", 7, 48)
    assert result["preprocess"]["mean"] == [0.1, 0.2, 0.3]
    assert (result["sha256"], result["published_file"]) == (None, None)
    assert evaluate_supervised(config(path, photos, **options))["role"] == "model_ema"


def test_weights_without_classifier_of_another_size_or_not_finite_are_refused(
    tmp_path, beton, weights
):
    state = torch.load(weights, weights_only=True)["model"]
    path = tmp_path / OFFICIAL
    torch.save({k: v for k, v in state.items() if not k.startswith("head.")}, path)
    with pytest.raises(UserError, match="has no classifier: evaluate a backbone by eval/linear"):
        evaluate_supervised(config(path, beton))
    torch.save({"model": state | {"norm.bias": state["norm.bias"] * float("nan")}}, path)
    with pytest.raises(UserError, match="logits of 16 images are not finite"):
        evaluate_supervised(config(path, beton))
    with pytest.raises(UserError, match="is a xcit_nano_12_p16, not a xcit_tiny_12_p8"):
        evaluate_supervised(config(weights, beton, model="xcit-tiny-12-p8_3rdparty_in1k"))


@pytest.mark.parametrize(("right", "count"), [(0, 7), (7, 7), (3, 10), (40_935, 50_000)])
def test_the_interval_is_wilsons(right, count):
    low, high = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right, count) == pytest.approx((100 * low, 100 * high), abs=1e-9)


def test_hits_are_counted_with_fewer_than_five_classes_and_by_the_classes_order():
    pixels = torch.tensor([[9, 1, 0], [1, 2, 9], [3, 9, 4]], dtype=torch.uint8)
    batches = [(pixels[:, :, None, None], torch.tensor([0, 0, 1]), torch.arange(3))]
    statistics = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    network = torch.nn.Flatten()  # three classes: the channels
    counts = [
        count_hits(network, batches, statistics, ALONE, "fp32", torch.tensor(order))
        for order in ([0, 1, 2], [2, 1, 0], [2, 0, 1])
    ]
    assert counts == [(3, 2, 3, 0), (3, 2, 3, 0), (3, 1, 3, 0)]
    assert count_hits(network, batches, statistics, ALONE, "fp32") == counts[0]


TWO_RANKS = """
import sys, torch
from ssl_xcit.evaluation.supervised import evaluate_supervised
from ssl_xcit.evaluation.config import SupervisedConfig

torch.set_num_threads(1)
evaluate_supervised(SupervisedConfig(
    checkpoint=sys.argv[1], data=sys.argv[2], out=sys.argv[3], device="cpu", num_workers=1,
    precision="fp32"))
"""


def test_two_ranks_share_the_images(weights, beton, labels, answers, tmp_path):
    script, out = tmp_path / "two_ranks.py", tmp_path / "result.json"
    script.write_text(TWO_RANKS)
    printed = forked.run_ranks(
        2, [sys.executable, shallow.PROGRAM, "2", script, weights, beton, out]
    )
    result = json.loads(out.read_text())
    assert (result["ranks"], result["images"]) == (2, 16)
    assert (result["top1"], result["top5"]) == hits(answers["mmpretrain"], labels)
    assert sum(line.startswith("{") for text in printed for line in text.splitlines()) == 1


# Classes


class Named(ImageFolder):
    """Images as far as their classes go."""

    def __init__(self, names, labels=None):
        self.path, self.unlabelled = Path("val"), ""
        self.class_names = None if names is None else tuple(names)
        self.labels = np.arange(len(names)) if labels is None else labels


def test_imagenets_digest_is_that_of_its_wordnet_numbers(wnids):
    assert wnids == sorted(wnids)
    assert hashlib.sha256("\n".join(wnids).encode()).hexdigest() == IMAGENET_WNIDS
    order = class_order(Named(wnids), 1000)
    assert order.outputs.tolist() == list(range(1000))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: names[:250], "val has 250 classes; ImageNet's 1,000 .* --classes TRAIN_FOL"),
        (lambda names: [*names[:-1], "n99999999"], "1,000 classes, but not those of ImageNet-1k"),
        (lambda names: [*names[:-1], "toilet paper"], "1 classes .* not named by WordNet numbers"),
        (lambda names: names[::-1], "not in the order of their sorted names"),
    ],
)
def test_other_than_imagenets_classes_are_refused_with_what_to_do(wnids, change, message):
    with pytest.raises(UserError, match=message):
        class_order(Named(change(wnids)), 1000)


def test_some_classes_are_numbered_by_all_of_them(wnids, folder, tmp_path):
    some = [wnids[i] for i in (3, 500, 999)]
    text = tmp_path / "classes.txt"
    text.write_text("\n".join(f"{wnid} a name, another" for wnid in wnids[::-1]))
    for source in (text, folder):
        assert class_order(Named(some), 1000, source).outputs.tolist() == [3, 500, 999]
    with pytest.raises(UserError, match=r"1 classes of val are not in .*: n00000000"):
        class_order(Named(["n00000000", *some]), 1000, text)
    text.write_text("\n".join(wnids[:999]))
    with pytest.raises(UserError, match="names 999 classes, the classifier has 1000"):
        class_order(Named(some), 1000, text)
    with pytest.raises(UserError, match=r"cannot read the class names in .*: No such file"):
        class_order(Named(some), 1000, tmp_path / "nothing")
    text.write_text("a\nb\na")
    with pytest.raises(UserError, match="names a class twice"):
        class_order(Named(["a", "b"]), 2, text)


def test_without_names_only_the_numbers_can_be_checked_and_that_is_said():
    order = class_order(Named(None, np.array([0, 2, 2])), 4)
    assert order.checked == "number"
    assert "taken on trust" in order.warning
    with pytest.raises(UserError, match="labels from 0 to 4, the classifier outputs 0 to 3"):
        class_order(Named(None, np.array([0, 4])), 4)
    unlabelled = Named(None, np.array([0]))
    unlabelled.labels = None
    with pytest.raises(UserError, match="val has no labels"):
        class_order(unlabelled, 4)


def test_other_classifiers_need_as_many_classes_as_the_images_have():
    assert class_order(Named(["a", "b"]), 2).outputs.tolist() == [0, 1]
    with pytest.raises(UserError, match="val has 2 classes, the classifier 3"):
        class_order(Named(["a", "b"]), 3)


# A folder of checkpoints


@pytest.fixture
def zoo_folder(tmp_path, weights):
    """A good file, a cut one, one of another architecture, and one that is nobody's."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / OFFICIAL).write_bytes(weights.read_bytes())
    (folder / zoo()[ROW].checkpoint).write_bytes(weights.read_bytes()[:100_000])
    (folder / "xcit_tiny_12_p8_224.pth").write_bytes(weights.read_bytes())
    (folder / "mine.pth").write_bytes(weights.read_bytes())
    (folder / "notes.txt").write_text("no checkpoint")
    return folder


def all_of(folder, data, out, **options):
    options = {"device": "cpu", "num_workers": 1, "precision": "fp32"} | options
    return SupervisedConfig(all=str(folder), data=str(data), out=str(out), **options)


def test_bad_files_of_a_folder_are_listed_and_the_others_evaluated(
    zoo_folder, beton, tmp_path, labels, answers, capsys
):
    out = tmp_path / "zoo.json"
    argv = ["--all", str(zoo_folder), "--data", str(beton), "--out", str(out), "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        run_command(
            SupervisedConfig, "ssl_xcit.evaluation.supervised:evaluate_supervised", argv=argv
        )
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "error: 2 of 4 files could not be evaluated: " in error
    entries = {entry["file"]: entry for entry in json.loads(out.read_text())["files"]}
    assert {name: entry["status"] for name, entry in entries.items()} == {
        "mine.pth": "skipped",
        zoo()[ROW].checkpoint: "failed",
        OFFICIAL: "done",
        "xcit_tiny_12_p8_224.pth": "failed",
    }
    assert "is a xcit_nano_12_p16, not a xcit_tiny_12_p8" in error
    done = entries[OFFICIAL]
    assert (done["top1"], done["top5"]) == hits(answers["mmpretrain"], labels)
    table = out.with_suffix(".md").read_text()
    assert f"| {ROW} | {done['top1']:.2f} |" in table
    assert f"| {zoo()[ROW].checkpoint} | " in table
    assert table.count("\n| ") == 6  # two heads, a result, three reasons


def test_an_interrupted_folder_goes_on_where_it_was(zoo_folder, beton, tmp_path, monkeypatch):
    out = tmp_path / "zoo.json"
    for name in (zoo()[ROW].checkpoint, "xcit_tiny_12_p8_224.pth"):
        (zoo_folder / name).unlink()
    second = zoo_folder / "xcit_nano_12_p16_224_dist.pth"
    second.write_bytes((zoo_folder / OFFICIAL).read_bytes())
    real, evaluated = supervised._evaluate, []

    def watch(candidate, config, ranks):
        evaluated.append(Path(candidate.weights.path).name)
        if len(evaluated) == 2:
            raise KeyboardInterrupt
        return real(candidate, config, ranks)

    monkeypatch.setattr(supervised, "_evaluate", watch)
    with pytest.raises(KeyboardInterrupt):
        evaluate_supervised(all_of(zoo_folder, beton, out))
    first = json.loads(out.read_text())
    report = evaluate_supervised(all_of(zoo_folder, beton, out))
    assert evaluated == [OFFICIAL, second.name, second.name]
    assert report["files"][1] == first["files"][1]  # after mine.pth
    assert report == json.loads(json.dumps(evaluate_supervised(all_of(zoo_folder, beton, out))))
    assert len(evaluated) == 3
    # another file under the same name is another result
    state = torch.load(second, weights_only=True)["model"]
    torch.save({"model": state, "epoch": 7}, second)
    evaluate_supervised(all_of(zoo_folder, beton, out))
    assert evaluated[3:] == [second.name]
    with pytest.raises(UserError, match="made with other images or settings: choose another --out"):
        evaluate_supervised(all_of(zoo_folder, beton, out, preprocess="full-crop"))
    out.write_text("[]")
    with pytest.raises(UserError, match="is no report of --all, so it is not overwritten"):
        evaluate_supervised(all_of(zoo_folder, beton, out))


def test_a_folder_without_checkpoints_is_refused(tmp_path, beton):
    with pytest.raises(UserError, match="holds no checkpoint file"):
        evaluate_supervised(all_of(tmp_path, beton, tmp_path / "a.json"))
    with pytest.raises(UserError, match=r"no folder .*nothing"):
        evaluate_supervised(all_of(tmp_path / "nothing", beton, tmp_path / "a.json"))


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of --checkpoint, --all and --list, got 0"),
        ({"checkpoint": "a", "list": True}, "got 2 of them"),
        ({"checkpoint": "a"}, "missing --data"),
        ({"all": "a", "data": "b"}, "missing --out"),
        ({"all": "a", "data": "b", "out": "c.md"}, r"out must end in \.json"),
        ({"all": "a", "data": "b", "out": "c.json", "resolution": 224}, "drop both options"),
        (
            {"checkpoint": "a", "data": "b", "model": "xcit-small-12-p8_3rdparty-dist_in1k-348px"},
            "nearest xcit-small-12-p8_3rdparty-dist_in1k-384px",
        ),
        ({"checkpoint": "a", "data": "b", "batch_size": 0}, "batch_size must be >= 1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        SupervisedConfig(**options)
