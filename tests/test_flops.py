"""Parameter and operation counts.

Oracles: the published integers of the 42 models, and torch's counter of multiply-adds, which
observes what a forward pass really runs.
"""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ssl_xcit.models.flops import Operations, count_operations, count_parameters, first_convolution
from ssl_xcit.models.variants import ARCHITECTURES
from ssl_xcit.models.xcit import XCiT, build_xcit

SEED_MODELS = Path(__file__).parents[2] / "shared" / "fixtures" / "seed_models.json"
ONE_OF_EACH_KIND = ("xcit_nano_12_p16", "xcit_tiny_12_p8")  # of norm, and of patch size
MICRO = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "eta": 1.0}


def bare(arch, **options):
    with torch.device("meta"):
        return build_xcit(arch, **options)


@pytest.mark.skipif(not SEED_MODELS.exists(), reason="the table of published models is not here")
def test_parameters_and_flops_equal_the_published_integers_of_all_42_models():
    rows = json.loads(SEED_MODELS.read_text())
    models = {arch: bare(arch) for arch in ARCHITECTURES}
    equal = 0
    for row in rows:
        model, size = models[row["model"]], row["img_size"]
        assert count_parameters(model) == row["params_exact"], row["name"]
        operations = count_operations(model, size, size)
        assert operations.total == row["flops_exact"], row["name"]
        assert f"{operations.total / 1e9:.2f}" == row["flops_G_str"]
        equal += 1
    assert equal == 42


@pytest.mark.parametrize(
    "arch",
    [
        pytest.param(arch, marks=() if arch in ONE_OF_EACH_KIND else pytest.mark.long)
        for arch in ARCHITECTURES
    ],
)
def test_the_count_of_our_forward_pass_equals_torchs_counter(arch):
    size = (96, 160)
    model = bare(arch).eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, *size, device="meta"))
    ours = count_operations(model, *size, conventional=False, classifier=True)
    assert 2 * ours.multiply_adds == counter.get_total_flops()


@pytest.mark.parametrize("tokens_norm", [True, False])
@pytest.mark.parametrize("size", [(64, 48), (33, 70)], ids=str)
def test_the_count_for_odd_sizes_agrees_with_torchs_counter_and_with_hooks(size, tokens_norm):
    model = XCiT(**MICRO, tokens_norm=tokens_norm, num_classes=7).eval().requires_grad_(False)
    norms = {"batch": 0, "layer": 0}

    def watch(kind, per_element):
        def hook(module, inputs, output):
            norms[kind] += per_element * output.numel()

        return hook

    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(watch("batch", 2))
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(watch("layer", 5))
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, *size))
    ours = count_operations(model, *size, conventional=False, classifier=True)
    assert 2 * ours.multiply_adds == counter.get_total_flops()
    assert (ours.batch_norm, ours.layer_norm) == (norms["batch"], norms["layer"])


def test_conventional_class_attention_costs_two_projections_per_token_more_than_ours():
    """Explicit count for d = 24, 3 heads, 6 x 8 patches: only class attention and norms differ."""
    model = XCiT(**MICRO, tokens_norm=True, num_classes=7)
    theirs = count_operations(model, 48, 64)
    ours = count_operations(model, 48, 64, conventional=False)
    n, d, heads = 48, 24, 3
    assert theirs.convolution - ours.convolution == ours.linear - (
        theirs.linear - 2 * 2 * (n + 1) * d * d
    )  # the positions are counted as another kind
    assert theirs.convolution - ours.convolution == 64 * n * d
    matmuls = 2 * (2 * (n + 1) * d), 2 * (2 * d * d + 2 * heads * (n + 1) * d)
    assert theirs.matmul - ours.matmul == matmuls[0] - matmuls[1]
    assert theirs.layer_norm - ours.layer_norm == 5 * d * (n + n)  # last norm2 and the final norm
    assert theirs.batch_norm == ours.batch_norm


def test_the_first_convolution_is_the_stems():
    model = bare("xcit_small_12_p16")
    assert first_convolution(model, 224, 225) == 112 * 113 * 9 * 3 * 48


def test_operations_add_up_by_kind():
    total = Operations(1, 2, 3, 4, 5).plus(Operations(convolution=10, layer_norm=1))
    assert total == (11, 2, 3, 4, 6)
    assert (total.total, total.multiply_adds) == (26, 16)
