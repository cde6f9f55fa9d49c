"""XCiT against recorded outputs of the official code, timm, and naive loops from the equations.

A wrong LayerNorm eps changes the fixtures' logits by only 7e-6, a tanh GELU by 1e-4. Hence the
tolerance of 5e-6 in float32, and the comparisons in float64.
"""

import copy
import gzip
import importlib.util
import itertools
import json
import math
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ssl_xcit.models import class_attention, layers, xcit
from ssl_xcit.models.class_attention import ClassAttention
from ssl_xcit.models.layers import fourier_features
from ssl_xcit.models.variants import ARCHITECTURES
from ssl_xcit.models.xcit import XCABlock, XCiT, build_xcit
from ssl_xcit.operators import drop_path, lpi, tokens, xca
from ssl_xcit.operators import linear as products
from ssl_xcit.operators.lpi import LPI
from ssl_xcit.operators.tokens import Grid
from ssl_xcit.operators.xca import XCA, attend_dividing_late
from ssl_xcit.runtime import draws
from ssl_xcit.runtime.draws import stream, uniform
from ssl_xcit.runtime.errors import UserError

FIXTURES = Path(__file__).parent / "fixtures"
MICRO = {"embed_dim": 24, "depth": 2, "num_heads": 3, "eta": 1.0, "num_classes": 10}
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def micro(patch_size: int = 8, randomised: bool = True, **overrides) -> XCiT:
    model = XCiT(patch_size, tokens_norm=patch_size == 8, **(MICRO | overrides))
    return randomise(model) if randomised else model


def on_images(layer, x, grid, *others):
    """Apply a layer for tokens of several image sizes to (b, n, d) of one size."""
    return layer(x.flatten(0, 1), (Grid(len(x), *grid),), *others).view_as(x)


def attend_images(qkv, temperature):
    """Apply `xca._Attend` to (b, n, 3, heads, e)."""
    grids = (Grid(len(qkv), 1, qkv.shape[1]),)
    return xca._Attend.apply(qkv.flatten(0, 1), temperature, grids).unflatten(0, qkv.shape[:2])


