"""Checkpoints of other programs: Lightning, solo-learn, mmengine, torch.compile, a hub."""

import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ssl_xcit.checkpoints.convert import convert
from ssl_xcit.checkpoints.formats import to_timm
from ssl_xcit.checkpoints.read import read
from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.dino.head import DINOHead
from ssl_xcit.dino.init_from import init_from
from ssl_xcit.dino.loss import DINOLoss
from ssl_xcit.dino.networks import dino_network
from ssl_xcit.evaluation.config import KnnConfig, LinearConfig, SupervisedConfig
from ssl_xcit.evaluation.subject import checkpoint_subject
from ssl_xcit.finetune.config import FinetuneConfig
from ssl_xcit.finetune.start import starting_point
from ssl_xcit.models.xcit import build_xcit
from ssl_xcit.report.config import VisualizeConfig
from ssl_xcit.runtime.config import load_config
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


@pytest.mark.parametrize(
    ("container", "prefix"),
    [
        (lambda names: names, "right."),
        (lambda names: names, "right"),
        (lambda names: {"state_dict": names}, "right."),
        (lambda names: {"state_dict": names}, "state_dict.right."),
        (lambda names: {"state_dict": names, "queue": torch.ones(2)}, "right."),
        (lambda names: {"net": names, "epoch": 3}, "net.right."),
        (lambda names: {"net": {"both": names}}, "net.both.right."),
    ],
)
def test_a_prefix_chooses_among_networks_whose_roles_are_not_clear(tmp_path, container, prefix):
    path = tmp_path / "x.pth"
    both = within(nano(1), "left.") | within(nano(2, 5), "right.module.")
    torch.save(container(both), path)
    with pytest.raises(UserError, match=r"--prefix \S*left\..*--init_prefix"):
        read(path)
    found = read(path, "teacher", prefix=prefix)
    assert same(found.state, nano(2, 5))
    assert found.prefix == prefix
    assert any(name.endswith("left.") for name in found.ignored)
    with pytest.raises(UserError, match=r"no tensor under --prefix wrong\.: .*left\., .*right\."):
        read(path, prefix="wrong.")


def test_a_prefix_within_each_of_two_roles_leaves_the_roles(tmp_path):
    path = tmp_path / "x.pth"
    roles = {"model": 1, "model_ema": 3}
    torch.save(
        {
            role: within(nano(seed), "left.") | within(nano(seed + 1), "right.")
            for role, seed in roles.items()
        },
        path,
    )
    for role, seed in roles.items():
        assert same(read(path, role, prefix="right.").state, nano(seed + 1))


def test_every_command_that_reads_weights_takes_a_prefix(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(within(nano(1), "left.") | within(nano(2), "right."), path)
    torch.save(nano(2), tmp_path / "y.pth")
    found = checkpoint_subject(path, prefix="right.")
    assert found.facts["prefix"] == "right."
    assert same(found.backbone.state_dict(), nano(2))
    assert "prefix" not in checkpoint_subject(tmp_path / "y.pth").facts
    flags = ["--checkpoint", str(path), "--prefix", "right.", "--test", "x"]
    learned = [*flags, "--train", "x"]
    configs = [
        load_config(KnnConfig, argv=learned),
        load_config(LinearConfig, argv=[*learned, "--out", "x"]),
        load_config(SupervisedConfig, argv=[*flags[:-2], "--data", "x"]),
        load_config(VisualizeConfig, argv=[*flags[:-2], "--images", "x", "--out", "x"]),
        load_config(
            FinetuneConfig,
            argv=["--init", "x", "--prefix", "right.", "--data", "x", "--test", "x", "--out", "x"],
        ),
    ]
    assert [config.prefix for config in configs] == ["right."] * 5
    given = ["--init_prefix", "right.", "--data", "x", "--out", "x", "--arch", "xcit_nano_12_p16"]
    assert load_config(TrainConfig, argv=given).model.init_prefix == "right."
    trained = build_xcit("xcit_nano_12_p16", num_classes=0).state_dict()
    torch.save(within(nano(1), "left.") | within(trained, "right."), path)
    convert(path, tmp_path / "one.pth", "official", prefix="right.")
    assert same(read(tmp_path / "one.pth").state, trained)


def test_a_pretraining_and_a_fine_tuning_start_from_the_network_of_the_prefix(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(within(nano(1), "left.") | within(nano(2), "right."), path)
    flags = ["--data", "x", "--out", "x"]
    asked = [*flags, "--out_dim", "16", "--arch", "xcit_nano_12_p16"]
    config = load_config(TrainConfig, argv=asked)
    student, teacher = dino_network(config), dino_network(config)
    loss = DINOLoss(16, 0.1, 0.9)
    lines = init_from(path, "xcit_nano_12_p16", "all", student, teacher, loss, "right.")
    assert same(teacher.backbone.state_dict(), nano(2))
    assert same(student.backbone.state_dict(), nano(2))
    assert "backbone of" in lines[0]
    asked = ["--init", str(path), "--prefix", "right.", "--test", "x", *flags]
    start = starting_point(load_config(FinetuneConfig, argv=asked), 3, 3)
    assert torch.equal(start.network.cls_token, nano(2)["cls_token"])
    assert start.facts["prefix"] == "right."


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
