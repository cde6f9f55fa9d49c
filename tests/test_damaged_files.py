"""Files that were cut, or of which one bit was flipped: an error or the right content, never else.

Each reader opens a real file of its kind, 20 times cut and 20 times with one bit flipped at seeded
random places; the long test does 200 of each.
"""

import copy
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import photo_tiles
from safetensors.torch import save_file

from ssl_xcit.checkpoints.convert import convert
from ssl_xcit.checkpoints.folder import load_latest, save_checkpoint
from ssl_xcit.checkpoints.read import read
from ssl_xcit.data.beton import Beton
from ssl_xcit.data.command import verify_beton
from ssl_xcit.data.writer import write_beton
from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.evaluation.cache import _write, load_facts, load_features
from ssl_xcit.evaluation.features import Features
from ssl_xcit.evaluation.linear_file import Classifier, load_classifier, save_classifier
from ssl_xcit.evaluation.results import write_result
from ssl_xcit.models.xcit import build_xcit
from ssl_xcit.report.gather import find_results
from ssl_xcit.report.runs import describe_run, read_run
from ssl_xcit.runtime.config import load_config
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.training.metrics import MetricsWriter, read_metrics
from ssl_xcit.training.run_folder import claim_folder

FACTS = {"step": 3, "epoch": 1, "arch": "micro_p16", "mean": [0.5] * 3, "std": [0.25] * 3}


class Case(NamedTuple):
    """A file, and what its reader gives of it."""

    file: Path
    look: Callable[[], object]
    fallback: object = None  # what may come instead, besides an error
    places: tuple[int, ...] = ()  # bytes to be hit; by default all


def agrees(found: object, truth: object) -> bool:
    """Whether all that `truth` names has the same value in `found`."""
    if isinstance(truth, torch.Tensor):
        return isinstance(found, torch.Tensor) and torch.equal(found, truth)
    if isinstance(truth, dict):
        return isinstance(found, dict) and all(
            k in found and agrees(found[k], truth[k]) for k in truth
        )
    if isinstance(truth, list | tuple) and len(truth):
        return len(found) == len(truth) and all(map(agrees, found, truth))
    return bool(found == truth)


def attack(case: Case, rounds: int) -> list[str]:
    """What went wrong: a traceback, or other content without an error."""
    generator = random.Random(f"{case.file.name} {rounds}")
    whole = case.file.read_bytes()
    truth = copy.deepcopy(case.look())  # tensors may lie in the file itself, by its map
    places = case.places or range(len(whole))
    wrong = []

    def check(what: str) -> None:
        try:
            found = case.look()
        except UserError:
            return
        except Exception as error:
            wrong.append(f"{what}: {type(error).__name__} {error}")
            return
        if not agrees(found, truth) and (case.fallback is None or not agrees(found, case.fallback)):
            wrong.append(f"{what}: other content, and no error")

    for _ in range(rounds):
        length = generator.randrange(len(whole))
        case.file.write_bytes(whole[:length])
        # JSON ends with a line's end that means nothing
        if whole[:length].strip() != whole.strip():
            check(f"cut to {length}")
    case.file.write_bytes(whole)
    for _ in range(rounds):
        place, bit = generator.choice(places), generator.randrange(8)
        with case.file.open("r+b") as file:
            file.seek(place)
            file.write(bytes([whole[place] ^ 1 << bit]))
        check(f"bit {bit} of byte {place}")
        with case.file.open("r+b") as file:
            file.seek(place)
            file.write(whole[place : place + 1])
    assert case.file.read_bytes() == whole
    return wrong


@pytest.fixture(params=[20, pytest.param(200, marks=pytest.mark.long)], ids="{} of each".format)
def rounds(request) -> int:
    return request.param


@pytest.fixture
def network(micro) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build_xcit(micro, num_classes=3).state_dict()


