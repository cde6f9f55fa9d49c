"""Parameter and FLOP counts.

Oracles: the published integers of the 42 models, and arithmetic written out for a small network.
"""

import json
from pathlib import Path

import pytest
import torch

from ssl_xcit.models.flops import count_parameters, forward_flops, table_flops
from ssl_xcit.models.variants import ARCHITECTURES
from ssl_xcit.models.xcit import XCiT, build_xcit

SEED_MODELS = Path(__file__).parents[2] / "shared" / "fixtures" / "seed_models.json"
MICRO = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "eta": 1.0}


def bare(arch):
    with torch.device("meta"):
        return build_xcit(arch)


@pytest.mark.skipif(not SEED_MODELS.exists(), reason="the table of published models is not here")
def test_parameters_and_flops_equal_the_published_integers_of_all_42_models():
    rows = json.loads(SEED_MODELS.read_text())
    models = {arch: bare(arch) for arch in ARCHITECTURES}
    equal = 0
    for row in rows:
        model, size = models[row["model"]], row["img_size"]
        assert count_parameters(model) == row["params_exact"], row["name"]
        flops = table_flops(model, size)
        assert flops == row["flops_exact"], row["name"]
        assert f"{flops / 1e9:.2f}" == row["flops_G_str"]
        equal += 1
    assert equal == 42


# By hand, for d = 24, 3 heads, 2 blocks: multiply-adds per patch of a block's linear layers (qkv,
# projection, MLP), of its two 3 x 3 convolutions, and of q^T k and attention times v (8 x 8 a head)
D, HEADS = 24, 3
BLOCK = 12 * D * D + 2 * 9 * D + 2 * D * 8


def stem(*pixels):
    """The three convolutions of MICRO with these numbers of pixels: 3 -> 6 -> 12 -> 24 channels."""
    return sum(n * 9 * c * d for n, c, d in zip(pixels, (3, 6, 12), (6, 12, 24), strict=True))


@pytest.mark.parametrize("classes", [0, 7])
@pytest.mark.parametrize(
    ("size", "pixels"),
    [((48, 64), (768, 192, 48)), ((33, 70), (17 * 35, 9 * 18, 5 * 9))],
    ids=["even", "odd"],
)
def test_a_forward_pass_has_the_flops_that_are_counted_by_hand(size, pixels, classes):
    n = pixels[-1]
    model = XCiT(**MICRO, tokens_norm=True, num_classes=classes).eval()
    # query, query through the key matrix, mean tokens through the value matrix, projection
    attention = 4 * D * D + 2 * HEADS * (n + 1) * D
    class_blocks = 2 * (attention + 8 * D * D)  # their MLPs see the cls token alone
    images, positions = 5 * (stem(*pixels) + n * 2 * BLOCK + class_blocks), n * 64 * D
    flops = forward_flops(model, torch.empty(5, 3, *size, device="meta"))
    assert flops["Global"] == 2 * (images + positions + 5 * D * classes)
    assert flops["XCiT.pos_embeder"] == 2 * positions  # once for all images
    assert flops["XCiT.patch_embed.proj.0.0"] == 2 * 5 * pixels[0] * 9 * 3 * 6


@pytest.mark.parametrize("tokens_norm", [True, False])
def test_tables_count_keys_and_values_of_every_token_and_norms(tokens_norm):
    n = 36
    model = XCiT(**MICRO, tokens_norm=tokens_norm, num_classes=7)
    products = stem(576, 144, n) + n * 64 * D + n * 2 * BLOCK
    products += 2 * ((3 + 2 * n) * D * D + 2 * (n + 1) * D + D * D + 8 * D * D)
    batch_norms = 2 * (576 * 6 + 144 * 12 + n * 24 + n * 2 * D)
    second = n + 1 if tokens_norm else 1
    layer_norms = 5 * D * (n * 2 * 3 + 2 * (n + 1 + second) + n + 1)
    assert table_flops(model, 48) == products + batch_norms + layer_norms