def randomise(model: XCiT) -> XCiT:
    """Randomise every tensor, including BatchNorm's statistics."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                continue
            if name.endswith("running_var") or "gamma" in name or "temperature" in name:
                tensor.uniform_(0.5, 1.5)
            elif tensor.ndim == 1 or name == "cls_token":
                tensor.normal_(1.0 if name.endswith(("weight", "token")) else 0.0, 0.3)
            else:
                tensor.normal_(0.0, tensor[0].numel() ** -0.5)
    return model


def official(patch_size: int) -> tuple[XCiT, dict[str, np.ndarray]]:
    folder = FIXTURES / f"micro_p{patch_size}"
    model = micro(patch_size, randomised=False)
    weights = torch.load(folder / "official.pth", weights_only=True)["model"]
    model.load_state_dict(weights, strict=True)
    return model.eval(), dict(np.load(folder / "io.npz"))


def normalised(images: np.ndarray) -> torch.Tensor:
    x = torch.from_numpy(images).float() / 255
    return (x - MEAN[:, None, None]) / STD[:, None, None]


def gap(a: torch.Tensor, b: torch.Tensor | np.ndarray) -> float:
    assert a.shape == tuple(b.shape)
    return (a.detach().double() - torch.as_tensor(b).double()).abs().max().item()


# The family: one table, official names.


def test_there_are_fourteen_architectures_each_with_the_official_keys_and_shapes():
    keys = json.loads(gzip.decompress((FIXTURES / "official_keys.json.gz").read_bytes()))
    assert sorted(keys) == sorted(ARCHITECTURES)
    assert len(ARCHITECTURES) == 14
    for arch in ARCHITECTURES:
        with torch.device("meta"):
            model = build_xcit(arch)
        shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        assert shapes == keys[arch], arch


def test_parameter_counts_match_the_published_table():
    rows = json.loads((FIXTURES / "seed_models.json").read_text())
    assert len(rows) == 42
    counts = {}
    for arch in ARCHITECTURES:
        with torch.device("meta"):
            counts[arch] = sum(p.numel() for p in build_xcit(arch).parameters())
    for row in rows:
        assert counts[row["model"]] == row["params_exact"], row["name"]


def test_each_variant_has_its_heads_layerscale_gains_and_kind_of_norm():
    rows = json.loads((FIXTURES / "seed_models.json").read_text())
    for row in rows:
        variant = xcit.VARIANTS[row["arch"]]
        assert variant == tuple(
            row[k] for k in ("embed_dim", "depth", "num_heads", "eta", "tokens_norm")
        )
    model = build_xcit("xcit_nano_12_p16", num_classes=0)
    assert (model.embed_dim, model.patch_size, model.num_classes) == (128, 16, 0)


def test_an_unknown_architecture_error_names_the_closest_match():
    with pytest.raises(UserError, match=r"'xcit_smal_12_p8': nearest xcit_small_12_p8") as error:
        build_xcit("xcit_smal_12_p8")
    assert "\n" not in str(error.value)


def test_initial_values_are_the_official_ones():
    model = micro(embed_dim=96, eta=1e-5, randomised=False)
    for name, parameter in model.named_parameters():
        if "gamma" in name:
            assert (parameter == 1e-5).all(), name
        elif name.endswith("temperature"):
            assert (parameter == 1).all(), name
        elif "norm" in name or ".bn." in name or ("patch_embed" in name and parameter.ndim == 1):
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
        elif parameter.ndim == 2 or name == "cls_token":
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name
            assert abs(parameter.mean().item()) < 0.005, name
        elif name.endswith("bias") and "local_mp" not in name and "pos_embeder" not in name:
            assert (parameter == 0).all(), name


# Parity with the official code and with timm.


@pytest.mark.parametrize("patch_size", [16, 8])
def test_logits_and_features_equal_the_official_ones_at_every_recorded_size(patch_size):
    model, records = official(patch_size)
    backbone = micro(patch_size, randomised=False, num_classes=0)
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    backbone.load_state_dict(weights, strict=True)
    sizes = [name.split("/")[0] for name in records if name.endswith("input_u8")]
    assert len(sizes) == 2
    for size in sizes:
        x = normalised(records[f"{size}/input_u8"])
        with torch.inference_mode():
            logits, features = model(x), backbone.eval()(x)
        for source in ("official", "timm", "mmpretrain"):
            assert gap(logits, records[f"{size}/logits_{source}"]) < 5e-6
        assert gap(features, records[f"{size}/feat_official"]) < 5e-6


@pytest.mark.parametrize("patch_size", [16, 8])
def test_float64_logits_equal_the_official_ones(patch_size):
    model, records = official(patch_size)
    x = normalised(records["64x64/input_u8"]).double()
    logits = model.double()(x)
    assert logits.dtype == torch.float64
    assert gap(logits, records["64x64/logits_fp64"]) < 1e-10


def as_timm(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in weights.items():
        name = name.replace("pos_embeder.", "pos_embed.")
        if name.startswith("cls_attn_blocks") and ".qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace(".qkv.", f".{letter}.")] = part
        else:
            renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("arch", ["xcit_nano_12_p16", "xcit_nano_12_p8"])
def test_timm_gives_the_same_logits_and_tokens_for_random_weights(arch):
    timm = pytest.importorskip("timm", reason="timm, the oracle, is a development dependency")
    ours = randomise(build_xcit(arch)).eval()
    theirs = timm.create_model(f"{arch}_224", pretrained=False).eval()
    theirs.load_state_dict(as_timm(ours.state_dict()), strict=True)
    with torch.inference_mode():
        x = torch.randn(2, 3, 64, 64)
        assert gap(ours(x), theirs(x)) < 5e-6
        ours, theirs, x = ours.double(), theirs.double(), torch.randn(2, 3, 72, 101).double()
        assert gap(ours(x), theirs(x)) < 1e-10
        tokens = theirs.forward_features(x)
        assert (
            gap(torch.cat([t.view(2, -1, 128) for t in ours.forward_features(x)], 1), tokens)
            < 1e-10
        )


# Positions.


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (7, 4), (14, 14), (28, 28)])
def test_positions_equal_a_loop_over_the_equations(grid):
    height, width = grid
    features = fourier_features(height, width, torch.device("cpu"))
    assert features.shape == (height * width, 64)
    for y, x in itertools.product(range(height), range(width)):
        expected = []
        for place, size in ((y, height), (x, width)):
            angle = 2 * math.pi * (place + 1) / size
            for i in range(16):
                expected.append(math.sin(angle / 10000 ** (i / 16)))
                expected.append(math.cos(angle / 10000 ** (i / 16)))
        assert gap(features[y * width + x], np.array(expected)) < 1e-5


def test_positions_are_computed_once_for_each_grid_and_used_for_that_grid_only(monkeypatch):
    calls = []

    def counted(height, width, device):
        calls.append((height, width))
        return fourier_features(height, width, device)

    monkeypatch.setattr(layers, "fourier_features", counted)
    layers._cached_fourier_features.cache_clear()
    model = micro().eval()
    small, wide, tall = (torch.randn(2, 3, *size) for size in ((24, 24), (32, 56), (56, 32)))
    with torch.inference_mode():
        for x in (small, wide, tall, small, wide, tall):
            tokens = model.pos_embeder(-(-x.shape[2] // 8), -(-x.shape[3] // 8), x.device)
            fresh = fourier_features(-(-x.shape[2] // 8), -(-x.shape[3] // 8), x.device)
            assert (
                gap(
                    tokens,
                    model.pos_embeder.token_projection(fresh.T[None, :, :, None])[0, :, :, 0].T,
                )
                < 1e-6
            )
            model(x)
    assert calls == [(3, 3), (4, 7), (7, 4)]
    assert not any("pos" in name for name, _ in model.named_buffers())


def test_positions_cached_in_inference_mode_serve_training_afterwards():
    layers._cached_fourier_features.cache_clear()
    model, x = micro(), torch.randn(2, 3, 40, 48)
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    assert model.pos_embeder.token_projection.weight.grad.abs().sum() > 0


# Layers against naive loops in float64.


def test_xca_equals_a_loop_over_images_and_heads():
    d, heads, n = 12, 3, 7
    layer = XCA(d, heads).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, n, d, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for image, head in itertools.product(range(2), range(heads)):
        rows = slice(head * 4, head * 4 + 4)
        parts = layer.qkv.weight.view(3, d, d), layer.qkv.bias.view(3, d)
        q, k, v = (parts[0][i][rows] @ x[image].T + parts[1][i][rows, None] for i in range(3))
        attention = torch.zeros(4, 4, dtype=torch.float64)
        for i, j in itertools.product(range(4), range(4)):
            cosine = sum(q[i, t] * k[j, t] for t in range(n)) / (q[i].norm() * k[j].norm())
            attention[i, j] = torch.exp(cosine * layer.temperature[head])
        attention /= attention.sum(dim=1, keepdim=True)
        expected[image, :, rows] = (attention @ v).T
    assert gap(on_images(layer, x, (1, n)), layer.proj(expected)) < 1e-12


@pytest.mark.parametrize("n", [1, 3, 7])
def test_gradients_of_xca_equal_finite_differences(n):
    torch.manual_seed(n)
    qkv = torch.randn(2, n, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    temperature = torch.rand(3, 1, 1, dtype=torch.float64) + 0.5
    arguments = qkv, temperature.requires_grad_()
    assert torch.autograd.gradcheck(attend_images, arguments, eps=1e-6, atol=1e-8)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-13), ("float32", 1e-5)])
def test_gradients_of_xca_equal_autograds(dtype, tolerance):
    qkv = torch.randn(4, 17, 3, 3, 8, dtype=getattr(torch, dtype))
    temperature = torch.rand(3, 1, 1, dtype=qkv.dtype) + 0.5
    weights = torch.randn(4, 17, 24, dtype=qkv.dtype)

    def derived(qkv, temperature):
        q, k, v = qkv.permute(2, 0, 3, 4, 1).unbind(0)  # (4, 3, 8, 17)
        logits = F.normalize(q, dim=3) @ F.normalize(k, dim=3).mT * temperature
        return (logits.softmax(dim=3) @ v).permute(0, 3, 1, 2).flatten(2)

    results = []
    for function in (attend_images, derived):
        inputs = [tensor.clone().requires_grad_() for tensor in (qkv, temperature)]
        out = function(*inputs)
        (out * weights).sum().backward()
        results.append((out, *(tensor.grad for tensor in inputs)))
    for ours, theirs in zip(*results, strict=True):
        assert gap(ours, theirs) < tolerance * theirs.abs().max()


@pytest.mark.parametrize("n", [36, 7, 2])
def test_bfloat16_gradients_of_xca_are_accurate_to_bfloat16_rounding(n):
    exact = torch.randn(4, n, 3, 3, 8).bfloat16().double().requires_grad_()
    rounded = exact.detach().bfloat16().requires_grad_()
    temperature = torch.rand(3, 1, 1) + 0.5
    weights = torch.randn(4, n, 24).bfloat16()
    attend_images(rounded, temperature).backward(weights)
    attend_images(exact, temperature.double()).backward(weights.double())
    assert rounded.grad.dtype == torch.bfloat16
    assert gap(rounded.grad, exact.grad) < 2**-6 * exact.grad.abs().max()


def test_xca_survives_channels_that_are_zero_for_every_token():
    packed = torch.randn(3, 1, 1, 5, 2)
    packed[0] = 0
    attention = attend_dividing_late(packed, torch.ones(1, 1, 1)).attention
    assert torch.equal(attention, torch.full((1, 1, 2, 2), 0.5))
    qkv = packed.permute(1, 3, 0, 2, 4).contiguous().requires_grad_()
    attend_images(qkv, torch.ones(1, 1, 1))[0, 0, 0].backward()
    assert qkv.grad.isfinite().all()


def test_a_block_adds_each_branch_times_its_gains():
    block = XCABlock(24, 3, 1.0).double().train()
    for name, parameter in block.named_parameters():
        nn.init.normal_(parameter, 1.0 if name.startswith("gamma") else 0.0, 0.3)
    x = torch.randn(3, 12, 24, dtype=torch.float64)
    weights = torch.randn_like(x)

    def written_out(x):
        x = x + block.gamma1 * on_images(block.attn, block.norm1(x), (3, 4))
        x = x + block.gamma3 * on_images(block.local_mp, block.norm3(x), (3, 4))
        return x + block.gamma2 * block.mlp(block.norm2(x))

    results = []
    for function in (lambda x: on_images(block, x, (3, 4)), written_out):
        block.zero_grad()
        inputs = x.clone().requires_grad_()
        out = function(inputs)
        (out * weights).sum().backward()
        results.append([out, inputs.grad, *(p.grad for p in block.parameters())])
    for ours, theirs in zip(*results, strict=True):
        # The bias before a BatchNorm has no effect: its gradient is only rounding.
        assert gap(ours, theirs) < 1e-12 * max(1, theirs.abs().max().item())


def test_lpi_equals_a_loop_over_the_neighbours_on_a_grid_that_is_not_square():
    d, (rows, columns) = 3, (2, 4)
    layer = LPI(d).double().eval()
    for tensor in (*layer.parameters(), layer.bn.running_mean):
        nn.init.normal_(tensor)
    x = torch.randn(1, rows * columns, d, dtype=torch.float64)

    def convolve(image, conv):
        out = torch.zeros_like(image)
        for c, i, j in itertools.product(range(d), range(rows), range(columns)):
            out[c, i, j] = conv.bias[c]
            for a, b in itertools.product((-1, 0, 1), (-1, 0, 1)):
                if 0 <= i + a < rows and 0 <= j + b < columns:
                    out[c, i, j] += conv.weight[c, 0, a + 1, b + 1] * image[c, i + a, j + b]
        return out

    with torch.no_grad():
        image = torch.stack([x[0, :, c].view(rows, columns) for c in range(d)])
        image = convolve(image, layer.conv1)
        image = image * 0.5 * (1 + torch.erf(image / math.sqrt(2)))
        bn = layer.bn
        scale = bn.weight / torch.sqrt(bn.running_var + 1e-5)
        image = (image - bn.running_mean[:, None, None]) * scale[:, None, None]
        image = convolve(image + bn.bias[:, None, None], layer.conv2)
        assert gap(on_images(layer, x, (rows, columns))[0], image.flatten(1).T) < 1e-12


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (3, 4)])
def test_a_frozen_block_passes_the_gradient_on_and_has_none_itself(grid):
    blocks = [XCABlock(24, 3, 1.0).train() for _ in range(2)]
    blocks[1].load_state_dict(blocks[0].requires_grad_(False).state_dict())
    inputs = [torch.linspace(-1, 1, 2 * grid[0] * grid[1] * 24).view(2, -1, 24) for _ in blocks]
    for block, x in zip(blocks, inputs, strict=True):
        on_images(block, x.requires_grad_(), grid).square().sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    assert all(parameter.grad is None for parameter in blocks[0].parameters())


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (2, 2), (5, 2)])
def test_lpi_on_grids_smaller_than_its_kernel_has_the_same_gradients(grid):
    layer = LPI(3).double().train()
    x = torch.randn(5, grid[0] * grid[1], 3, dtype=torch.float64, requires_grad=True)
    image = x.transpose(1, 2).unflatten(2, grid)
    expected = layer.conv2(layer.bn(nn.functional.gelu(layer.conv1(image))))
    out, weights = on_images(layer, x, grid), torch.randn(x.shape, dtype=torch.float64)
    inputs = x, layer.conv1.weight, layer.conv1.bias, layer.conv2.weight, layer.conv2.bias
    theirs = torch.autograd.grad(expected.flatten(2).transpose(1, 2), inputs, weights)
    assert gap(out, expected.flatten(2).transpose(1, 2).detach()) < 1e-12
    for ours, other in zip(torch.autograd.grad(out, inputs, weights), theirs, strict=True):
        assert gap(ours, other) < 1e-10


def test_class_attention_equals_the_form_that_projects_every_token_to_keys_and_values():
    d, heads, n = 12, 3, 7
    layer = ClassAttention(d, heads).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, n, d, dtype=torch.float64)
    q, k, v = layer.qkv(x).view(2, n, 3, heads, d // heads).unbind(2)
    maps, out = torch.zeros(2, heads, n, dtype=torch.float64), []
    for image in range(2):
        for head in range(heads):
            logits = [q[image, 0, head] @ k[image, t, head] / math.sqrt(4) for t in range(n)]
            weights = torch.stack(logits).exp()
            maps[image, head] = weights / weights.sum()
        out.append(torch.cat([maps[image, h] @ v[image, :, h] for h in range(heads)]))
    assert gap(layer.attention(x), maps) < 1e-12
    assert gap(layer(x), layer.proj(torch.stack(out))) < 1e-12


def test_class_attention_maps_and_the_share_of_the_cls_token_sum_to_one():
    model, x = micro(16).eval(), torch.randn(2, 3, 48, 80)
    seen = []
    last = model.cls_attn_blocks[-1].attn
    original = last.attention
    last.attention = lambda tokens: seen.append(original(tokens)) or seen[-1]
    maps = model.class_attention(x)
    assert maps.shape == (2, 3, 3 * 5)
    share = seen[0][:, :, 0]
    assert (share > 0).all()
    assert gap(maps.sum(dim=2) + share, np.ones((2, 3))) < 1e-6
    # The maps are those used in forward_features.
    model.forward_features(x)
    assert torch.equal(seen[1][:, :, 1:], maps)


@pytest.mark.parametrize("patch_size", [16, 8])
def test_the_class_attention_inputs_are_what_hooks_record_at_the_layers(patch_size):
    model = micro(patch_size).double().eval()
    x = torch.randn(2, 3, 48, 32).double()
    seen = []
    for block in model.cls_attn_blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[:2]))
    logits = model(x)
    expected, seen[:] = [*seen], []
    found = model.class_attention_inputs(x)
    assert len(expected) == 2
    for (cls, patches), (raw_cls, raw_patches) in zip(found[:2], expected, strict=True):
        assert gap(cls, model.norm(raw_cls)) < 1e-12
        assert gap(patches, model.norm(raw_patches)) < 1e-12
    assert gap(model.head(found[2][0]), logits) < 1e-12
    for ours, theirs in zip(found[2], model.forward_features(x), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(found[0][0][0], found[0][0][1])  # has not seen the image yet
    assert gap(found[1][0][0], found[1][0][1]) > 1e-3


# Images of several sizes at once.


@pytest.mark.parametrize(
    ("drop_path_rate", "checkpointing", "limit"),
    [(0.0, False, None), (0.0, False, 0), (0.4, False, None), (0.4, False, 1), (0.4, True, 1)],
)
def test_batches_of_several_sizes_equal_one_pass_for_each_size(
    monkeypatch, drop_path_rate, checkpointing, limit
):
    if limit is not None:  # by default a CPU separates the sizes while samples drop branches
        monkeypatch.setattr(XCiT, "_fit_together", lambda self, images: limit > 0)
    sizes = [(5, 32, 32), (7, 16, 24), (3, 8, 40)]
    images = [torch.randn(b, 3, h, w).double() for b, h, w in sizes]
    keys = [stream(0, 0, torch.arange(len(x)), view) for view, x in enumerate(images)]
    together = micro(drop_path_rate=drop_path_rate).double().train()
    together.activation_checkpointing = checkpointing
    apart = copy.deepcopy(together)
    seen = []
    together.blocks[0].mlp.register_forward_hook(lambda _, inputs, out: seen.append(len(out)))
    found = together(images, keys)
    expected = torch.cat([apart(x, k) for x, k in zip(images, keys, strict=True)])
    if (drop_path_rate, limit) == (0.0, None):
        assert len(seen) == 1  # one product for all of them
    assert gap(found, expected) < 1e-12
    weights = torch.randn(found.shape).double()
    for out in (found, expected):
        (out * weights).sum().backward()
    for ours, theirs in zip(together.parameters(), apart.parameters(), strict=True):
        assert gap(ours.grad, theirs.grad) < 1e-10 * max(1, theirs.grad.abs().max().item())
    for ours, theirs in zip(together.buffers(), apart.buffers(), strict=True):
        assert gap(ours, theirs) < 1e-12  # BatchNorm sees one size after the other


def test_on_a_cpu_small_batches_of_several_sizes_share_a_pass(monkeypatch):
    model, images = micro().eval(), [torch.randn(2, 3, size, size) for size in (32, 16)]
    seen = []
    model.blocks[0].mlp.register_forward_hook(lambda _, inputs, out: seen.append(len(out)))
    numbers = (2 * 16 + 2 * 4) * 24
    for limit in (numbers, numbers - 1):
        monkeypatch.setattr(xcit, "TOGETHER_ON_CPU", limit)
        model(images)
    assert seen == [2 * 16 + 2 * 4, 2 * 16, 2 * 4]
    monkeypatch.undo()
    model.activation_checkpointing = True  # one size at a time needs less memory
    model(images)
    assert seen[3:] == [2 * 16, 2 * 4]


def test_batches_of_several_sizes_under_autocast_are_close_to_one_pass_for_each_size():
    images = [torch.randn(6, 3, 32, 32), torch.randn(8, 3, 8, 8)]  # 16 tokens, and 1
    model = micro().train()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = model(images), torch.cat([model(x) for x in images])
    assert gap(found, expected) < 0.02 * expected.std()


# Any image.


@pytest.mark.parametrize("patch_size", [16, 8])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (16, 16), (32, 56), (33, 47), (64, 9)])
def test_any_image_size_gives_one_token_per_full_or_partial_patch(patch_size, size):
    model = micro(patch_size).eval()
    x = torch.randn(1, 3, *size)
    cls, patches = model.forward_features(x)
    n = math.ceil(size[0] / patch_size) * math.ceil(size[1] / patch_size)
    assert cls.shape == (1, 24)
    assert patches.shape == (1, n, 24)
    assert model.class_attention(x).shape == (1, 3, n)
    assert model(x).isfinite().all()
    assert gap(model(x), model.head(cls)) < 1e-6


@pytest.mark.parametrize("in_chans", [1, 5])
def test_every_channel_of_the_image_affects_the_output(in_chans):
    model, x = micro(in_chans=in_chans).eval(), torch.randn(1, in_chans, 32, 32)
    logits = model(x)
    for channel in range(in_chans):
        changed = x.clone()
        changed[:, channel] += 1
        assert gap(model(changed), logits) > 1e-3
    with pytest.raises(RuntimeError, match="channels"):
        model(torch.randn(1, 3, 32, 32))


def test_without_a_head_the_output_is_the_cls_token():
    model, x = micro(num_classes=0).eval(), torch.randn(2, 3, 32, 32)
    assert not any(name.startswith("head") for name in model.state_dict())
    assert gap(model(x), model.forward_features(x)[0]) == 0


def test_training_mode_returns_one_tensor_and_works_with_a_single_image():
    model = micro().train()
    logits = model(torch.randn(1, 3, 32, 32))
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (1, 10)


def test_the_images_memory_layout_does_not_matter():
    model, x = micro().eval(), torch.randn(2, 3, 40, 24)
    assert gap(model(x.contiguous(memory_format=torch.channels_last)), model(x)) < 1e-6


# Gradients, copies, compilation.


def test_every_parameter_gets_a_gradient_except_the_unused_key_bias_of_class_attention():
    model = micro().train()
    model(torch.randn(4, 3, 40, 32)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.stride() == parameter.stride(), name
        thirds = parameter.grad.chunk(3) if ".qkv." in name else (parameter.grad,)
        for third, part in enumerate(thirds):
            inert = name.startswith("cls_attn") and name.endswith("qkv.bias") and third == 1
            assert part.any() != inert, (name, third)


def test_a_loss_on_patch_tokens_gives_gradients_to_all_parameters_that_affect_them():
    model = micro().train()
    model.forward_features(torch.randn(4, 3, 40, 32))[1].square().sum().backward()
    assert model.cls_attn_blocks[1].gamma1.grad.any()
    assert all(p.grad.any() for p in model.blocks.parameters())


def test_a_copy_is_independent_and_holds_only_the_official_tensors():
    model, x = micro().eval(), torch.randn(1, 3, 32, 56)
    before = model(x)
    twin = copy.deepcopy(model)
    assert list(twin.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        twin.pos_embeder.token_projection.weight.zero_()
    assert torch.equal(model(x), before)
    assert gap(twin(x), before) > 1e-3


def test_synchronised_batch_norm_keeps_the_names():
    model = micro()
    assert sum(type(m) is nn.BatchNorm2d for m in model.modules()) == 3 + 2
    names = list(model.state_dict())
    assert list(nn.SyncBatchNorm.convert_sync_batchnorm(model).state_dict()) == names


def plain_xcit(monkeypatch):
    """xcit and its imports, without pytest's import hook, whose checks Dynamo cannot trace."""
    parts = tokens, products, xca, lpi, drop_path, layers, class_attention
    for module in (draws, *parts, xcit):
        name = f"plain_{module.__name__.rpartition('.')[2]}"
        spec = importlib.util.spec_from_file_location(name, module.__file__)
        plain = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, plain)  # Dynamo of torch 2.11 imports it by its name
        spec.loader.exec_module(plain)
        monkeypatch.setitem(sys.modules, module.__name__, plain)  # for those after it
    return plain


