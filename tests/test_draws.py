"""Draws are pure functions of (seed, epoch, index, view, counter). Oracle: Python's integers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_xcit.runtime.draws import mix64, stream, uniform

WORD = (1 << 64) - 1
uint64 = st.integers(0, WORD)


def mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z // 2**30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z // 2**27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z // 2**31)


def key(seed: int, epoch: int, index: int, view: int) -> int:
    return mix(mix(mix(mix(seed) ^ epoch) ^ index) ^ mix(view + 1))


def draw(key: int, counter: int) -> float:
    return (mix(key ^ mix(counter)) // 2**40) / 2**24


def int64(values: list[int]) -> torch.Tensor:
    return torch.tensor([v - 2**64 if v >= 2**63 else v for v in values])


def test_mix64_gives_the_published_outputs_of_splitmix64():
    golden = 0x9E3779B97F4A7C15  # the generator of seed s returns mix(s), mix(s + golden), ...
    states = int64([(1234567 + i * golden) % 2**64 for i in range(5)])
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert torch.equal(mix64(states), int64(expected))


@given(st.lists(uint64, min_size=1, max_size=8))
def test_mix64_equals_the_arithmetic_of_unsigned_integers(values):
    assert torch.equal(mix64(int64(values)), int64([mix(v) for v in values]))


@given(uint64, st.integers(0, 10**6), st.integers(0, 2**40), st.integers(0, 100), uint64)
def test_keys_and_draws_follow_their_definition(seed, epoch, index, view, counter):
    keys = stream(seed, epoch, torch.tensor([index]), view)
    assert torch.equal(keys, int64([key(seed, epoch, index, view)]))
    expected = draw(key(seed, epoch, index, view), counter)
    assert uniform(keys, counter).item() == expected
    assert uniform(keys, int64([counter])).item() == expected


def test_an_image_has_the_same_key_wherever_it_is_in_the_batch():
    indices = torch.randperm(1_281_167)[:1000]
    order = torch.randperm(1000)
    assert torch.equal(stream(3, 7, indices[order], 1), stream(3, 7, indices, 1)[order])


def test_seed_epoch_image_and_view_each_change_all_draws():
    indices = torch.arange(500)
    runs = [stream(*run, indices, view) for run in ((0, 0), (1, 0), (0, 1)) for view in range(10)]
    draws = torch.cat([uniform(keys, counter) for keys in runs for counter in range(3)])
    assert torch.cat(runs).unique().numel() == 30 * 500
    # Of 45,000 draws from 2**24 values about 60 pairs coincide; a lost argument makes 15,000.
    assert draws.unique().numel() > 44_800


def test_a_tensor_of_counters_broadcasts_against_the_keys():
    keys, counters = stream(0, 0, torch.arange(5), 0), torch.arange(6).view(2, 3, 1)
    table = uniform(keys, counters)
    assert table.shape == (2, 3, 5)
    for c in range(6):
        assert torch.equal(table.view(6, 5)[c], uniform(keys, c))


def test_draws_are_uniform_float32_below_one():
    draws = uniform(stream(0, 0, torch.arange(2000), 0), torch.arange(50)[:, None]).flatten()
    assert draws.dtype == torch.float32
    assert draws.min() >= 0
    assert draws.max() < 1
    n = draws.numel()
    counts = torch.histc(draws, bins=100, min=0, max=1)
    chi_square = ((counts - n / 100) ** 2 / (n / 100)).sum()
    assert 50 < chi_square < 160  # 99 degrees of freedom: outside once in 10,000
    by_counter = draws.view(50, 2000)
    assert torch.corrcoef(by_counter).fill_diagonal_(0).abs().max() < 0.12  # 5 sigma


def test_the_largest_word_gives_the_float_before_one_and_the_smallest_gives_zero():
    def unmix(z: int) -> int:
        z ^= z >> 31 ^ z >> 62
        z = z * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
        z ^= z >> 27 ^ z >> 54
        z = z * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64
        z ^= z >> 30 ^ z >> 60
        return (z - 0x9E3779B97F4A7C15) % 2**64

    keys = int64([unmix(WORD) ^ mix(9), unmix(0) ^ mix(9)])
    assert uniform(keys, 9).tolist() == [1 - 2**-24, 0.0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_draws_the_same_numbers():
    indices = torch.arange(10_000)
    keys = stream(5, 2, indices, 3)
    assert torch.equal(stream(5, 2, indices.cuda(), 3).cpu(), keys)
    assert torch.equal(uniform(keys.cuda(), 4).cpu(), uniform(keys, 4))
