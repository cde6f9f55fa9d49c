"""The same tensors under every format's names, against files that the upstream programs wrote."""

import argparse
import gzip
import json
from pathlib import Path

import pytest
import torch

from ssl_xcit.checkpoints.formats import (
    CLASSIFIER,
    Contents,
    choose,
    from_mmpretrain,
    from_timm,
    to_mmpretrain,
    to_official,
    to_timm,
    unwrap,
)
from ssl_xcit.models.variants import ARCHITECTURES
from ssl_xcit.runtime.errors import UserError

FIXTURES = Path(__file__).parent / "fixtures"
SHARED = Path(__file__).parents[2] / "shared" / "fixtures"
upstream_files = pytest.mark.skipif(
    not SHARED.exists(), reason="the shared files of the upstream programs are not beside us"
)
MICROS = ("micro_p16", "micro_p8")
KEYS = json.loads(gzip.decompress((FIXTURES / "official_keys.json.gz").read_bytes()))


def official(micro: str) -> dict[str, torch.Tensor]:
    return torch.load(FIXTURES / micro / "official.pth", weights_only=True)["model"]


def upstream(micro: str, pattern: str) -> dict:
    (path,) = (SHARED / micro).glob(pattern)
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a
    )


@upstream_files
@pytest.mark.parametrize("micro", MICROS)
def test_our_names_for_other_programs_are_those_of_the_files_that_they_wrote(micro):
    assert same(to_timm(official(micro)), upstream(micro, "timm.pth"))
    for pattern in ("*_fixture_*", "*_legacy_*"):
        theirs = upstream(micro, pattern)["state_dict"]
        assert same(to_mmpretrain(official(micro)), theirs)


@upstream_files
@pytest.mark.parametrize("micro", MICROS)
@pytest.mark.parametrize(
    ("pattern", "format_"),
    [
        ("official.pth", "official"),
        ("timm.pth", "timm"),
        ("*_fixture_*", "mmpretrain"),
        ("*_legacy_*", "mmpretrain"),
    ],
)
def test_every_programs_file_gives_the_official_tensors(micro, pattern, format_):
    contents = unwrap(upstream(micro, pattern), "it")
    named = to_official(contents.networks[choose(contents, "teacher", "it")], "it")
    assert named.format == format_
    assert same(named.state, official(micro))


@upstream_files
@pytest.mark.parametrize("micro", MICROS)
def test_dinos_file_gives_backbone_and_head_of_teacher_or_student(micro):
    content = upstream(micro, "dino_full.pth")
    backbone = upstream(micro, "dino_backbone.pth")
    contents = unwrap(content, "it")
    assert list(contents.networks) == ["teacher", "student"]
    assert torch.equal(contents.center, content["dino_loss"]["center"])
    for role in ("teacher", "student"):
        named = to_official(contents.networks[role], "it")
        assert named.format == "dino"
        assert named.state.keys() == backbone.keys()
        assert same(named.state, backbone) == (role == "teacher")
        assert len(named.dino_head) == 8
        for key, tensor in named.dino_head.items():
            assert torch.equal(tensor, content[role][f"module.head.{key}"])
    assert to_official(backbone, "it").format == "dino_backbone"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_goes_to_other_names_and_back_bit_for_bit(arch):
    state = {
        # each element its own number: whatever is permuted shows
        key: torch.arange(torch.Size(shape).numel(), dtype=torch.int32).reshape(shape) + i
        for i, (key, shape) in enumerate(KEYS[arch].items())
    }
    backbone = {key: tensor for key, tensor in state.items() if key not in CLASSIFIER}
    for tensors in (state, backbone):
        for to, back, format_ in (
            (to_timm, from_timm, "timm"),
            (to_mmpretrain, from_mmpretrain, "mmpretrain"),
        ):
            theirs = to(tensors)
            assert len(theirs) == len(tensors) + 8  # q, k, v of two layers, weights and biases
            assert same(back(theirs), tensors)
            named = to_official({f"module.{key}": tensor for key, tensor in theirs.items()}, "it")
            assert named.format == format_
            assert same(named.state, tensors)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_timms_names_and_shapes_are_those_of_the_real_model(arch):
    timm = pytest.importorskip("timm", reason="timm, the oracle, is a development dependency")
    with torch.device("meta"):
        theirs = timm.create_model(f"{arch}_224", pretrained=False).state_dict()
    state = {key: torch.empty(shape, device="meta") for key, shape in KEYS[arch].items()}
    ours = to_timm(state)
    assert {key: tensor.shape for key, tensor in ours.items()} == {
        key: tensor.shape for key, tensor in theirs.items()
    }


def test_the_newer_names_of_weight_norm_are_the_older_ones_to_us():
    head = {
        "head.mlp.0.weight": torch.ones(4, 24),
        "head.last_layer.parametrizations.weight.original0": torch.full((6, 1), 2.0),
        "head.last_layer.parametrizations.weight.original1": torch.full((6, 4), 3.0),
    }
    backbone = {key: t for key, t in official("micro_p16").items() if key not in CLASSIFIER}
    wrapped = {f"backbone.{key}": tensor for key, tensor in backbone.items()} | head
    named = to_official(wrapped, "it")
    assert same(named.state, backbone)
    assert named.dino_head.keys() == {"mlp.0.weight", "last_layer.weight_g", "last_layer.weight_v"}
    assert named.dino_head["last_layer.weight_g"].shape == (6, 1)