def test_compiling_breaks_no_graph_and_changes_nothing_at_two_sizes(monkeypatch):
    plain = plain_xcit(monkeypatch)
    model = micro(depth=1, drop_path_rate=0.3).train()
    monkeypatch.setattr(sys.modules[__name__], "XCiT", plain.XCiT)
    twin = micro(randomised=False, depth=1, drop_path_rate=0.3).train()
    twin.load_state_dict(model.state_dict())
    compiled = torch.compile(twin, backend="eager", fullgraph=True)
    keys = stream(0, 0, torch.arange(3), 0)
    for size in ((32, 32), (24, 56)):
        x = torch.randn(3, 3, *size)
        assert gap(compiled(x, keys), model(x, keys)) < 1e-6
    for method in ("forward_features", "class_attention"):
        torch.compile(getattr(twin, method), backend="eager", fullgraph=True)(x)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # caused by Dynamo
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_modules_give_the_same_numbers_with_one_graph_per_class_and_size(
    monkeypatch, checkpointing
):
    plain = plain_xcit(monkeypatch)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = {
        kind: torch.compile(kind.forward, dynamic=False, fullgraph=True, backend=counter)
        for kind in (plain.ConvPatchEmbed, plain.XCABlock, plain.ClassAttentionBlock)
    }
    monkeypatch.setattr(plain, "_compiled_forward", compiled.__getitem__)
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = plain.XCiT(8, tokens_norm=True, drop_path_rate=0.3, **MICRO).double().train()
    twin = copy.deepcopy(eager)
    twin.compiled, twin.activation_checkpointing = True, checkpointing
    keys = stream(0, 0, torch.arange(3), 0)
    for size in (32, 24):
        x = torch.randn(3, 3, size, size).double()
        for model in (eager, twin):
            model(x, keys).sin().sum().backward()
    for ours, theirs in zip(twin.parameters(), eager.parameters(), strict=True):
        assert gap(ours.grad, theirs.grad) < 1e-10
    for ours, theirs in zip(twin.buffers(), eager.buffers(), strict=True):
        assert gap(ours, theirs) < 1e-12
    assert counter.frame_count == 4 * 2  # the last class attention computes only the cls token
    with torch.no_grad():
        twin.eval()(torch.randn(1, 3, 40, 40).double())
    assert counter.frame_count == 4 * 2  # evaluation is not compiled


