"""Optimisers, clipping and groups against naive float64 loops and torch's implementations."""

import copy

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from ssl_xcit.dino.head import DINOHead
from ssl_xcit.dino.networks import MultiCropWrapper
from ssl_xcit.models.xcit import XCiT, build_xcit
from ssl_xcit.training.optim import (
    LARS,
    build_optimizer,
    clip_gradients,
    freeze_last_layer,
    layer_scales,
    parameter_groups,
    set_hyperparameters,
)


def student(norm_last_layer=True):
    torch.manual_seed(0)
    backbone = XCiT(8, 24, 2, 2, 1.0, True, num_classes=0)
    head = DINOHead(24, 16, norm_last_layer=norm_last_layer, hidden_dim=32, bottleneck_dim=8)
    return MultiCropWrapper(backbone, head)


def fill_gradients(model, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)


# -- groups --------------------------------------------------------------------------------------


def test_the_decayed_group_holds_matrices_cls_token_temperature_and_trained_weight_g():
    decayed, plain = parameter_groups(student(norm_last_layer=False))
    assert {
        "backbone.cls_token",
        "backbone.blocks.0.attn.temperature",
        "backbone.blocks.1.attn.qkv.weight",
        "backbone.blocks.0.local_mp.conv1.weight",
        "backbone.pos_embeder.token_projection.weight",
        "backbone.patch_embed.proj.0.0.weight",
        "backbone.cls_attn_blocks.0.mlp.fc1.weight",
        "head.mlp.0.weight",
        "head.last_layer.weight_g",
        "head.last_layer.weight_v",
    } <= set(decayed["param_names"])
    assert {
        "backbone.blocks.0.norm1.weight",
        "backbone.blocks.0.gamma1",
        "backbone.blocks.0.local_mp.bn.weight",
        "backbone.patch_embed.proj.0.1.weight",
        "backbone.blocks.0.attn.qkv.bias",
        "backbone.norm.weight",
        "head.mlp.4.bias",
    } <= set(plain["param_names"])
    assert "weight_decay" not in decayed
    assert plain["weight_decay"] == 0


def test_biases_and_vectors_are_exactly_the_parameters_without_decay():
    model = student(norm_last_layer=False)
    decayed, plain = parameter_groups(model)
    for group, expected in ((decayed, False), (plain, True)):
        assert len(group["params"]) == len(group["param_names"]) > 10
        for name, p in zip(group["param_names"], group["params"], strict=True):
            assert model.get_parameter(name) is p
            assert (name.endswith(".bias") or len(p.shape) == 1) == expected, name


def test_a_bias_with_several_dimensions_is_not_decayed():
    model = nn.Module()
    model.add_module("layer", nn.Module())
    model.layer.bias = nn.Parameter(torch.zeros(2, 3))
    decayed, plain = parameter_groups(model)
    assert (decayed["param_names"], plain["param_names"]) == ([], ["layer.bias"])


def test_groups_cover_every_trainable_parameter_once_and_no_frozen_one():
    model = student(norm_last_layer=True)
    decayed, plain = parameter_groups(model)
    names = decayed["param_names"] + plain["param_names"]
    assert "head.last_layer.weight_g" not in names
    assert sorted(names) == sorted(n for n, p in model.named_parameters() if p.requires_grad)


