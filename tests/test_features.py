import copy
import itertools
import sys
from pathlib import Path

import forked
import pytest
import torch
from torch import nn

from ssl_xcit.data.pixels import normalise
from ssl_xcit.evaluation.features import extract_features, extract_pixels
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.runtime.errors import UserError

CPU = torch.device("cpu")
FEATURES = ("cls", "patch", "cls+patch", "inputs1", "inputs2")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """A backbone in miniature: BatchNorm and dropout show the mode, `calls` the forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, stride=4)
        self.bn = nn.BatchNorm2d(6)
        self.dropout = nn.Dropout(0.5)
        self.calls = 0

    def forward_features(self, x):
        return self.class_attention_inputs(x)[-1]

    def class_attention_inputs(self, x):
        self.calls += 1
        tokens = self.dropout(self.bn(self.conv(x))).flatten(2).transpose(1, 2)
        stages = [tokens.tanh(), 2 * tokens.sin(), tokens]
        return [(patches.amax(dim=1), patches) for patches in stages]


class Loader(list):
    """Batches as EvalLoader yields them, with its mean and std."""

    mean, std = MEAN, STD


def make_loader(n=7, batch_size=3, dtype=torch.uint8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, 3, 8, 8), generator=generator).to(torch.uint8)
    if dtype == torch.float32:
        images = naive_normalise(images).float()
    order = torch.randperm(n, generator=generator)  # any order of arrival
    labels = torch.arange(n) * 10
    return Loader((images[i], labels[i], i) for i in order.split(batch_size))


def naive_normalise(images):
    columns = [
        (channel.double() / 255 - mean) / std
        for channel, mean, std in zip(images.unbind(-3), MEAN, STD, strict=True)
    ]
    return torch.stack(columns, dim=-3)


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    model = Backbone()
    with torch.no_grad():  # running statistics unlike those of any batch
        model.bn.running_mean.uniform_(-1, 1)
        model.bn.running_var.uniform_(0.5, 2)
    return model


def test_every_kind_of_feature_equals_its_definition_in_float64(backbone):
    loader = make_loader()
    found = extract_features(backbone, loader, FEATURES, CPU, "fp32")
    reference = copy.deepcopy(backbone).double().eval()
    expected = {kind: [] for kind in FEATURES}
    images, _, indices = (torch.cat(parts) for parts in zip(*loader, strict=True))
    for image in images[indices.argsort()]:
        cls, patches = reference.forward_features(naive_normalise(image)[None])
        patch = sum(patches[0]) / len(patches[0])
        expected["cls"].append(cls[0])
        expected["patch"].append(patch)
        expected["cls+patch"].append(torch.cat((cls[0], patch)))
        (_, first), (cls, second), _ = reference.class_attention_inputs(
            naive_normalise(image)[None]
        )
        last_input = [*cls[0], *(sum(second[0]) / len(second[0]))]
        expected["inputs1"].append(torch.stack(last_input))
        expected["inputs2"].append(torch.stack([*(sum(first[0]) / len(first[0])), *last_input]))
    assert found.keys() == expected.keys()
    for kind, rows in expected.items():
        features = found[kind].features
        assert features.dtype == torch.float32
        torch.testing.assert_close(features.double(), torch.stack(rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("asked", itertools.combinations(FEATURES, 2))
def test_a_kind_is_the_same_whatever_else_is_asked_for(backbone, asked):
    every = extract_features(backbone, make_loader(), FEATURES, CPU, "fp32")
    found = extract_features(backbone, make_loader(), asked, CPU, "fp32")
    assert tuple(found) == asked
    for kind in asked:
        assert torch.equal(found[kind].features, every[kind].features)


def test_rows_come_in_the_order_of_the_dataset_with_their_labels(backbone):
    found = extract_features(backbone, make_loader(), ["cls"], CPU, "fp32")["cls"]
    assert found.indices.tolist() == list(range(7))
    assert found.labels.tolist() == [10 * i for i in range(7)]


def test_all_kinds_share_one_forward_per_batch(backbone):
    extract_features(backbone, make_loader(n=7, batch_size=3), FEATURES, CPU, "fp32")
    assert backbone.calls == 3


def test_bytes_and_normalised_floats_give_the_same_features(backbone):
    from_bytes = extract_features(backbone, make_loader(), ["patch"], CPU, "fp32")["patch"]
    floats = make_loader(dtype=torch.float32)
    from_floats = extract_features(backbone, floats, ["patch"], CPU, "fp32")["patch"]
    torch.testing.assert_close(from_bytes.features, from_floats.features, rtol=1e-5, atol=1e-5)


def test_the_batch_size_does_not_change_the_features(backbone):
    one, all_at_once = (
        extract_features(backbone, make_loader(batch_size=size), ["cls"], CPU, "fp32")["cls"]
        for size in (1, 7)
    )
    torch.testing.assert_close(one.features, all_at_once.features, rtol=1e-6, atol=1e-6)


def test_bf16_rounds_inside_and_returns_float32(backbone):
    exact, rounded = (
        extract_features(backbone, make_loader(), ["cls+patch"], CPU, precision)["cls+patch"]
        for precision in ("fp32", "bf16")
    )
    assert rounded.features.dtype == torch.float32
    patch = rounded.features[:, 6:]  # the mean itself is not rounded to bf16
    assert (patch != patch.bfloat16().float()).any()
    difference = (exact.features - rounded.features).abs().max()
    assert 1e-4 < difference < 0.1


def test_extraction_leaves_mode_buffers_parameters_and_gradients_as_they_were(backbone):
    backbone.train()
    backbone.bn.eval()  # frozen on purpose by its owner
    before = copy.deepcopy(backbone.state_dict())
    found = extract_features(backbone, make_loader(), ["cls"], CPU, "fp32")
    assert not found["cls"].features.requires_grad
    assert not found["cls"].features.is_inference()  # or no classifier could be trained on them
    assert backbone.training
    assert backbone.conv.training
    assert backbone.dropout.training
    assert not backbone.bn.training
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in backbone.parameters())


def test_the_mode_is_restored_when_the_loader_fails(backbone):
    class Broken(Loader):
        def __iter__(self):
            yield self[0]
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        extract_features(backbone.train(), Broken(make_loader()), ["cls"], CPU, "fp32")
    assert all(module.training for module in backbone.modules())
    assert not torch.is_inference_mode_enabled()


def test_a_model_trains_on_as_if_it_had_not_been_looked_at():
    """Nothing made in inference mode (cached positions) may reach a later backward pass."""
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    weights = []
    for look in (False, True):
        torch.manual_seed(0)
        model = XCiT(8, 24, 2, 3, 1.0, True, num_classes=0, drop_path_rate=0.2).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            if look:  # at a size not seen before, too
                loader = Loader([(images[:, :, :24, :24], torch.arange(4), torch.arange(4))])
                extract_features(model, loader, FEATURES, CPU, "bf16")
            model(images[:, :, :24, :24]).square().mean().backward()
            optimizer.step()
        weights.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))


def test_pixels_are_the_bytes_of_the_view_in_order():
    loader = make_loader()
    found = extract_pixels(loader)
    assert found.features.dtype == torch.uint8
    for images, _, indices in loader:
        for image, i in zip(images, indices, strict=True):
            assert torch.equal(found.features[i], image.flatten())


def test_pixels_survive_a_loader_that_reuses_its_memory():
    class Reusing(Loader):
        def __iter__(self):
            memory = torch.empty_like(self[0][0])
            for images, labels, indices in super().__iter__():
                yield memory.copy_(images), labels, indices

    loader = make_loader(n=6)
    assert torch.equal(extract_pixels(Reusing(loader)).features, extract_pixels(loader).features)


@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 3, 5, 4), (2, 4, 3, 5, 6)])
def test_normalise_equals_the_definition_for_any_number_of_leading_dimensions(shape):
    images = torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    found = normalise(images, MEAN, STD)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), naive_normalise(images), rtol=1e-6, atol=1e-6)


def test_normalise_refuses_statistics_for_another_number_of_channels():
    with pytest.raises(UserError, match="1 channels but mean has 3 values"):
        normalise(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), MEAN, STD)


def test_an_unknown_kind_of_feature_is_refused_with_the_choices(backbone):
    with pytest.raises(UserError, match=r"'gem'.*cls, patch, cls\+patch"):
        extract_features(backbone, make_loader(), ["gem"], CPU, "fp32")


def test_a_rank_without_images_says_so(backbone):
    with pytest.raises(UserError, match="fewer images than ranks"):
        extract_features(backbone, Loader(), ["cls"], CPU, "fp32")


def test_an_image_that_two_ranks_read_is_noticed(backbone):
    loader = make_loader()
    with pytest.raises(AssertionError, match="twice"):
        extract_features(backbone, Loader([*loader, loader[0]]), ["cls"], CPU, "fp32")


TWO_RANKS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_features import CPU, FEATURES, Backbone, Loader, make_loader
from ssl_xcit.runtime import distributed
from ssl_xcit.evaluation.features import extract_features

torch.set_num_threads(1)
ranks = distributed.setup("cpu")
batches = make_loader()  # 3 of them: rank 0 has two, rank 1 has the short one
mine = Loader(batches[:2] if ranks.rank == 0 else batches[2:])
torch.manual_seed(0)
found = extract_features(Backbone(), mine, FEATURES, CPU, "fp32")
torch.save({kind: tuple(value) for kind, value in found.items()}, f"{sys.argv[2]}/{ranks.rank}.pt")
distributed.teardown()
"""


def test_two_ranks_each_hold_the_features_of_one_process(tmp_path):
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    forked.run_ranks(2, [sys.executable, script, Path(__file__).parent, tmp_path])
    torch.manual_seed(0)
    expected = extract_features(Backbone(), make_loader(), FEATURES, CPU, "fp32")
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        for kind, (features, labels, indices) in expected.items():
            torch.testing.assert_close(found[kind][0], features, rtol=1e-6, atol=1e-6)
            assert torch.equal(found[kind][1], labels)
            assert torch.equal(found[kind][2], indices)