# Precision.


class Inputs(TorchDispatchMode):
    """Records the dtypes of the first input and of the output of the operations called `name`."""

    def __init__(self, name: str):
        super().__init__()
        self.name, self.dtypes = name, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if self.name in str(function):
            self.dtypes.append((args[0].dtype, out.dtype))
        return out


def test_under_autocast_every_softmax_and_every_length_is_float32():
    model, x = micro().eval(), torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16), Inputs("_softmax") as softmax:
        model(x)
    assert softmax.dtypes == [(torch.float32, torch.float32)] * (2 + 2)
    with torch.autocast("cpu", torch.bfloat16), Inputs("aten.sqrt") as lengths:
        model(x)
    assert lengths.dtypes == [(torch.float32, torch.float32)] * 2


def test_bfloat16_queries_whose_products_are_exact_give_the_exact_attention():
    # Small integers: q k^T is exact even in bfloat16, so only the norms, the division and the
    # softmax can round. In bfloat16 their error would be about 1e-2 here.
    q, k = torch.randint(-2, 3, (2, 2, 3, 6, 11)).bfloat16()
    temperature = torch.full((3, 1, 1), 7.0)
    packed = torch.stack((q, k, k)).mT  # (3, 2, 3, 11, 6)
    attention = attend_dividing_late(packed, temperature).attention
    assert attention.dtype == torch.float32
    cosine = F.normalize(q.double(), dim=3) @ F.normalize(k.double(), dim=3).mT
    assert gap(attention, (7 * cosine).softmax(dim=3)) < 2e-6


