"""Checkpoints of other programs: Lightning, solo-learn, mmengine, torch.compile, a hub."""

import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ssl_xcit.checkpoints.formats import to_timm
from ssl_xcit.checkpoints.read import read
from ssl_xcit.dino.head import DINOHead
from ssl_xcit.models.xcit import build_xcit
from ssl_xcit.runtime.errors import UserError


def nano(seed: int, num_classes: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    state = build_xcit("xcit_nano_12_p16", num_classes=num_classes).state_dict()
    return {key: torch.randn_like(t) if t.is_floating_point() else t for key, t in state.items()}


def within(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(tensor, expected[key]) for key, tensor in found.items()
    )


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.",
        "module._orig_mod.",
        "encoder.",
        "model.",
        "model.encoder.",
        "teacher_backbone.",
    ],
)
def test_the_names_of_modules_around_a_network_are_taken_off(tmp_path, prefix):
    state, path = nano(0), tmp_path / "x.pth"
    projection = {"projection_head.layers.0.weight": torch.ones(2, 2)}
    torch.save(within(state, prefix), path)
    assert same(read(path).state, state)
    save_file(within(state, prefix), path.with_suffix(".safetensors"))
    assert same(read(path.with_suffix(".safetensors")).state, state)
    torch.save({"state_dict": within(state, prefix) | projection}, path)
    if "_orig_mod" in prefix:  # nothing but the network's own names may stand beside them
        with pytest.raises(UserError, match=r"1 unknown \(projection_head|is no XCiT"):
            read(path)
    else:
        found = read(path)
        assert same(found.state, state)
        assert found.ignored == ["projection_head.layers.0"]


def test_a_classifier_and_a_dino_head_within_a_wrapper_are_kept(tmp_path):
    state, path = nano(0, 5), tmp_path / "x.pth"
    torch.save({"state_dict": within(state, "model.")}, path)
    assert same(read(path).state, state)
    head = DINOHead(128, 32, nlayers=1, bottleneck_dim=8).state_dict()
    whole = within(nano(1), "backbone.") | within(head, "head.")
    torch.save({"state_dict": within(whole, "model.")}, path)
    found = read(path)
    assert same(found.state, nano(1))
    assert same(found.dino_head, head)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("backbone.", "momentum_backbone."), ("student_backbone.", "teacher_backbone."),
     ("student.backbone.", "teacher.backbone."), ("model.online.", "model.ema.")],
)  # fmt: skip
def test_student_and_teacher_of_a_lightning_checkpoint_have_their_roles(tmp_path, student, teacher):
    path = tmp_path / "last.ckpt"
    both = within(nano(1), student) | within(nano(2), teacher) | {"criterion.center": torch.ones(1)}
    torch.save(
        {
            "epoch": 3, "global_step": 9, "pytorch-lightning_version": "2.5.0",
            "state_dict": both, "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
            "lr_schedulers": [{"last_epoch": 3}], "loops": {}, "callbacks": {},
        },
        path,
    )  # fmt: skip
    assert same(read(path, "teacher").state, nano(2))
    assert same(read(path, "student").state, nano(1))
    assert {"criterion", "optimizer_states"} <= set(read(path, "teacher").ignored)


def test_networks_whose_roles_are_not_clear_are_listed(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(within(nano(1), "left.") | within(nano(2), "right."), path)
    with pytest.raises(UserError, match=r"holds 2 networks, left\., right\., and no name says"):
        read(path)


def test_counts_of_batches_may_be_missing_or_floats(tmp_path):
    state, path = nano(0), tmp_path / "x.pth"
    counts = [key for key in state if key.endswith("num_batches_tracked")]
    assert len(counts) > 10
    torch.save({key: t.float() if key in counts else t for key, t in state.items()}, path)
    assert same(read(path).state, state)
    torch.save({key: t for key, t in state.items() if key not in counts}, path)
    found = read(path).state
    assert found.keys() == state.keys()
    assert all(found[key].dtype == torch.int64 for key in counts)


def test_numbers_of_numpy_and_a_log_of_mmengine_are_inert(tmp_path, monkeypatch):
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
    module.HistoryBuffer = type("HistoryBuffer", (), {"__module__": module.__name__})
    buffer = module.HistoryBuffer()
    buffer.history = np.arange(3.0)
    extras = {"epoch": np.int64(3), "best_acc": np.float64(0.5), "metric": np.float32(0.5)}
    path = tmp_path / "x.pth"
    torch.save({"state_dict": nano(0), "message_hub": {"loss": buffer}} | extras, path)
    monkeypatch.delitem(sys.modules, module.__name__)
    assert same(read(path).state, nano(0))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_a_hub_is_read(tmp_path, name):
    state = to_timm(nano(0, 3))
    (tmp_path / "config.json").write_text("{}")
    if name.endswith("bin"):
        torch.save(state, tmp_path / name)
    else:
        save_file(state, tmp_path / name)
    assert same(read(tmp_path).state, nano(0, 3))