def test_layer_wise_rates_and_exemptions_equal_timms():
    theirs = {}
    reference = timm.create_model("xcit_nano_12_p16_224", num_classes=5)
    names = {id(p): name for name, p in reference.named_parameters()}
    for group in param_groups_layer_decay(reference, 0.05, {"cls_token"}, layer_decay=0.7):
        for parameter in group["params"]:
            name = names[id(parameter)].replace("pos_embed.", "pos_embeder.")
            for part in "qkv":  # timm splits the class attention's qkv
                name = name.replace(f".attn.{part}.", ".attn.qkv.")
            theirs[name] = (group["lr_scale"], group["weight_decay"])
    model = build_xcit("xcit_nano_12_p16", num_classes=5)
    groups = parameter_groups(model, ("cls_token",), layer_scales(12, 0.7))
    optimizer = build_optimizer("adamw", groups)
    set_hyperparameters(optimizer, 1.0, 0.05)
    ours = {
        name: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert values == pytest.approx(theirs[name], rel=1e-12), name
    assert ours["head.weight"] == (1.0, 0.05)
    assert len({rate for rate, _ in ours.values()}) == 16  # stem, 12 + 2 blocks, head


def test_without_layer_decay_there_are_two_groups_as_in_dino():
    model = build_xcit("xcit_nano_12_p16", num_classes=5)
    groups = parameter_groups(model, lr_scale=layer_scales(12, 1.0))
    assert [len(g["params"]) for g in groups] == [len(g["params"]) for g in parameter_groups(model)]


# -- optimisers ----------------------------------------------------------------------------------


def naive_run(name, model, gradients, lr, weight_decay):
    """Parameters after one step per entry of `gradients`, in float64, from the equations."""
    values = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    first = {n: torch.zeros_like(v) for n, v in values.items()}
    second = {n: torch.zeros_like(v) for n, v in values.items()}
    for t, grads in enumerate(gradients, start=1):
        for n, p in values.items():
            g = grads[n].double()
            wd = 0.0 if n.endswith(".bias") or p.ndim == 1 else weight_decay
            if name == "adamw":
                p -= lr * wd * p
                first[n] = 0.9 * first[n] + 0.1 * g
                second[n] = 0.999 * second[n] + 0.001 * g * g
                m, v = first[n] / (1 - 0.9**t), second[n] / (1 - 0.999**t)
                p -= lr * m / (v.sqrt() + 1e-8)
            elif name == "sgd":
                first[n] = 0.9 * first[n] + g + wd * p
                p -= lr * first[n]
            elif name == "lars":
                u = g
                if p.ndim != 1:
                    u = u + wd * p
                    if p.norm() > 0 and u.norm() > 0:
                        u = u * 0.001 * p.norm() / u.norm()
                first[n] = 0.9 * first[n] + u
                p -= lr * first[n]
    return values


@pytest.mark.parametrize(("name", "lr"), [("adamw", 1e-3), ("sgd", 0.03), ("lars", 0.5)])
def test_optimisers_follow_their_equations(name, lr):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4, bias=False))
    model.append(nn.Linear(4, 3, bias=False))
    nn.init.zeros_(model[3].weight)  # LARS does not rescale the update of a tensor of norm 0
    gradients = [{n: torch.randn_like(p) for n, p in model.named_parameters()} for _ in range(5)]
    expected = naive_run(name, model, gradients, lr, weight_decay=0.3)
    optimizer = build_optimizer(name, parameter_groups(model))
    for grads in gradients:
        for n, p in model.named_parameters():
            p.grad = grads[n].clone()
        set_hyperparameters(optimizer, lr, 0.3)
        optimizer.step()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach().double(), expected[n], rtol=3e-6, atol=3e-7)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("bad_step", [0, 2])
def test_a_step_marked_as_bad_changes_neither_parameters_nor_state(name, bad_step):
    def trained(skip: bool) -> tuple[list[torch.Tensor], dict]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5))
        optimizer = build_optimizer(name, parameter_groups(model))
        for step in range(4):
            gradients = [torch.randn_like(p) for p in model.parameters()]
            if step == bad_step:
                if not skip:
                    continue
                gradients[0][1, 2], gradients[1][0] = float("nan"), float("inf")
            for p, gradient in zip(model.parameters(), gradients, strict=True):
                p.grad = gradient
            set_hyperparameters(optimizer, 0.01, 0.3)
            optimizer.found_inf = torch.tensor(float(step == bad_step))
            optimizer.step()
        return list(model.parameters()), optimizer.state_dict()["state"]

    (parameters, state), (expected, expected_state) = trained(skip=True), trained(skip=False)
    assert all(torch.equal(p, e) for p, e in zip(parameters, expected, strict=True))
    for key, moments in expected_state.items():
        for moment, value in moments.items():
            assert torch.equal(state[key][moment], value)


