"""BatchNorm over ranks. Oracle: torch's BatchNorm on the whole batch in one process."""

import sys
from pathlib import Path

import forked
import pytest
import torch
from torch import nn

from ssl_xcit.operators.sync_batchnorm import CpuSyncBatchNorm, synchronise_batchnorm

SPLITS = {2: [3, 5], 4: [1, 2, 2, 3]}  # images per rank, different numbers


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.GELU(),
        nn.Conv2d(6, 4, 3, bias=False),  # a bias would have a gradient of 0 up to rounding
        nn.Flatten(),
        nn.BatchNorm1d(64),
    )
    with torch.no_grad():
        for module in (model[1], model[5]):
            module.weight.uniform_(0.5, 2)
            module.bias.uniform_(-1, 1)
    return model.to(dtype)


def batch(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    images = 0.5 + torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64)
    return images.to(dtype).contiguous(memory_format=torch.channels_last)


def loss_of(outputs: torch.Tensor) -> torch.Tensor:
    """A sum over samples with different weights per sample and output."""
    weights = torch.linspace(-1, 1, outputs.shape[1], dtype=outputs.dtype)
    return (outputs.sin() @ weights).square().sum()


def results(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    images = images.clone().requires_grad_()
    for _ in range(2):  # update the running statistics twice
        outputs = model(images)
    loss_of(outputs).backward()
    gradients = {f"grad/{name}": p.grad for name, p in model.named_parameters()}
    return {
        "outputs": outputs.detach(),
        "grad/images": images.grad,
        **gradients,
        **dict(model.named_buffers()),
    }


RANK = """
import sys, torch
import torch.distributed as dist
from test_sync_batchnorm import SPLITS, batch, network, results
from ssl_xcit.runtime import distributed
from ssl_xcit.operators.sync_batchnorm import synchronise_batchnorm

torch.set_num_threads(1)
ranks = distributed.setup("cpu")
for name in ("float32", "float64"):
    dtype = getattr(torch, name)
    model = synchronise_batchnorm(network(dtype), ranks.device)
    found = results(model, batch(dtype).split(SPLITS[ranks.world_size])[ranks.rank])
    for key in found:
        if key.startswith("grad/") and key != "grad/images":
            dist.all_reduce(found[key])  # the loss is a sum over samples
    torch.save(found, f"{sys.argv[1]}/{name}_{ranks.rank}.pt")
distributed.teardown()
"""


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_compute_what_one_process_computes_on_the_whole_batch(tmp_path, world):
    forked.run_ranks(world, [sys.executable, "-c", RANK, tmp_path], cwd=Path(__file__).parent)
    for name, tolerance in (("float32", 1e-5), ("float64", 1e-10)):
        dtype = getattr(torch, name)
        expected = results(network(dtype), batch(dtype))
        found = [torch.load(tmp_path / f"{name}_{rank}.pt") for rank in range(world)]
        for key, tensor in expected.items():
            if key in ("outputs", "grad/images"):
                merged = torch.cat([ranks[key] for ranks in found])
                torch.testing.assert_close(
                    merged, tensor, rtol=0, atol=tolerance * tensor.abs().max()
                )
                continue
            for ranks in found:
                scale = max(1.0, float(tensor.abs().max()))
                torch.testing.assert_close(ranks[key], tensor, rtol=0, atol=tolerance * scale)


def test_conversion_keeps_parameters_buffers_names_and_mode():
    model = network(torch.float32).eval()
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    converted = synchronise_batchnorm(model, torch.device("cpu"))
    after = {**dict(converted.named_parameters()), **dict(converted.named_buffers())}
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert [type(m) is CpuSyncBatchNorm for m in converted] == [
        False,
        True,
        False,
        False,
        False,
        True,
    ]
    assert not any(module.training for module in converted.modules())


def test_in_one_process_and_in_evaluation_it_equals_torchs_batchnorm():
    images = batch(torch.float32)
    plain, other = network(torch.float32), network(torch.float32)
    synchronise_batchnorm(other, torch.device("cpu"))
    for mode in (True, False):
        assert torch.equal(plain.train(mode)(images), other.train(mode)(images))
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), other.buffers(), strict=True))