def test_a_bfloat16_forward_and_backward_are_close_to_float32():
    model, x = micro().train(), torch.randn(4, 3, 64, 64)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(x)
    assert 0 < gap(rounded.float(), exact) < 0.05 * exact.std()
    rounded.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("size", [64, 8])
def test_a_model_converted_to_bfloat16_runs_without_autocast(size):
    model, x = micro().eval(), torch.randn(2, 3, size, size)
    exact = model(x)
    assert gap(model.bfloat16()(x.bfloat16()).float(), exact) < 0.2 * exact.std()


# Drop path.


def frozen_statistics(model: XCiT) -> XCiT:
    """Set training mode, but with BatchNorm in evaluation so that it does not mix samples."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def test_a_sample_drops_the_same_branches_in_any_batch():
    model = frozen_statistics(micro(drop_path_rate=0.4).double())
    x, keys = torch.randn(6, 3, 24, 24).double(), stream(0, 1, torch.arange(6) * 97, 1)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    out = model(x, keys)
    assert gap(model(x[order], keys[order]), out[order]) < 1e-12
    assert gap(torch.cat([model(x[:2], keys[:2]), model(x[2:], keys[2:])]), out) < 1e-12
    assert gap(model(x, keys + 1), out) > 1e-3
    assert gap(model.eval()(x, keys), out) > 1e-3


def test_drop_path_is_a_gain_of_zero_or_one_over_the_keep_rate_for_each_branch():
    rate = 0.4
    model = frozen_statistics(micro(drop_path_rate=rate).double())
    x, keys = torch.randn(4, 3, 24, 24).double(), stream(0, 0, torch.arange(4), 0)
    out, patches = model(x, keys), model.forward_features(x, keys)[1]
    kept = 0
    for sample in range(4):
        twin = copy.deepcopy(model).eval()
        for number, block in enumerate(twin.blocks):
            for branch, gamma in enumerate((block.gamma1, block.gamma3, block.gamma2)):
                keep = uniform(keys[sample : sample + 1], 3 * number + branch).item() >= rate
                kept += keep
                gamma.data *= keep / (1 - rate)
        assert gap(twin(x[sample : sample + 1])[0], out[sample]) < 1e-6
        assert gap(twin.forward_features(x[sample : sample + 1])[1][0], patches[sample]) < 1e-6
    assert 6 < kept < 20  # of 24: both cases occur


@pytest.mark.parametrize("with_keys", [True, False])
def test_every_block_keeps_a_branch_at_the_same_rate(with_keys):
    model, b = micro(depth=4, drop_path_rate=0.1).train(), 20_000
    keep = model._drop_path(b, stream(0, 0, torch.arange(b), 0) if with_keys else None)
    assert keep.shape == (4, 3, b)
    assert set(keep.unique().tolist()) == {0.0, torch.tensor(1 / 0.9).item()}
    rates = (keep > 0).double().mean(dim=2)
    assert (rates - 0.9).abs().max() < 4.5 * math.sqrt(0.9 * 0.1 / b)
    assert not torch.equal(keep[0, 0], keep[0, 1])
    assert gap(keep.double().mean(), np.array(1.0)) < 0.005


def test_without_keys_torchs_generator_draws_drop_path():
    model, x = frozen_statistics(micro(drop_path_rate=0.5)), torch.randn(4, 3, 24, 24)
    torch.manual_seed(1)
    first, second = model(x), model(x)
    torch.manual_seed(1)
    assert torch.equal(model(x), first)
    assert gap(second, first) > 1e-3


def test_evaluation_drops_nothing():
    model, x = micro(drop_path_rate=0.9).eval(), torch.randn(4, 3, 24, 24)
    plain = micro().eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x), plain(x))
    assert torch.equal(model(x, torch.arange(4)), plain(x))


def dropped(factors: torch.Tensor, rate: float) -> tuple[drop_path.Kept, ...]:
    """Build `Kept` for 12 tokens per sample, as the model does for blocks that may skip samples."""
    rows = [(of_branch.nonzero()[:, 0],) for of_branch in factors]
    scale, per_token = 1 / (1 - rate), factors.repeat_interleave(12, dim=1)[:, :, None]
    return tuple(
        drop_path.Kept(per_token[i], scale, None if i == 1 else rows[i]) for i in range(len(rows))
    )


def masked(block: XCABlock, x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Run all samples through all branches and multiply dropped branches by 0."""
    of_xca, of_lpi, of_mlp = factors[:, :, None, None]
    x = x + of_xca * block.gamma1 * on_images(block.attn, block.norm1(x), (3, 4))
    x = x + of_lpi * block.gamma3 * on_images(block.local_mp, block.norm3(x), (3, 4))
    return x + of_mlp * block.gamma2 * block.mlp(block.norm2(x))


