"""Random numbers without a state: a hash of (seed, epoch, index, draw), computed in integers on the keys' device.

The hash is splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), with one round
per key. 64-bit products wrap around on CPUs and GPUs, so both give the same numbers.
"""

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """`value` modulo 2**64, as a torch int64."""
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value


_STEP = _signed(0x9E3779B97F4A7C15)
_FACTORS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
_BITS = 24  # bits of a number, which a float32 holds exactly

# Stored in checkpoints, and raised when the same keys give other numbers. A resumed run then warns that draws change.
DRAWS_VERSION = 2


def draw_numbers(count: int, first: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """The numbers of draws `first`, `first` + 1, ... in the hash, (count, 1) int64, for `uniforms`.

    Do not call it in compiled code: a compiler would fold these products into an index, which overflows.
    """
    return torch.arange(first + 1, first + count + 1, device=device)[:, None] * _STEP


def uniforms(seed: int, keys: Tensor, numbers: Tensor) -> Tensor:
    """One draw per key and number.

    Args:
        seed: The seed, not negative.
        keys: (B, 2) int64: epoch and index of each image.
        numbers: (count, 1), see `draw_numbers`. Independent draws for one image need different numbers.

    Returns:
        (count, B) float32, uniform in [0, 1), a function of (seed, epoch, index, number) alone.
    """
    epochs, indices = keys.unbind(1)
    # one round per key: a sum of keys would give epoch 1 of seed 0 the numbers of epoch 0 of seed 1
    state = _scramble(epochs * _STEP + 1)
    state = _scramble(state + _signed(seed * _STEP))
    state = _scramble(state + indices * _STEP)
    bits = _scramble(state + numbers)
    return _shift(bits, 64 - _BITS).float() * 2.0**-_BITS


def _scramble(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _FACTORS[0]
    x = (x ^ _shift(x, 27)) * _FACTORS[1]
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right. torch's own is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
