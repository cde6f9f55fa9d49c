"""Counter-based random numbers: the same key gives the same draw, on any device, in any order.

A draw is a pure function of (seed, epoch, image index, view, counter). So an image's augmentation
and drop-path branches do not depend on the number of workers, ranks or micro-batches, and a resumed
run replays nothing. There is no state, and nothing to save in a checkpoint.

The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast Splittable
Pseudorandom Number Generators", OOPSLA 2014), on 64-bit integers that wrap around:

    mix(z):  z += 0x9E3779B97F4A7C15
             z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9
             z = (z ^ z >> 27) * 0x94D049BB133111EB
             return z ^ z >> 31
    sample_key(seed, epoch, index) = mix(mix(mix(seed) ^ epoch) ^ index)
    view_key(k, view)              = mix(k ^ mix(view + 1))
    draw c of key k                = mix(k ^ mix(c)), its top bits as a fraction

torch has no unsigned 64-bit arithmetic, so tensors hold the same bits as signed integers.
"""

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

# The one numbering of random streams. Crop v of an image draws from view v; what else is drawn for
# it draws from views numbered from here on, for each crop one.
DROP_PATH, MIXING, RANDAUGMENT, ERASING = 1_000, 2_000, 3_000, 4_000
SPLIT = 1_000_000  # which images are held out

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def mix64(z: Int64[Tensor, "*n"]) -> Int64[Tensor, "*n"]:
    """SplitMix64's finaliser, elementwise; the int64 bits are those of the uint64 result."""
    z = z + _signed(_GOLDEN)
    z = (z ^ _shift(z, 30)) * _signed(_FIRST)
    z = (z ^ _shift(z, 27)) * _signed(_SECOND)
    return z ^ _shift(z, 31)


def stream(seed: int, epoch: int, indices: Int64[Tensor, "n"], view: int) -> Int64[Tensor, "n"]:
    """Keys of the images `indices` (their places in the dataset) in one epoch and view.

    Seed, epoch and view are taken modulo 2**64. The keys are on the device of `indices`.
    """
    keys = mix64(indices ^ _signed(_mix(_mix(seed) ^ (epoch & _MASK))))
    return mix64(keys ^ _signed(_mix(view + 1)))


def uniform(
    keys: Int64[Tensor, "*n"], counter: int | Int64[Tensor, "..."]
) -> Float32[Tensor, "..."]:
    """Draw number `counter` of every key: float32 in [0, 1), a multiple of 2**-24.

    A tensor of counters broadcasts against the keys: counters (c, 1) and keys (n,) give (c, n).
    """
    mixed = _signed(_mix(counter)) if isinstance(counter, int) else mix64(counter)
    return _shift(mix64(keys ^ mixed), 40).to(torch.float32) * 2.0**-24


def _shift(z: Int64[Tensor, "*n"], bits: int) -> Int64[Tensor, "*n"]:
    """Logical right shift: torch's own shift copies the sign bit, which the mask clears."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: int) -> int:
    """`mix64` of one Python integer, unsigned: a scalar needs no tensor and no copy to a device."""
    z = (z + _GOLDEN) & _MASK
    z = ((z ^ z >> 30) * _FIRST) & _MASK
    z = ((z ^ z >> 27) * _SECOND) & _MASK
    return z ^ z >> 31


def _signed(z: int) -> int:
    """The signed integer with the bits of the unsigned 64-bit `z`."""
    return z - (1 << 64) if z >> 63 else z