def block_results(function, block: XCABlock, x: torch.Tensor, autocast: bool = False) -> list:
    """Return the output and the gradients of input and parameters."""
    block.zero_grad()
    inputs = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, autocast):
        out = function(block, inputs)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out, inputs.grad, *(p.grad for p in block.parameters())]


@pytest.mark.parametrize("case", ["some", "all kept", "none kept", "xca dropped", "one kept"])
def test_skipping_samples_in_a_branch_equals_multiplying_them_by_zero(case):
    keep = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1], [1, 0, 1, 1, 1.0]]).double()
    if case == "xca dropped":
        keep[0] = 0
    elif case == "one kept":
        keep[:] = torch.eye(5)[:3]
    elif case != "some":
        keep.fill_(case == "all kept")
    factors = keep / 0.6
    block = XCABlock(24, 3, 1.0).double().train()
    for name, parameter in block.named_parameters():
        nn.init.normal_(parameter, 1.0 if name.startswith("gamma") else 0.0, 0.3)
    x = torch.randn(5, 12, 24).double()

    def left_out(block, x):
        kept = dropped(factors.to(x.dtype), 0.4)
        return on_images(block, x, (3, 4), kept)

    expected = block_results(lambda block, x: masked(block, x, factors), block, x)
    found = block_results(left_out, block, x)
    assert all(gradient is not None for gradient in found)
    for ours, theirs in zip(found, expected, strict=True):
        assert gap(ours, theirs) < 1e-12 * max(1, theirs.abs().max().item())
    if case == "none kept":
        assert torch.equal(found[0], x)
        assert not any(gradient.any() for gradient in found[2:])
    rounded = block_results(left_out, block.float(), x.float(), autocast=True)
    assert rounded[0].dtype == rounded[1].dtype == torch.float32
    ours, theirs = (torch.cat([t.double().flatten() for t in r[1:]]) for r in (rounded, expected))
    assert gap(rounded[0], expected[0]) < 0.02 * expected[0].abs().max()
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_a_sample_that_drops_a_branch_equals_the_residual_to_the_bit_and_costs_nothing():
    block, x = XCABlock(24, 3, 1.0).train(), torch.randn(5, 12, 24)
    keep = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 1, 1, 0.0]])
    seen = {}
    for name in ("norm1", "norm2", "norm3", "attn", "local_mp", "mlp"):
        module = getattr(block, name)
        module.register_forward_hook(lambda _, inputs, out, n=name: seen.update({n: len(out)}))
    out = on_images(block, x, (3, 4), dropped(keep / 0.6, 0.4))
    samples = {"norm1": 2, "attn": 2, "norm3": 5, "local_mp": 5, "norm2": 2, "mlp": 2}
    assert seen == {name: 12 * count for name, count in samples.items()}
    assert torch.equal(out[[1, 4]], x[[1, 4]])
    assert not (out[[0, 2, 3]] == x[[0, 2, 3]]).all(dim=2).any()


