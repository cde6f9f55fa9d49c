"""Checkpoints are complete or refused, never half; and foreign files load without running code."""

import argparse
import gzip
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from ssl_xcit.checkpoints.folder import load_checkpoint, load_latest, save_checkpoint
from ssl_xcit.checkpoints.formats import to_mmpretrain, to_timm
from ssl_xcit.checkpoints.read import check_tensors, infer_arch, read, read_linear_weights
from ssl_xcit.data.pixels import IMAGENET_MEAN, IMAGENET_STD
from ssl_xcit.dino.head import DINOHead
from ssl_xcit.evaluation.results import describe_subject
from ssl_xcit.evaluation.subject import origin
from ssl_xcit.models.xcit import build_xcit
from ssl_xcit.runtime.errors import UserError

FIXTURES = Path(__file__).parent / "fixtures"
SHARED = Path(__file__).parents[2] / "shared" / "fixtures"
upstream_files = pytest.mark.skipif(
    not SHARED.exists(), reason="the shared files of the upstream programs are not beside us"
)


def normalised(image_u8: np.ndarray) -> torch.Tensor:
    mean, std = ([[[x]] for x in xs] for xs in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return torch.from_numpy(
        ((image_u8 / np.float32(255)) - np.float32(mean)) / np.float32(std)
    ).float()


def gap(ours: torch.Tensor, recorded: np.ndarray) -> float:
    return (ours - torch.from_numpy(recorded)).abs().max().item()


def tensors(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "student": {"weight": torch.randn(30, 40, generator=generator), "count": torch.tensor(3)},
        "loss": {"center": torch.randn(1, 8, generator=generator)},
    }


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[group].keys() == b[group].keys()
        and all(torch.equal(a[group][key], b[group][key]) for key in a[group])
        for group in a
    )


def test_what_is_saved_is_what_is_loaded(tmp_path):
    saved = save_checkpoint(tmp_path, 7, tensors(0), {"arch": "x"})
    found, skipped = load_latest(tmp_path)
    assert same(found.tensors, tensors(0))
    assert (found.state["step"], found.state["arch"], found.path) == (7, "x", saved.path)
    assert skipped == []