def test_a_beton(tmp_path, rounds):
    path = tmp_path / "x.beton"
    write_beton(photo_tiles(tmp_path / "tiles", 3), path, progress=False)
    content = path.read_bytes()
    beton = Beton(path)

    def look() -> object:
        if problems := verify_beton(path, workers=1, progress=False):
            raise UserError(str(problems))
        found = Beton(path)
        images = [
            found.data[p:][:s].tobytes() for p, s in zip(found.pointers, found.sizes, strict=True)
        ]
        numbers = [found.labels.tolist(), found.heights.tolist(), found.widths.tolist()]
        return [*numbers, found.modes.tolist(), images, found.class_names, found.channels]

    # 8 MB of nothing lie between the index and the first image
    first = int(beton.pointers.min())
    places = (*range(200), *range(first, len(content)), *range(2088, 2400))
    assert attack(Case(path, look, places=places), rounds) == []


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json", "manifest.json"])
def test_a_checkpoint_falls_back_to_the_one_before(tmp_path, rounds, name):
    groups = [{"weights": {"a": torch.randn(20), "b": torch.arange(3)}} for _ in range(2)]
    for step, tensors in enumerate(groups, 2):
        saved = save_checkpoint(tmp_path, step, tensors, FACTS | {"step": step})

    def look() -> object:
        found, skipped = load_latest(tmp_path)
        assert (len(skipped) > 0) == (found.state["step"] == 2)
        return found.state["step"], found.state, found.tensors

    before = 2, FACTS | {"step": 2}, groups[0]
    assert attack(Case(saved.path / name, look, before), rounds) == []


def weights_of(path: Path, **options: str) -> Callable[[], object]:
    def look() -> object:
        found = read(path, **options)
        return found.state, found.statistics, found.step

    return look


def test_one_file_of_a_checkpoint_is_as_safe_as_the_folder(tmp_path, rounds, network):
    groups = {"teacher": network, "student": network}
    path = save_checkpoint(tmp_path, 3, groups, FACTS).path / "teacher.safetensors"
    assert attack(Case(path, weights_of(path)), rounds) == []
    copied = tmp_path / "copied.safetensors"
    copied.write_bytes(path.read_bytes())
    assert attack(Case(copied, weights_of(copied)), rounds) == []


@pytest.mark.parametrize(("name", "to"), [("x.safetensors", "safetensors"), ("x.pth", "official")])
def test_a_converted_file(tmp_path, rounds, network, name, to):
    source = save_checkpoint(tmp_path, 3, {"teacher": network}, FACTS).path
    path = convert(source, tmp_path / name, to).path
    assert weights_of(path)()[1] == ((0.5,) * 3, (0.25,) * 3)
    assert attack(Case(path, weights_of(path)), rounds) == []


def rows_of(count: int) -> Iterable[dict]:
    for step in range(count):
        yield {"step": step, "epoch": step // 4, "train/loss": 10 / (step + 3), "speed": 12.5}


def test_a_log_keeps_all_rows_but_the_damaged(tmp_path, rounds, capfd):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    for row in rows_of(12):
        writer.write(row)
    writer.close()
    truth = {row["step"]: row for row in rows_of(12)}
    whole = path.read_bytes()

    def look() -> object:
        rows = read_metrics(path)
        said = capfd.readouterr().err
        steps = [row["step"] for row in rows]
        wrong = [row for row in rows if not agrees(row, truth[row["step"]])]
        cut = len(path.read_bytes()) < len(whole)
        if cut:  # an earlier state of the file, and at most its last line is in part
            return (
                wrong,
                steps == list(range(len(steps))),
                len(steps) >= path.read_bytes().count(b"\n"),
            )
        # A flipped line's end makes one damaged line of two
        return (
            wrong,
            steps == sorted(steps) and len(steps) >= 10,
            len(steps) == 12 or "damaged" in said,
        )

    assert attack(Case(path, look), rounds) == []


def test_a_damaged_line_in_the_middle_is_named_and_the_later_rows_stay(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    MetricsWriter(path).close()
    lines = [json.dumps(row) for row in rows_of(6)]  # of a version without checksums
    lines[2] = "\x00\x00"
    lines[4] = '{"steq": 4}'
    path.write_text("\n".join(lines) + '\n{"step": 6, "tr')
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 3, 5]
    assert "metrics.jsonl: lines 3, 5 damaged, left out" in capsys.readouterr().err
    writer = MetricsWriter(path, first_step=5)  # a run that continues loses no row, either
    writer.close()
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 3]


