"""XCiT against the recorded outputs of the official code, timm, and naive loops from the equations.

The logits of the fixtures hardly move with LayerNorm's eps (7e-6) or a tanh GELU (1e-4): hence the
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

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_xcit import draws, xcit
from ssl_xcit.draws import stream, uniform
from ssl_xcit.errors import UserError
from ssl_xcit.xcit import (
    ARCHITECTURES,
    LPI,
    XCA,
    ClassAttention,
    XCiT,
    build_xcit,
    cross_covariance,
    fourier_features,
)

FIXTURES = Path(__file__).parent / "fixtures"
MICRO = {"embed_dim": 24, "depth": 2, "num_heads": 3, "eta": 1.0, "num_classes": 10}
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def micro(patch_size: int = 8, randomised: bool = True, **overrides) -> XCiT:
    model = XCiT(patch_size, tokens_norm=patch_size == 8, **(MICRO | overrides))
    return randomise(model) if randomised else model


def randomise(model: XCiT) -> XCiT:
    """Every tensor away from its initial value, BatchNorm's statistics included."""
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


def test_parameter_counts_are_those_of_the_published_table():
    rows = json.loads((FIXTURES / "seed_models.json").read_text())
    assert len(rows) == 42
    counts = {}
    for arch in ARCHITECTURES:
        with torch.device("meta"):
            counts[arch] = sum(p.numel() for p in build_xcit(arch).parameters())
    for row in rows:
        assert counts[row["model"]] == row["params_exact"], row["name"]


def test_the_table_gives_each_model_its_heads_gains_and_kind_of_norm():
    rows = json.loads((FIXTURES / "seed_models.json").read_text())
    for row in rows:
        variant = xcit.VARIANTS[row["arch"]]
        assert variant == tuple(
            row[k] for k in ("embed_dim", "depth", "num_heads", "eta", "tokens_norm")
        )
    model = build_xcit("xcit_nano_12_p16", num_classes=0)
    assert (model.embed_dim, model.patch_size, model.num_classes) == (128, 16, 0)


def test_a_wrong_architecture_is_answered_with_the_nearest_one():
    with pytest.raises(UserError, match=r"'xcit_smal_12_p8'.*'xcit_small_12_p8'") as error:
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

    monkeypatch.setattr(xcit, "fourier_features", counted)
    xcit._cached_fourier_features.cache_clear()
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
    xcit._cached_fourier_features.cache_clear()
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
    assert gap(layer(x), layer.proj(expected)) < 1e-12


def test_xca_survives_channels_that_are_zero_for_every_token():
    q = torch.zeros(1, 1, 2, 5, requires_grad=True)
    attention = cross_covariance(q, torch.randn(1, 1, 2, 5), torch.ones(1, 1, 1))
    assert torch.equal(attention, torch.full((1, 1, 2, 2), 0.5))
    attention[0, 0, 0, 0].backward()
    assert q.grad.isfinite().all()


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
        assert gap(layer(x, (rows, columns))[0], image.flatten(1).T) < 1e-12


def test_class_attention_equals_projecting_every_token_to_keys_and_values():
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
    # the maps are those that made the features
    model.forward_features(x)
    assert torch.equal(seen[1][:, :, 1:], maps)


@pytest.mark.parametrize("patch_size", [16, 8])
def test_the_class_attention_inputs_are_what_hooks_see_enter_the_layers(patch_size):
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


# Any image.


@pytest.mark.parametrize("patch_size", [16, 8])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (16, 16), (32, 56), (33, 47), (64, 9)])
def test_any_size_gives_one_token_for_each_begun_patch(patch_size, size):
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
def test_every_channel_of_the_image_counts(in_chans):
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


def test_every_parameter_gets_a_gradient_but_the_inert_key_bias_of_class_attention():
    model = micro().train()
    model(torch.randn(4, 3, 40, 32)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.stride() == parameter.stride(), name
        thirds = parameter.grad.chunk(3) if ".qkv." in name else (parameter.grad,)
        for third, part in enumerate(thirds):
            inert = name.startswith("cls_attn") and name.endswith("qkv.bias") and third == 1
            assert part.any() != inert, (name, third)


def test_patch_tokens_alone_reach_every_parameter_that_makes_them():
    model = micro().train()
    model.forward_features(torch.randn(4, 3, 40, 32))[1].square().sum().backward()
    assert model.cls_attn_blocks[1].gamma1.grad.any()
    assert all(p.grad.any() for p in model.blocks.parameters())


def test_a_copy_is_independent_and_holds_nothing_but_the_official_tensors():
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


def without_shape_checks(module, monkeypatch):
    """`module` loaded again from its file, past pytest's hook: Dynamo cannot trace the checks."""
    name = f"plain_{module.__name__.rpartition('.')[2]}"
    spec = importlib.util.spec_from_file_location(name, module.__file__)
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    monkeypatch.setitem(sys.modules, name, plain)  # Dynamo of torch 2.11 imports it by its name
    return plain


def test_compiling_breaks_no_graph_and_changes_nothing_at_two_sizes(monkeypatch):
    plain = without_shape_checks(xcit, monkeypatch)
    plain.uniform = without_shape_checks(draws, monkeypatch).uniform
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


# Precision.


class Inputs(TorchDispatchMode):
    """Notes the dtype of the first input and of the output of the operations called `name`."""

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
    with torch.autocast("cpu", torch.bfloat16), Inputs("vector_norm") as norm:
        model(x)
    assert norm.dtypes == [(torch.bfloat16, torch.float32)] * (2 * 2)


def test_bfloat16_queries_whose_products_are_exact_give_the_exact_attention():
    # Small integers: q k^T has no rounding even in bfloat16, so what is left is what the lengths,
    # the division and the softmax do. In bfloat16 they would err by some 1e-2 here.
    q, k = torch.randint(-2, 3, (2, 2, 3, 6, 11)).bfloat16()
    temperature = torch.full((3, 1, 1), 7.0)
    attention = cross_covariance(q, k, temperature)
    assert attention.dtype == torch.float32
    cosine = F.normalize(q.double(), dim=3) @ F.normalize(k.double(), dim=3).mT
    assert gap(attention, (7 * cosine).softmax(dim=3)) < 2e-6


def test_a_bfloat16_forward_and_backward_stay_near_float32():
    model, x = micro().train(), torch.randn(4, 3, 64, 64)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(x)
    assert 0 < gap(rounded.float(), exact) < 0.05 * exact.std()
    rounded.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_model_converted_to_bfloat16_runs_without_autocast():
    model, x = micro().eval(), torch.randn(2, 3, 64, 64)
    exact = model(x)
    assert gap(model.bfloat16()(x.bfloat16()).float(), exact) < 0.2 * exact.std()


# Drop path.


def frozen_statistics(model: XCiT) -> XCiT:
    """Training mode, but BatchNorm does not mix the samples of a batch."""
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
    assert 6 < kept < 20  # of 24: both cases were seen


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


def test_without_keys_torchs_generator_decides():
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
