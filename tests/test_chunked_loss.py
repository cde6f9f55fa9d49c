"""The loss by chunks of prototypes: beside a loop over pairs of views, and its memory."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_dino import naive_loss

from ssl_xcit.dino.loss import DINOLoss
from ssl_xcit.dino.memory import LiveBytes
from ssl_xcit.operators.chunked_loss import Temperatures, chunked_loss
from ssl_xcit.operators.prototypes import WeightNormLinear

N, D, K = 3, 5, 17
TEMPERATURES = Temperatures(0.1, 0.05)


def problem(local=4, k=K, d=D, n=N, dtype=torch.float64, train_norm=True):
    """Unit vectors and layers of both networks, and a centre."""
    generator = torch.Generator().manual_seed(0)
    layers = [WeightNormLinear(d, k, train_norm).to(dtype) for _ in range(2)]
    for layer in layers:
        for weight in (layer.weight_v, layer.weight_g):
            weight.data.normal_(generator=generator)
    views = [2 + local, 2]
    x, tx = (
        F.normalize(torch.randn(v * n, d, generator=generator, dtype=dtype), dim=1) for v in views
    )
    center = torch.randn(1, k, generator=generator, dtype=dtype) / 10
    return x.requires_grad_(), layers[0], tx, layers[1].requires_grad_(False), center


def by_rows(x, layer):
    """Logits, a prototype at a time."""
    rows = zip(layer.weight_v, layer.weight_g, strict=True)
    return torch.stack([x @ v * (g / v.square().sum().sqrt()) for v, g in rows], dim=1)


@pytest.mark.parametrize("chunk", [1, 5, 16, 17, 1000])
@pytest.mark.parametrize("local", [0, 1, 4])
def test_loss_mean_and_gradients_are_those_of_a_loop_over_pairs_of_views(chunk, local):
    x, layer, tx, teacher, center = problem(local)
    loss, mean = chunked_loss(x, layer, tx, teacher, center, TEMPERATURES, chunk)
    wanted = x, layer.weight_v, layer.weight_g
    found = torch.autograd.grad(3 * loss, wanted)
    student_logits, teacher_logits = by_rows(x, layer), by_rows(tx, teacher)
    expected = naive_loss(
        student_logits.unflatten(0, (-1, N)), teacher_logits.unflatten(0, (2, N)), center[0],
        TEMPERATURES.student, TEMPERATURES.teacher,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mean, teacher_logits.mean(0, keepdim=True), rtol=1e-12, atol=1e-12)
    for a, b in zip(found, torch.autograd.grad(3 * expected, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_parts_of_the_views_add_up_to_the_loop():
    x, layer, tx, teacher, center = problem()
    wanted = x, layer.weight_v, layer.weight_g
    logits = by_rows(x, layer).unflatten(0, (-1, N)), by_rows(tx, teacher).unflatten(0, (2, N))
    expected = naive_loss(*logits, center[0], TEMPERATURES.student, TEMPERATURES.teacher)
    values, gradients = [], []
    for views in (range(2), range(2, 6)):
        part = x[views.start * N : views.stop * N]
        arguments = part, layer, tx, teacher, center, TEMPERATURES, 5, views, 6
        values.append(chunked_loss(*arguments)[0])
        gradients.append(torch.autograd.grad(values[-1], wanted))
    torch.testing.assert_close(sum(values), expected, rtol=1e-12, atol=1e-12)
    for *parts, whole in zip(*gradients, torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(sum(parts), whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("local", [0, 2])
def test_it_passes_gradcheck(local):
    x, layer, tx, teacher, center = problem(local)

    def loss(x, v, g):
        layer.trained_weights = lambda: (v, g)
        return chunked_loss(x, layer, tx, teacher, center, TEMPERATURES, 6)[0]

    assert torch.autograd.gradcheck(loss, (x, layer.weight_v, layer.weight_g))


def test_under_autocast_it_is_the_loss_of_the_same_rounded_products():
    x, layer, tx, teacher, center = problem(dtype=torch.float32, d=64, k=512)
    with torch.autocast("cpu", torch.bfloat16):
        loss, mean = chunked_loss(x, layer, tx, teacher, center, TEMPERATURES, 100)
        whole = DINOLoss(512, TEMPERATURES.student)
        whole.center = center
        expected = whole(layer(x), teacher(tx), TEMPERATURES.teacher)
    assert loss.dtype == mean.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    found, theirs = (torch.autograd.grad(value, (x, layer.weight_v)) for value in (loss, expected))
    for a, b in zip(found, theirs, strict=True):
        assert (a - b).norm() < 0.01 * b.norm()


def test_logits_far_from_zero_stay_finite():
    x, layer, tx, teacher, center = problem(dtype=torch.float32)
    for module in (layer, teacher):
        module.weight_g.data *= 1e4
    loss, _ = chunked_loss(x, layer, tx, teacher, center, TEMPERATURES, 4)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (x, layer.weight_v)))


def test_frozen_prototypes_get_no_gradient_and_leave_the_others_alone():
    x, layer, tx, teacher, center = problem()
    free = torch.autograd.grad(
        chunked_loss(x, layer, tx, teacher, center, TEMPERATURES, 4)[0], (x,)
    )
    layer.frozen = True
    chunked_loss(x, layer, tx, teacher, center, TEMPERATURES, 4)[0].backward()
    assert layer.weight_v.grad is None
    assert layer.weight_g.grad is None
    assert torch.equal(x.grad, free[0])


def test_memory_does_not_grow_with_the_number_of_prototypes():
    def peak(k, chunk):
        x, layer, tx, teacher, center = problem(8, k, 16, 8, torch.float32, train_norm=False)
        layer.frozen = True
        held = copy.copy([x, *layer.parameters(), tx, *teacher.parameters(), center])
        with LiveBytes(held) as live:
            loss, _ = chunked_loss(x, layer, tx, teacher, center, TEMPERATURES, chunk)
            loss.backward()
        return live.peak

    rows, by_prototype = 80, 4 * 8  # floats for each prototype: lengths, scales, the mean
    grown = peak(8192, 256) - peak(1024, 256)
    assert grown <= by_prototype * (8192 - 1024)
    assert peak(8192, 8192) - peak(1024, 1024) > 4 * rows * (8192 - 1024)  # whole logits do