def test_prefixes_are_stripped_at_the_start_of_keys_only():
    state = official("micro_p16") | {"norm.module.backbone.x": torch.ones(1)}
    for prefix in ("module.", "backbone.", "module.backbone."):
        prefixed = {f"{prefix}{key}": tensor for key, tensor in state.items()}
        assert same(to_official(prefixed, "it").state, state)
    mixed = {f"module.{key}" if i % 2 else key: t for i, (key, t) in enumerate(state.items())}
    named = to_official(mixed, "it")  # all odd ones are there for the check to find
    assert sum(key.startswith("module.") for key in named.state) == len(state) // 2


@pytest.mark.parametrize("to", [to_timm, to_mmpretrain, dict])
def test_a_tensor_that_no_rule_knows_is_kept(to):
    theirs = to(official("micro_p8"))
    strange = {"backbone.strange": torch.ones(2), "head.strange": torch.ones(3)}
    named = to_official(theirs | strange, "it")
    assert len(named.state) == len(official("micro_p8")) + 2
    assert "head.strange" in named.state


def test_q_k_and_v_are_joined_only_when_they_are_alike_and_complete():
    theirs = to_timm(official("micro_p16"))
    key = "cls_attn_blocks.0.attn.{}.weight"
    q, k, v = (theirs[key.format(x)] for x in "qkv")
    for changed in (
        {"q": torch.cat((q, q[:1])), "k": k[:-1], "v": v},  # 72 rows in all, as it should be
        {"q": q, "k": k.half(), "v": v},
        {"q": q[0, 0], "k": k[0, 0], "v": v[0, 0]},
        {"q": q, "k": k},
    ):
        state = {name: t for name, t in theirs.items() if name not in map(key.format, "qkv")}
        state |= {key.format(x): tensor for x, tensor in changed.items()}
        found = from_timm(state)
        assert key.format("qkv") not in found
        assert all(found[key.format(x)] is tensor for x, tensor in changed.items())


def test_two_tensors_of_one_name_are_refused():
    state = official("micro_p16")
    twice = state | {"pos_embed.token_projection.bias": torch.ones(24)}
    with pytest.raises(UserError, match=r"two tensors for pos_embeder\.token_projection\.bias"):
        to_official(twice, "it")
    twice = to_timm(state) | {"cls_attn_blocks.0.attn.qkv.bias": torch.ones(72)}
    assert "cls_attn_blocks.0.attn.q.bias" in to_official(twice, "it").state
    twice = state | {"backbone.norm.bias": torch.ones(24)}
    with pytest.raises(UserError, match=r"two tensors for norm\.bias"):
        to_official(twice, "it")


NET = {"cls_token": torch.ones(1, 1, 4)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([NET], "no state dict but a list"),
        ({}, "no state dict"),
        ({3: torch.ones(1)}, "no state dict"),
        ({"net": NET}, "no network: its entries are net"),
        ({"model": None}, "holds no network"),
        ({"model": NET, "teacher": NET}, "more than one kind of network"),
        ({"model": [1]}, "model of it is no state dict but a list"),
        ({"model": {**NET, "a.b": 3}}, r"no tensors: a\.b"),
        ({"model": NET, "extra": torch.ones(1)}, "not known here: extra"),
        ({"model": NET, "extra": {"deep": [torch.ones(1)]}}, "not known here: extra"),
    ],
)
def test_a_container_that_is_not_understood_is_refused(content, message):
    with pytest.raises(UserError, match=message):
        unwrap(content, "it")


@pytest.mark.parametrize(
    ("content", "roles"),
    [
        (NET, ["backbone"]),
        ({"head.weight": torch.ones(1, 1)}, ["model"]),
        ({"head.fc.weight": torch.ones(1, 1)}, ["model"]),
        ({"model": NET, "optimizer": {"x": torch.ones(1)}, "note": "plain data"}, ["model"]),
        ({"model": NET, "model_ema": NET, "epoch": 3}, ["model", "model_ema"]),
        ({"state_dict": NET, "meta": {}}, ["model"]),
        ({"state_dict": NET, "state_dict_ema": NET, "amp_scaler": {}}, ["model", "model_ema"]),
        ({"student": NET, "teacher": NET, "fp16_scaler": None}, ["teacher", "student"]),
        ({"student": NET}, ["student"]),
    ],
)
def test_the_networks_of_a_container_have_roles_and_the_rest_is_named(content, roles):
    contents = unwrap(content, "it")
    assert list(contents.networks) == roles
    others = {"optimizer", "note", "epoch", "meta", "amp_scaler", "fp16_scaler"}
    assert contents.ignored == sorted(content.keys() & others)


@pytest.mark.parametrize(
    ("roles", "asked", "found"),
    [
        (["teacher", "student"], "student", "student"),
        (["teacher", "student"], "model", None),
        (["student"], "teacher", None),
        (["backbone"], "teacher", "backbone"),
        (["model", "model_ema"], "teacher", "model"),
        (["model", "model_ema"], "model_ema", "model_ema"),
        (["model"], "model_ema", None),
    ],
)
def test_a_role_that_is_not_there_is_refused(roles, asked, found):
    contents = Contents(dict.fromkeys(roles, NET), None, [])
    if found:
        assert choose(contents, asked, "it") == found
    else:
        with pytest.raises(UserError, match=f"holds {' and '.join(roles)}, not {asked}"):
            choose(contents, asked, "it")


def test_a_file_of_another_model_is_said_to_be_no_xcit():
    with pytest.raises(UserError, match=r"no XCiT.*conv1\.weight"):
        to_official({"conv1.weight": torch.ones(1)}, "it")
    with pytest.raises(UserError, match="linear classifier"):
        to_official({"module.linear.weight": torch.ones(1), "module.linear.bias": torch.ones(1)}, 0)
