"""Linear layers against torch's in float64, which never uses oneDNN."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ssl_xcit.operators import linear as products
from ssl_xcit.operators.linear import Linear, gelu_linear, linear


@pytest.fixture(params=[False, True], ids=["oneDNN", "MKL"], autouse=True)
def intel(request, monkeypatch):
    """Pretend to run on an Intel processor or on another one, which selects the library."""
    monkeypatch.setattr(products, "made_by_intel", lambda: request.param)
    return request.param


needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN"
)


class Operators(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def operators(x, weight) -> str:
    with Operators() as seen:
        linear(x, weight)
    return " ".join(seen.names)


@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 5, 7), (2, 3, 5, 7), (1, 7), (0, 5, 7)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_output_and_gradients_agree_with_float64(shape, with_bias):
    torch.manual_seed(0)
    inputs = [torch.randn(shape), torch.randn(11, 7), torch.randn(11)][: 2 + with_bias]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out, expected = linear(*inputs), F.linear(*exact)
    assert out.shape == expected.shape
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)
    weights = torch.randn(out.shape)
    out.backward(weights)
    expected.backward(weights.double())
    for ours, theirs in zip(inputs, exact, strict=True):
        assert ours.grad.stride() == ours.stride()
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["transposed tokens", "expanded gradient", "a slice"])
def test_the_memory_layout_does_not_matter(layout):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 5, 7), torch.randn(11, 7, requires_grad=True)
    if layout == "transposed tokens":
        x = torch.randn(3, 7, 5).mT
    elif layout == "a slice":
        x = torch.randn(3, 9, 14)[:, 2:7, ::2]
    x.requires_grad_()
    out = linear(x, weight)
    expected = F.linear(x.double(), weight.double())
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)
    grad = torch.randn(3, 11, 5).mT
    if layout == "expanded gradient":
        grad = torch.ones(()).expand(3, 5, 11)
    out.backward(grad)
    expected = torch.einsum("bnd,bnc->dc", grad.double(), x.detach().double())
    torch.testing.assert_close(weight.grad.double(), expected, rtol=0, atol=1e-5)


def test_only_requested_gradients_are_computed():
    x, weight, bias = torch.randn(4, 7), torch.randn(11, 7, requires_grad=True), torch.randn(11)
    linear(x, weight, bias).sum().backward()
    assert x.grad is None
    assert bias.grad is None
    assert weight.grad is not None
    with torch.no_grad():
        assert not linear(x, weight, bias).requires_grad


@needs_onednn
def test_only_float32_on_a_cpu_that_is_not_intels_uses_onednn(intel):
    x, weight = torch.randn(4, 7), torch.randn(11, 7)
    assert ("mkldnn" in operators(x, weight)) is not intel
    for other in (x.double(), x.bfloat16(), x[:0]):
        assert "mkldnn" not in operators(other, weight.to(other.dtype))
    with torch.autocast("cpu", torch.float16):
        assert "mkldnn" not in operators(x, weight)
        assert linear(x, weight).dtype == torch.float16
    meta = x.to("meta"), weight.to("meta")
    assert "mkldnn" not in operators(*meta)


@pytest.mark.parametrize("with_bias", [True, False])
def test_under_bfloat16_autocast_numbers_are_rounded_as_in_torch(with_bias):
    torch.manual_seed(0)
    inputs = [torch.randn(3, 5, 64), torch.randn(11, 64), torch.randn(11)][: 2 + with_bias]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    rounded = [tensor.detach().bfloat16().double().requires_grad_() for tensor in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(*inputs)
    expected = F.linear(*rounded)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-5)
    grad = torch.randn(out.shape).bfloat16()
    out.backward(grad)
    expected.backward(grad.double())
    for ours, theirs in zip(inputs, rounded, strict=True):
        assert ours.grad.dtype == torch.float32
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=2**-8, atol=1e-2)


@needs_onednn
def test_torchs_flop_counter_counts_the_same_as_for_its_own_product():
    for function in (linear, F.linear):
        x, weight = torch.randn(2, 4, 7, requires_grad=True), torch.randn(11, 7, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            function(x, weight).sum().backward()
        assert counter.get_total_flops() == 3 * 2 * (2 * 4 * 7 * 11)


def test_a_layer_differs_from_torchs_only_in_the_library():
    torch.manual_seed(0)
    ours = Linear(7, 11)
    torch.manual_seed(0)
    theirs = nn.Linear(7, 11)
    assert isinstance(ours, nn.Linear)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for a, b in zip(ours.parameters(), nn.Linear(7, 11).parameters(), strict=True):
        assert a.shape == b.shape
    x = torch.randn(4, 7)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=2e-6)


@pytest.mark.parametrize("low", [False, True])
def test_gelu_linear_has_the_gradients_of_gelu_and_linear(low):
    torch.manual_seed(0)
    inputs = [torch.randn(3, 5, 16), torch.randn(11, 16), torch.randn(11)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        out = gelu_linear(*inputs)
        expected = F.linear(F.gelu(inputs[0].bfloat16() if low else inputs[0]), *inputs[1:])
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=2**-7 if low else 1e-5, atol=1e-5)
    grad = torch.randn(out.shape).to(out.dtype)
    found, theirs = (torch.autograd.grad(y, inputs, grad) for y in (out, expected))
    for a, b in zip(found, theirs, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= (0.01 if low else 1e-6) * b.norm()


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("function", [linear, gelu_linear])
def test_a_gain_multiplies_the_output_and_gets_its_gradient(function, low):
    torch.manual_seed(0)
    inputs = [torch.randn(3, 5, 16), torch.randn(11, 16), torch.randn(11), torch.rand(11) + 0.5]
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        out = function(*inputs)
        if function is linear:
            with torch.no_grad():
                assert torch.equal(function(*inputs), out)
    x, weight, bias, gain = exact
    expected = gain * F.linear(F.gelu(x) if function is gelu_linear else x, weight, bias)
    grad = torch.randn(out.shape).to(out.dtype)
    found = torch.autograd.grad(out, inputs, grad)
    theirs = torch.autograd.grad(expected, exact, grad.double())
    for ours, other in zip((out, *found), (expected, *theirs), strict=True):
        assert (ours - other).norm() <= (0.01 if low else 1e-6) * other.norm()


@pytest.mark.parametrize("with_gain", [False, True])
def test_the_gradient_of_gelu_linear_is_exact(with_gain):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5), torch.randn(5)]
    inputs = [tensor.double().requires_grad_() for tensor in inputs[: 3 + with_gain]]
    assert torch.autograd.gradcheck(gelu_linear, inputs)


def test_the_output_of_gelu_is_not_saved():
    kept = []
    x, layer = torch.randn(4, 7, requires_grad=True), Linear(7, 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gelu_linear(x, layer.weight, layer.bias)
    expected = (x, layer.weight, layer.bias)
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in expected}