def test_views_and_shared_memory_are_saved_by_value(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    save_checkpoint(tmp_path, 1, {"student": {"a": base.T, "b": base, "c": base[1]}}, {})
    found = load_checkpoint(tmp_path / "step_00000001").tensors["student"]
    assert torch.equal(found["a"], base.T)
    assert torch.equal(found["c"], base[1])


def test_the_newest_ones_and_those_marked_are_kept(tmp_path):
    for step in range(1, 7):
        save_checkpoint(tmp_path, step, tensors(step), {}, keep_last=2, keep=step == 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "last",
        "step_00000003",
        "step_00000005",
        "step_00000006",
    ]
    assert (tmp_path / "last").resolve().name == "step_00000006"


@pytest.mark.parametrize("file", ["student.safetensors", "state.json", "loss.safetensors"])
def test_a_cut_or_altered_file_sends_the_loader_one_checkpoint_back(tmp_path, file):
    save_checkpoint(tmp_path, 1, tensors(1), {})
    save_checkpoint(tmp_path, 2, tensors(2), {})
    victim = tmp_path / "step_00000002" / file
    content = victim.read_bytes()
    chance = random.Random(0)
    damages = [content[: chance.randrange(len(content))] for _ in range(10)]
    for _ in range(10):
        flipped = bytearray(content)
        flipped[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        damages.append(bytes(flipped))
    for damage in damages:
        victim.write_bytes(damage)
        found, skipped = load_latest(tmp_path)
        assert found.state["step"] == 1
        assert same(found.tensors, tensors(1))
        assert len(skipped) == 1
        assert "step_00000002" in skipped[0]
    victim.unlink()
    assert load_latest(tmp_path)[0].state["step"] == 1


def test_a_folder_without_manifest_is_incomplete(tmp_path):
    save_checkpoint(tmp_path, 1, tensors(1), {})
    (tmp_path / "step_00000001" / "manifest.json").unlink()
    found, skipped = load_latest(tmp_path)
    assert found is None
    assert "manifest.json" in skipped[0]


def test_a_newer_format_is_refused_by_name(tmp_path):
    save_checkpoint(tmp_path, 1, tensors(1), {"format": 99})
    with pytest.raises(UserError, match="format 99"):
        load_checkpoint(tmp_path / "step_00000001")


def test_a_save_that_the_disk_refuses_leaves_the_older_ones_alone(tmp_path):
    save_checkpoint(tmp_path, 1, tensors(1), {})
    # a file where the temporary folder has to go: mkdir fails for root too
    (tmp_path / ".writing_00000002").write_text("in the way")
    with pytest.raises(UserError, match="cannot write the checkpoint"):
        save_checkpoint(tmp_path, 2, tensors(2), {})
    assert load_latest(tmp_path)[0].state["step"] == 1


def test_kill_9_while_saving_never_costs_a_complete_checkpoint(tmp_path):
    program = textwrap.dedent("""
        import sys, torch
        from pathlib import Path
        from ssl_xcit.checkpoints.folder import save_checkpoint
        step = int(sys.argv[2])
        while True:
            step += 1
            group = {"weight": torch.full((200_000,), float(step))}
            save_checkpoint(Path(sys.argv[1]), step, {"student": group}, {}, keep_last=2)
            print(step, flush=True)
    """)
    chance, last = random.Random(1), 0
    for _ in range(8):
        process = forked.Popen(
            [sys.executable, "-c", program, str(tmp_path), str(last)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(chance.randrange(1, 6)):
            last = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        rest = process.communicate()[0].split()
        last = int(rest[-1]) if rest else last
        found, _ = load_latest(tmp_path)
        step = found.state["step"]
        assert step in (last, last + 1)  # it may die between the rename and the print
        assert (found.tensors["student"]["weight"] == step).all()
        last = step


def test_a_run_folder_gives_its_newest_teacher_or_student(tmp_path):
    student, teacher = build_xcit("xcit_nano_12_p16", num_classes=0).state_dict(), {}
    for key, tensor in student.items():
        teacher[key] = tensor + 1
    groups = {
        role: {f"backbone.{key}": tensor for key, tensor in state.items()}
        | {"head.mlp.0.weight": torch.zeros(2, 2)}
        for role, state in (("student", student), ("teacher", teacher))
    }
    save_checkpoint(tmp_path / "checkpoints", 5, groups, {})
    found = read(tmp_path)
    assert (found.arch, found.step, found.role) == ("xcit_nano_12_p16", 5, "teacher")
    assert found.state.keys() == teacher.keys()
    assert all(torch.equal(found.state[key], teacher[key]) for key in teacher)
    assert torch.equal(read(tmp_path, "student").state["cls_token"], student["cls_token"])


def test_every_architecture_is_recognised_by_its_tensors():
    keys = json.loads(gzip.decompress((FIXTURES / "official_keys.json.gz").read_bytes()))
    for arch, shapes in keys.items():
        state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        assert infer_arch(state) == arch


def test_a_fine_tuned_run_gives_its_averaged_weights_first(tmp_path):
    networks = {
        role: {
            key: tensor + offset if tensor.is_floating_point() else tensor
            for key, tensor in build_xcit("xcit_nano_12_p8", num_classes=7).state_dict().items()
        }
        for offset, role in enumerate(("model", "model_ema"))
    }
    others = {"optimizer": {"head.weight/exp_avg": torch.zeros(2)}}
    save_checkpoint(tmp_path / "checkpoints", 3, networks | others, {})
    for asked, role in (
        *(("", "model_ema"), ("teacher", "model_ema")),
        *(("model", "model"), ("model_ema", "model_ema")),
    ):
        found = read(tmp_path, asked)
        assert (found.arch, found.role, found.num_classes) == ("xcit_nano_12_p8", role, 7)
        assert (found.format, found.step) == ("ssl_xcit", 3)
        assert all(torch.equal(found.state[key], networks[role][key]) for key in networks[role])
        assert found.state.keys() == networks[role].keys()
    assert "head.weight" not in found.backbone
    assert len(found.backbone) == len(found.state) - 2
    del networks["model_ema"]
    save_checkpoint(tmp_path / "checkpoints", 4, networks, {})
    assert read(tmp_path / "checkpoints" / "step_00000004").role == "model"
    with pytest.raises(UserError, match="holds model, not model_ema"):
        read(tmp_path, "model_ema")


def test_a_run_gives_dinos_head_and_centre_beside_the_backbone(tmp_path):
    backbone = build_xcit("xcit_nano_12_p16", num_classes=0).state_dict()
    head = DINOHead(128, 32, hidden_dim=16, bottleneck_dim=8).state_dict()
    whole = {f"backbone.{key}": tensor for key, tensor in backbone.items()}
    whole |= {f"head.{key}": tensor for key, tensor in head.items()}
    center = torch.randn(1, 32)
    save_checkpoint(tmp_path / "checkpoints", 9, {"teacher": whole, "loss": {"center": center}}, {})
    found = read(tmp_path)
    assert (found.arch, found.role, found.step) == ("xcit_nano_12_p16", "teacher", 9)
    assert found.state.keys() == backbone.keys()
    assert found.dino_head.keys() == head.keys()
    assert all(torch.equal(found.dino_head[key], head[key]) for key in head)
    assert torch.equal(found.center, center)
    alone = read(tmp_path / "checkpoints" / "step_00000009" / "teacher.safetensors")
    assert (alone.role, alone.center) == ("teacher", None)


def test_statistics_are_the_checkpoints_else_its_runs_else_imagenets(tmp_path):
    networks = {"model": build_xcit("xcit_nano_12_p16", num_classes=3).state_dict()}
    own, runs = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), ((0.7, 0.6, 0.5), (0.1, 0.2, 0.3))
    save_checkpoint(tmp_path / "checkpoints", 1, networks, {})
    assert read(tmp_path).statistics == (IMAGENET_MEAN, IMAGENET_STD)
    crops = {"crops": {"mean": list(runs[0]), "std": list(runs[1])}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(crops))
    assert read(tmp_path).statistics == runs
    assert read(tmp_path / "checkpoints" / "step_00000001").statistics == runs
    state = {"mean": own[0], "std": own[1]}
    save_checkpoint(tmp_path / "checkpoints", 2, networks, state)
    assert read(tmp_path).statistics == own
    checkpoints = tmp_path / "checkpoints"
    assert read(checkpoints / "step_00000002" / "model.safetensors").statistics == own
    assert read(checkpoints / "step_00000001" / "model.safetensors").statistics == runs


def test_a_copied_or_linked_checkpoint_keeps_its_statistics(tmp_path):
    networks = {"model": build_xcit("xcit_nano_12_p16", num_classes=3).state_dict()}
    own, runs = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), ((0.7, 0.6, 0.5), (0.1, 0.2, 0.3))
    run = tmp_path / "run"
    save_checkpoint(run / "checkpoints", 1, networks, {"mean": own[0], "std": own[1]})
    save_checkpoint(run / "checkpoints", 2, networks, {})  # of an older version
    crops = {"crops": {"mean": list(runs[0]), "std": list(runs[1])}}
    (run / "config.yaml").write_text(yaml.safe_dump(crops))
    shutil.copytree(run / "checkpoints" / "step_00000001", tmp_path / "copy")
    (tmp_path / "link").symlink_to(run / "checkpoints" / "step_00000002")
    assert read(tmp_path / "copy").statistics == own
    assert read(tmp_path / "link").statistics == runs
    shutil.copytree(run / "checkpoints" / "step_00000002", tmp_path / "lost")
    lost = read(tmp_path / "lost")
    assert (lost.statistics, lost.statistics_assumed) == ((IMAGENET_MEAN, IMAGENET_STD), True)
    assert "ImageNet's are assumed" in describe_subject(origin(lost))
    assert "assumed" not in describe_subject(origin(read(tmp_path / "link")))


def test_a_folder_without_networks_is_refused(tmp_path):
    save_checkpoint(tmp_path / "checkpoints", 1, {"meters": {"loss": torch.ones(1)}}, {})
    with pytest.raises(UserError, match="holds no network but meters"):
        read(tmp_path)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "/"])