def test_lars_neither_decays_nor_rescales_vectors_even_in_a_decayed_group():
    vector = nn.Parameter(torch.tensor([3.0, 4.0]))
    vector.grad = torch.tensor([1.0, -2.0])
    LARS([vector], lr=0.5, weight_decay=10.0).step()
    assert vector.tolist() == [2.5, 5.0]


def test_lars_changes_neither_gradients_nor_parameters_without_a_gradient():
    with_grad, without = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    with_grad.grad = torch.full((2, 2), 2.0)
    optimizer = LARS([with_grad, without], lr=1.0, weight_decay=1.0)
    optimizer.step()
    assert (with_grad.grad == 2.0).all()
    assert (without == 1.0).all()
    assert len(optimizer.state[without]) == 0


def test_lars_continues_from_its_state_dict():
    def steps(optimizer, p, count, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()

    straight = nn.Parameter(torch.ones(3, 3))
    optimizer = LARS([straight], lr=0.1)
    steps(optimizer, straight, 2, seed=1)
    resumed = nn.Parameter(straight.detach().clone())
    other = LARS([resumed], lr=0.1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(optimizer, straight, 2, seed=2)
    steps(other, resumed, 2, seed=2)
    assert torch.equal(straight, resumed)


def test_both_groups_get_the_learning_rate_and_the_decayed_one_the_weight_decay():
    optimizer = build_optimizer("adamw", parameter_groups(nn.Linear(2, 2)))
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    for lr, weight_decay in ((0.1, 0.0), (0.2, 0.4)):  # from a decay of 0 too
        set_hyperparameters(optimizer, lr, weight_decay)
        assert [group["lr"] for group in optimizer.param_groups] == [lr, lr]
        assert [group["weight_decay"] for group in optimizer.param_groups] == [weight_decay, 0.0]
    assert len(optimizer.param_groups[0]["params"][0].shape) == 2


# -- clipping and freezing -----------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.01, 0.5, 10.0])
def test_clipping_per_parameter_follows_the_loop(scale):
    model = student()
    fill_gradients(model, scale)
    expected, squares = {}, 0.0
    for n, p in model.named_parameters():
        if p.grad is not None:
            g = p.grad.double()
            norm = g.square().sum().sqrt()
            squares += norm**2
            coefficient = 3.0 / (norm + 1e-6)
            expected[n] = g * coefficient if coefficient < 1 else g
    total = clip_gradients(model.parameters(), 3.0)
    torch.testing.assert_close(total.double(), squares.sqrt(), rtol=1e-6, atol=0)
    for n, g in expected.items():
        torch.testing.assert_close(model.get_parameter(n).grad.double(), g, rtol=2e-6, atol=1e-9)


def test_clipping_per_parameter_leaves_small_gradients_bit_equal():
    model = student()
    fill_gradients(model, 1e-4)
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    clip_gradients(model.parameters(), 3.0)
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_global_clipping_equals_torchs():
    ours, theirs = student(), student()
    fill_gradients(ours)
    fill_gradients(theirs)
    total = clip_gradients(ours.parameters(), 3.0, mode="global")
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), 3.0)
    torch.testing.assert_close(total, expected)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("mode", ["parameter", "global"])
@pytest.mark.parametrize("clip", [0.0, -1.0])
def test_a_clip_of_zero_or_less_changes_nothing_but_returns_the_norm(clip, mode):
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([300.0, 400.0])
    assert clip_gradients([p], clip, mode).item() == 500.0
    assert p.grad.tolist() == [300.0, 400.0]


def test_a_frozen_last_layer_gets_no_step_no_decay_and_no_moments():
    model = student(norm_last_layer=False)
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer("adamw", parameter_groups(model))
    fill_gradients(model)
    freeze_last_layer(model)
    set_hyperparameters(optimizer, 1e-2, 0.4)
    optimizer.step()
    for n, p in model.named_parameters():
        frozen = n in ("head.last_layer.weight_g", "head.last_layer.weight_v")
        assert (p.grad is None) == frozen, n
        assert (len(optimizer.state[p]) == 0) == frozen, n
        assert torch.equal(p, before[n]) == frozen, n