def test_with_keys_the_host_knows_which_samples_keep_a_branch():
    rate = 0.4
    model, keys = micro(drop_path_rate=rate).train(), stream(3, 1, torch.arange(7), 2)
    grids, by_grid = (Grid(3, 2, 2), Grid(4, 1, 3)), keys.split((3, 4))
    for number, branches in enumerate(model._kept(grids, by_grid)):
        for branch, kept in enumerate(branches):
            keeps = uniform(keys, 3 * number + branch) >= rate
            of_tokens = torch.cat([keeps[:3].repeat_interleave(4), keeps[3:].repeat_interleave(3)])
            assert torch.equal(kept.factors, of_tokens[:, None] / torch.tensor(1 - rate))
            if branch == 1:
                assert kept.rows is None  # LPI's BatchNorm must see all samples
            else:
                assert [rows.tolist() for rows in kept.rows] == [
                    [i for i, keep in enumerate(part) if keep] for part in keeps.split((3, 4))
                ]
    assert micro(drop_path_rate=0.0).train()._kept(grids, by_grid) == [None, None]


# Activation checkpointing.


def after_steps(checkpointing: bool, dtype: torch.dtype, autocast: bool = False) -> dict:
    """Return the full state after two steps with drop path and images of two sizes."""
    torch.manual_seed(0)
    model = micro(drop_path_rate=0.4, num_classes=5).to(dtype).train()
    model.activation_checkpointing = checkpointing
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(2):
        loss = 0
        with torch.autocast("cpu", torch.bfloat16, autocast):
            for view, size in enumerate((32, 16)):
                x = torch.randn(5, 3, size, size, dtype=dtype)
                out = model(x, stream(0, step, torch.arange(5), view))
                loss = loss + out.to(dtype).sin().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16 autocast"])