def test_what_is_no_checkpoint_is_said_in_one_line(path):
    with pytest.raises(UserError, match=r"no c.*checkpoint"):
        read(path)
    with pytest.raises(UserError, match="no file at"):
        read_linear_weights(path)


# Files that the upstream programs wrote, against what these programs computed with them


@upstream_files
@pytest.mark.parametrize(
    ("pattern", "format_"),
    [
        ("official.pth", "official"),
        ("timm.pth", "timm"),
        ("timm.safetensors", "timm"),
        ("*_fixture_*", "mmpretrain"),
        ("*_legacy_*", "mmpretrain"),
    ],
)
def test_logits_of_every_programs_file_are_the_recorded_ones(micro, pattern, format_, tmp_path):
    if pattern == "timm.safetensors":
        path = tmp_path / pattern
        save_file(torch.load(SHARED / micro / "timm.pth", weights_only=True), path)
    else:
        (path,) = (SHARED / micro).glob(pattern)
    weights = read(path)
    assert (weights.arch, weights.format) == (micro, format_)
    assert (weights.role, weights.num_classes) == ("model", 10)
    model = weights.build()
    records = np.load(SHARED / micro / "io.npz")
    sizes = [name.split("/")[0] for name in records if name.endswith("input_u8")]
    assert len(sizes) == 2
    with torch.inference_mode():
        for size in sizes:
            logits = model(normalised(records[f"{size}/input_u8"]))
            for source in ("official", "timm", "mmpretrain"):
                assert gap(logits, records[f"{size}/logits_{source}"]) < 5e-6
        x = normalised(records["64x64/input_u8"]).double()
        assert gap(model.double()(x), records["64x64/logits_fp64"]) < 1e-10