@pytest.mark.parametrize("name", ["run.json", "config.yaml", "state.json"])
def test_a_run_folder(tmp_path, rounds, name):
    out = tmp_path / "run"
    given = ["--data", "x", "--out", str(out), "--arch", "xcit_nano_12_p16"]
    config = load_config(TrainConfig, argv=given)
    claim_folder(out, "pretraining", config, 12)
    save_checkpoint(out / "checkpoints", 3, {"a": {"b": torch.ones(2)}}, FACTS | {"epoch": 100})
    file = next(out.rglob(name))

    def look() -> object:
        read_run(out)
        found = describe_run(out, {})["state"]
        claim_folder(out, "pretraining", config, 12)  # what the same command does
        return found

    # A checkpoint that is damaged does not count
    fallback = "not started" if name == "state.json" else None
    assert attack(Case(file, look, fallback), rounds) == []


@pytest.mark.parametrize("name", ["features.json", "train-00000000.safetensors"])
def test_stored_features(tmp_path, rounds, name):
    torch.manual_seed(0)
    for part in ("train", "test"):
        found = Features(torch.randn(6, 4), torch.arange(6) % 2, torch.arange(6))
        _write(tmp_path / f"{part}-00000000.safetensors", {"cls": found}, {"precision": "fp32"})
    images = {"path": "x", "images": 6, "classes": 2}
    facts = {"features": ["cls"], "train": images, "test": images, "transform": {"resize": 256}}
    write_result(facts, tmp_path / "features.json")

    def look() -> object:
        said = load_facts(tmp_path)
        parts = [load_features(tmp_path, part) for part in ("train", "test")]
        return said, *({kind: list(part[kind]) for kind in said["features"]} for part in parts)

    assert attack(Case(tmp_path / name, look), rounds) == []


def test_stored_features_of_fewer_images_than_there_were_are_refused(tmp_path):
    for start in (0, 6):
        indices = torch.arange(start, start + 6)
        part = {"cls": Features(torch.randn(6, 4), indices % 2, indices)}
        _write(tmp_path / f"train-{start:08d}.safetensors", part, {})
    images = {"path": "x", "images": 12, "classes": 2}
    facts = {"features": ["cls"], "train": images, "test": images}
    write_result(facts, tmp_path / "features.json")
    assert len(load_features(tmp_path, "train")["cls"].labels) == 12
    (tmp_path / "train-00000006.safetensors").unlink()
    with pytest.raises(UserError, match="features of 6 of the 12 images of train"):
        load_features(tmp_path, "train")


@pytest.mark.parametrize("name", ["linear.safetensors", "linear.json"])
def test_a_linear_classifier(tmp_path, rounds, name):
    torch.manual_seed(0)
    facts = {"features": "cls", "trained_on": "x", "backbone": "ab", "class_names": ["a", "b"]}
    facts |= {"transform": {"resize": 256, "crop": 224, "mean": [0.485, 0.456, 0.406]}}
    save_classifier(tmp_path, Classifier(torch.randn(3, 4), torch.randn(3), facts))

    def look() -> object:
        return list(load_classifier(tmp_path))

    assert attack(Case(tmp_path / name, look), rounds) == []


def test_a_result_in_a_report(tmp_path, rounds):
    path = tmp_path / "knn.json"
    rows = [{"k": 10, "temperature": 0.07, "top1": 71.25, "top5": 90.5, "features": "cls"}]
    facts = {"source": "checkpoint", "checkpoint": "a/b", "step": 3, "role": "teacher"}
    facts |= {"versions": {}, "features": ["cls"], "test": {"images": 100}, "accuracy": rows}
    write_result(facts, path)

    def look() -> object:
        return [tuple(result) for result in find_results(tmp_path, [path], asked=True)]

    assert attack(Case(path, look), rounds) == []


def test_files_without_a_checksum_are_still_read(tmp_path, network):
    save_file(network, tmp_path / "x.safetensors")
    torch.serialization.set_crc32_options(False)
    torch.save(network, tmp_path / "x.pth")
    torch.serialization.set_crc32_options(True)
    torch.save(network, tmp_path / "y.pth", _use_new_zipfile_serialization=False)
    for name in ("x.safetensors", "x.pth", "y.pth"):
        assert agrees(read(tmp_path / name).state, network)
    found = Features(torch.randn(6, 4), torch.arange(6), torch.arange(6))
    tensors = {"cls": found.features, "labels": found.labels, "indices": found.indices}
    save_file(tensors, tmp_path / "train-00000000.safetensors", {"facts": json.dumps({})})
    facts = {"features": "cls", "train": {"images": 6}, "test": {"images": 6}}
    (tmp_path / "features.json").write_text(json.dumps(facts))
    assert agrees(load_features(tmp_path, "train")["cls"].features, found.features)