def test_checkpointing_changes_no_bit_of_weights_and_running_statistics(precision):
    dtype = torch.float64 if precision == "float64" else torch.float32
    plain, checkpointed = (after_steps(on, dtype, "bfloat" in precision) for on in (False, True))
    torch.manual_seed(0)
    start = micro(num_classes=5).to(dtype).state_dict()
    for name, tensor in plain.items():
        assert torch.equal(checkpointed[name], tensor), name
    counts = [name for name in plain if name.endswith("num_batches_tracked")]
    assert {plain[name].item() for name in counts} == {4}
    moved = [name for name in plain if not torch.equal(plain[name], start[name])]
    assert len(moved) > 0.9 * len(plain)


def test_checkpointing_saves_only_a_fraction_of_the_activations():
    kept = {}
    for checkpointing in (False, True):
        model = micro(depth=6, drop_path_rate=0.2).train()
        model.activation_checkpointing = checkpointing
        sizes = {}

        def note(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = model(torch.randn(8, 3, 64, 64), stream(0, 0, torch.arange(8), 0))
        kept[checkpointing] = sum(size for at, size in sizes.items() if at not in parameters)
        out.sum().backward()
    assert kept[True] < 0.15 * kept[False]


@pytest.mark.parametrize("drop", ["nothing", "left out", "multiplied by zero"])
def test_a_checkpointed_block_computes_its_forward_pass_once_more_and_nothing_else(drop):
    keep = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1], [1, 0, 1, 1, 1.0]])
    kept = None if drop == "nothing" else dropped(keep / 0.6, 0.4)
    if drop == "multiplied by zero":  # as on a GPU, where the host does not know the rows
        kept = tuple(of_branch._replace(rows=None) for of_branch in kept)
    block, x = XCABlock(24, 3, 1.0).train(), torch.randn(5 * 12, 24, requires_grad=True)
    arguments = block, x, (Grid(5, 3, 4),), kept
    with FlopCounterMode(display=False) as forward:
        out = checkpoint(*arguments, use_reentrant=False)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    out = block(*arguments[1:])
    with FlopCounterMode(display=False) as plain:
        out.sum().backward()
    forward, backward, plain = (c.get_total_flops() for c in (forward, backward, plain))
    assert backward - plain == forward


def test_checkpointing_runs_without_gradients_and_without_keys():
    model, x = micro(drop_path_rate=0.3).train(), torch.randn(4, 3, 32, 32)
    gradients = []
    for checkpointing in (False, True):
        model.activation_checkpointing = checkpointing
        torch.manual_seed(5)
        model.zero_grad()
        model(x).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    with torch.no_grad():
        assert not model.eval()(x).requires_grad


def test_a_compiled_checkpointed_model_moves_running_statistics_once(monkeypatch):
    plain = plain_xcit(monkeypatch)
    models = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = plain.XCiT(8, tokens_norm=True, drop_path_rate=0.3, **(MICRO | {"depth": 1}))
        model = model.double().train()
        model.activation_checkpointing = checkpointing
        call = torch.compile(model, backend="aot_eager", fullgraph=True) if checkpointing else model
        x, keys = torch.randn(3, 3, 32, 32).double(), stream(0, 0, torch.arange(3), 0)
        call(x, keys).sin().sum().backward()
        models.append(model)
    for ours, theirs in zip(*(model.buffers() for model in models), strict=True):
        assert gap(ours, theirs) < 1e-12
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert gap(ours.grad, theirs.grad) < 1e-10


RANK = """
import sys, torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from test_xcit import micro
from torch.nn.parallel import DistributedDataParallel
from ssl_xcit.runtime import distributed
from ssl_xcit.runtime.draws import stream
from ssl_xcit.operators.sync_batchnorm import synchronise_batchnorm

ranks = distributed.setup("cpu")
for checkpointing in (False, True):
    torch.manual_seed(0)
    model = micro(drop_path_rate=0.5, num_classes=5).double().train()
    model.activation_checkpointing = checkpointing
    synchronise_batchnorm(model, ranks.device)
    model = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(3):
        indices = torch.arange(2) + 2 * ranks.rank
        images = torch.randn(4, 3, 24, 24).double()[indices]
        optimizer.zero_grad()
        model(images, stream(0, step, indices, 0)).sin().sum().backward()
        optimizer.step()
    torch.save(model.module.state_dict(), f"{sys.argv[2]}/{checkpointing}_{ranks.rank}.pt")
distributed.teardown()
"""


def test_checkpointing_changes_no_bit_with_batchnorm_over_two_ranks(tmp_path):
    forked.run_ranks(2, [sys.executable, "-c", RANK, Path(__file__).parent, tmp_path])
    first, *others = (
        torch.load(tmp_path / f"{checkpointing}_{rank}.pt")
        for checkpointing in (False, True)
        for rank in (0, 1)
    )
    assert first["blocks.0.local_mp.bn.num_batches_tracked"] == 3
    for other in others:
        for name, tensor in first.items():
            assert torch.equal(other[name], tensor), name
