"""Schedules against numpy tables built from DINO's description, element by element."""

import numpy as np
import pytest

from ssl_xcit.training.schedules import cosine, scaled_lr, teacher_temp


def cosine_table(base, final, total, warmup, start):
    """Warm-up with both ends included, then N points of the cosine, k = 0 .. N - 1."""
    ramp = np.linspace(start, base, warmup) if warmup else np.array([])
    k = np.arange(total - warmup)
    decay = final + (base - final) / 2 * (1 + np.cos(np.pi * k / max(len(k), 1)))
    return np.concatenate([ramp, decay])


@pytest.mark.parametrize(
    ("base", "final", "total", "warmup", "start"),
    [
        (5e-4, 1e-6, 1000, 100, 0.0),  # learning rate
        (2e-3, 1e-6, 37, 10, 1e-5),
        (0.04, 0.4, 500, 0, 0.0),  # weight decay, which increases
        (0.996, 1.0, 731, 0, 0.0),  # teacher momentum
        (1e-3, 1e-6, 12, 1, 0.0),  # a warm-up of one step is `start`
        (1e-3, 1e-6, 12, 2, 0.0),
        (1e-3, 1e-6, 12, 11, 0.0),
        (1e-3, 1e-6, 12, 12, 0.0),  # all warm-up
        (1e-3, 1e-6, 1, 0, 0.0),
    ],
)
def test_cosine_equals_the_official_table_element_by_element(base, final, total, warmup, start):
    ours = [cosine(step, base, final, total, warmup, start) for step in range(total)]
    np.testing.assert_allclose(ours, cosine_table(base, final, total, warmup, start), rtol=4e-15)


def test_warm_up_is_bit_equal_to_numpys_linspace():
    for warmup in (1, 2, 3, 7, 10, 1251):
        ours = [cosine(step, 5e-4, 1e-6, 2000, warmup) for step in range(warmup)]
        assert ours == np.linspace(0.0, 5e-4, warmup).tolist()


def test_learning_rate_starts_at_zero_has_its_peak_twice_and_stops_short_of_the_final_value():
    values = [cosine(step, 1.0, 0.1, 100, 10) for step in range(100)]
    assert values[0] == 0.0
    assert values[8] < values[9] == values[10] == 1.0 > values[11]
    assert 0.1 < values[-1] < 0.101


@pytest.mark.parametrize("total", [1, 2, 5])
def test_a_warm_up_longer_than_the_run_is_shortened_to_the_run(total):
    ours = [cosine(step, 1e-3, 1e-6, total, warmup_steps=10) for step in range(total)]
    np.testing.assert_allclose(ours, np.linspace(0.0, 1e-3, total), rtol=1e-15)


@pytest.mark.parametrize("warmup_epochs", [0, 1, 2, 30])
def test_teacher_temperature_equals_the_official_per_epoch_table(warmup_epochs):
    table = np.concatenate(
        [np.linspace(0.04, 0.07, warmup_epochs), np.full(100 - warmup_epochs, 0.07)]
    )
    ours = [teacher_temp(epoch, 0.04, 0.07, warmup_epochs, 100) for epoch in range(100)]
    assert ours == table.tolist()


def test_teacher_temperature_warm_up_of_a_short_run_is_shortened():
    cut = [teacher_temp(epoch, 0.04, 0.07, 30, epochs=10) for epoch in range(10)]
    assert cut == np.linspace(0.04, 0.07, 10).tolist()


def test_learning_rate_scales_linearly_from_256_images():
    assert scaled_lr(5e-4, 256) == 5e-4
    assert scaled_lr(5e-4, 1024) == 2e-3
    assert scaled_lr(5e-4, 64) == 1.25e-4


@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_outside_the_run_is_a_bug(step):
    with pytest.raises(AssertionError):
        cosine(step, 1.0, 0.0, 10)