@upstream_files
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_dinos_file_gives_the_recorded_features_and_prototypes(micro, role):
    records = np.load(SHARED / micro / "dino_io.npz")
    path = SHARED / micro / "dino_full.pth"
    weights = read(path, role)
    assert (weights.arch, weights.format) == (micro, "dino")
    assert (weights.role, weights.num_classes) == (role, 0)
    other = {"teacher": "student", "student": "teacher"}[role]
    assert weights.center.shape == (1, 64)
    head = DINOHead(24, 64, hidden_dim=32, bottleneck_dim=16)
    head.load_state_dict(weights.dino_head)
    with torch.inference_mode():
        features = weights.build()(normalised(records["input_u8"]))
        assert gap(features, records[f"feat_{role}"]) < 5e-6
        assert gap(features, records[f"feat_{other}"]) > 0.1
        assert gap(head(features), records[f"head_{role}"]) < 5e-6
    assert read(path).role == "teacher"


@upstream_files
def test_dinos_backbone_and_linear_weights_give_the_recorded_logits(micro):
    records = np.load(SHARED / micro / "dino_io.npz")
    weights = read(SHARED / micro / "dino_backbone.pth")
    assert weights.format == "dino_backbone"
    weight, bias = read_linear_weights(SHARED / micro / "dino_linear.pth")
    with torch.inference_mode():
        features = weights.build()(normalised(records["input_u8"]))
        assert gap(features, records["feat_teacher"]) < 5e-6
        assert gap(features @ weight.T + bias, records["linear_logits_teacher"]) < 5e-6
    assert (weights.dino_head, weights.center) == ({}, None)


# Bad files


