"""Checkpoints are complete or refused, never half; and foreign files load without running code."""

import gzip
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from ssl_xcit.checkpoint import (
    infer_arch,
    load_checkpoint,
    load_latest,
    read_backbone,
    read_state_dict,
    save_checkpoint,
)
from ssl_xcit.errors import UserError
from ssl_xcit.xcit import XCiT, build_xcit

FIXTURES = Path(__file__).parent / "fixtures"


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
        "step_00000003",
        "step_00000005",
        "step_00000006",
    ]


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
        from ssl_xcit.checkpoint import save_checkpoint
        step = int(sys.argv[2])
        while True:
            step += 1
            group = {"weight": torch.full((200_000,), float(step))}
            save_checkpoint(Path(sys.argv[1]), step, {"student": group}, {}, keep_last=2)
            print(step, flush=True)
    """)
    chance, last = random.Random(1), 0
    for _ in range(8):
        process = subprocess.Popen(
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
    arch, state, info = read_backbone(tmp_path)
    assert (arch, info["step"], info["role"]) == ("xcit_nano_12_p16", 5, "teacher")
    assert state.keys() == teacher.keys()
    assert all(torch.equal(state[key], teacher[key]) for key in teacher)
    assert torch.equal(read_backbone(tmp_path, "student")[1]["cls_token"], student["cls_token"])


def test_every_architecture_is_recognised_by_its_tensors():
    keys = json.loads(gzip.decompress((FIXTURES / "official_keys.json.gz").read_bytes()))
    for arch, shapes in keys.items():
        state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        assert infer_arch(state) == arch


@pytest.mark.parametrize("path", ["/nowhere/at/all", "/"])
def test_what_is_no_checkpoint_is_said_in_one_line(path):
    with pytest.raises(UserError, match=r"no c.*checkpoint"):
        read_backbone(path)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    proof, file = tmp_path / "proof", tmp_path / "evil.pth"

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {proof}",)

    for save in (
        lambda: torch.save({"teacher": Payload()}, file),
        lambda: file.write_bytes(pickle.dumps(Payload())),
    ):
        save()
        with pytest.raises(UserError, match="cannot be read safely"):
            read_state_dict(file)
        assert not proof.exists()


SHARED = Path(__file__).parents[2] / "shared" / "fixtures"


@pytest.mark.skipif(not SHARED.exists(), reason="the shared parity fixtures are not beside us")
@pytest.mark.parametrize(("micro", "patch_size"), [("micro_p16", 16), ("micro_p8", 8)])
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_official_dino_files_load_strict(micro, patch_size, role):
    manifest = json.loads((SHARED / "manifest.json").read_text())
    config = manifest["models"][micro]["config"]
    model = XCiT(
        patch_size,
        config["embed_dim"],
        config["depth"],
        config["num_heads"],
        config["eta"],
        config["tokens_norm"],
        num_classes=0,
    )
    state, info = read_state_dict(SHARED / micro / "dino_full.pth", role)
    model.load_state_dict(state, strict=True)
    assert info["role"] == role
    other, _ = read_state_dict(SHARED / micro / "dino_backbone.pth")
    assert torch.equal(state["cls_token"], other["cls_token"]) == (role == "teacher")