@pytest.mark.parametrize("second_blocks", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("to", [dict, to_timm, to_mmpretrain])
def test_every_tensor_that_is_missing_or_misshapen_is_named(micro, to, second_blocks, tmp_path):
    file = tmp_path / "it.safetensors"
    state = torch.load(FIXTURES / micro / "official.pth", weights_only=True)["model"]
    theirs = to(state)
    victims = {key: whole for key, whole in state.items() if ("blocks.1." in key) == second_blocks}
    assert 20 < len(victims) < len(state) - 20
    for official, whole in victims.items():
        key, tensor = next(iter(to({official: whole}).items()))
        missing = {k: t.contiguous() for k, t in theirs.items() if k != key}
        for damaged in (missing, missing | {key: torch.cat((tensor.view(-1), torch.ones(1)))}):
            if damaged is missing and key.endswith("num_batches_tracked"):
                continue  # other programs leave it out
            save_file(damaged, file)
            with pytest.raises(UserError, match=re.escape(official)) as error:
                read(file)
            assert str(error.value).startswith(str(file))


@pytest.mark.parametrize(
    "key", ["strange", "blocks.7.norm1.weight", "patch_embed.proj.12.0.weight"]
)
def test_a_tensor_too_many_is_named(micro, key, tmp_path):
    content = torch.load(FIXTURES / micro / "official.pth", weights_only=True)
    content["model"][key] = torch.ones(3)
    torch.save(content, tmp_path / "it.pth")
    with pytest.raises(UserError, match=rf"it\.pth is no micro_p.*1 unknown \({key}\)"):
        read(tmp_path / "it.pth")


def test_a_tensor_of_integers_for_one_of_reals_is_named(micro):
    state = torch.load(FIXTURES / micro / "official.pth", weights_only=True)["model"]
    check_tensors(state, micro)
    with pytest.raises(UserError, match=r"1 of a wrong type \(norm\.bias torch\.int64\)"):
        check_tensors(state | {"norm.bias": state["norm.bias"].long()}, micro)


def test_half_a_classifier_is_no_classifier(micro):
    state = torch.load(FIXTURES / micro / "official.pth", weights_only=True)["model"]
    for key in ("head.weight", "head.bias"):
        with pytest.raises(UserError, match=rf"1 missing \({key}\)"):
            check_tensors({k: t for k, t in state.items() if k != key}, micro)


def test_another_architecture_than_the_one_asked_for_is_refused(micro):
    path = FIXTURES / micro / "official.pth"
    assert read(path, arch=micro).arch == micro
    with pytest.raises(UserError, match=rf"is a {micro}, not a xcit_small_12_p16"):
        read(path, arch="xcit_small_12_p16")


def test_a_network_of_unknown_width_is_refused():
    with pytest.raises(UserError, match=r"no architecture has a cls_token of shape \(1, 1, 24\)"):
        read(FIXTURES / "micro_p16" / "official.pth")


@pytest.mark.parametrize("container", ["zip", "legacy", "safetensors"])
def test_a_file_cut_anywhere_is_refused_in_one_line(micro, container, tmp_path):
    content = torch.load(FIXTURES / micro / "official.pth", weights_only=True)
    whole = tmp_path / ("whole.safetensors" if container == "safetensors" else "whole.pth")
    if container == "safetensors":
        save_file(content["model"], whole)
    else:
        torch.save(content, whole, _use_new_zipfile_serialization=container == "zip")
    assert read(whole).arch == micro
    data, cut = whole.read_bytes(), whole.with_stem("cut")
    chance = random.Random(0)
    for length in (0, 1, 9, len(data) - 1, *(chance.randrange(len(data)) for _ in range(40))):
        cut.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"cut, damaged or") as error:
            read(cut)
        assert str(cut) in str(error.value)
        assert "weights_only" not in str(error.value)


class Payload:
    """What leaves `proof` behind when a pickle of it is loaded carelessly."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("read", [read, read_linear_weights])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, read):
    proof, file = tmp_path / "proof", tmp_path / "evil.pth"
    payload = Payload(proof)
    state = torch.load(FIXTURES / "micro_p8" / "official.pth", weights_only=True)["model"]
    contents = (
        {"teacher": payload},
        {"model": state, "args": payload},
        {"model": state, "args": argparse.Namespace(out=payload)},
        {"state_dict": {"module.linear.weight": payload}},
    )
    for content in contents:
        for zipped in (True, False):
            torch.save(content, file, _use_new_zipfile_serialization=zipped)
            with pytest.raises(UserError, match=r"posix\.system, which could run code"):
                read(file)
            assert not proof.exists()
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        file.write_bytes(pickle.dumps(payload, protocol))
        with pytest.raises(UserError, match="cannot be read safely"):
            read(file)
        assert not proof.exists()
    pickle.loads(file.read_bytes())
    assert proof.exists()  # the payload would have worked


def test_a_path_in_the_stored_command_line_is_plain_data(tmp_path):
    """Runs that submitit started have one as output_dir."""
    state = build_xcit("xcit_nano_12_p16").state_dict()
    args = argparse.Namespace(output_dir=Path("/somewhere/42"), arch="xcit")
    torch.save({"model": state, "args": args}, tmp_path / "a.pth")
    assert read(tmp_path / "a.pth").state.keys() == state.keys()
