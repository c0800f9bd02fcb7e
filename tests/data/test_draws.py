"""Random numbers by a hash of their keys."""

import numpy as np
import pytest
import torch
from scipy import stats

from vmoe.data.draws import draw_numbers, uniforms

WORD = 2**64
STEP = 0x9E3779B97F4A7C15


def keys_of(epochs, indices):
    return torch.stack([torch.as_tensor(epochs), torch.as_tensor(indices)], dim=1)


def by_whole_numbers(seed, epoch, index, draw):
    """The definition, in Python's unbounded integers."""

    def scramble(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % WORD
        x = (x ^ x >> 27) * 0x94D049BB133111EB % WORD
        return x ^ x >> 31

    state = scramble((epoch * STEP + 1) % WORD)
    state = scramble((state + seed * STEP) % WORD)
    state = scramble((state + index * STEP) % WORD)
    return (scramble((state + (draw + 1) * STEP) % WORD) >> 40) / 2**24


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_numbers_follow_their_definition(seed):
    found = uniforms(seed, keys_of([0, 3, 500], [49_999, 0, 123_456_789]), draw_numbers(3, 1000))
    for draw in range(3):
        for place, (epoch, index) in enumerate([(0, 49_999), (3, 0), (500, 123_456_789)]):
            assert found[draw, place].item() == by_whole_numbers(seed, epoch, index, 1000 + draw)


def test_a_key_has_its_numbers_in_any_batch():
    keys = keys_of(torch.arange(200) % 7, torch.randperm(200, generator=torch.Generator().manual_seed(0)))
    whole = uniforms(3, keys, draw_numbers(6))
    assert torch.equal(uniforms(3, keys[50:61], draw_numbers(6)), whole[:, 50:61])
    assert torch.equal(uniforms(3, keys[5:6], draw_numbers(6)), whole[:, 5:6])
    assert torch.equal(uniforms(3, keys.flip(0), draw_numbers(2, 3)), whole[3:5].flip(1))


def test_numbers_are_uniform_and_neighbours_tell_nothing_of_each_other():
    numbers = (
        uniforms(0, keys_of(torch.arange(40_000) // 200, torch.arange(40_000) % 200), draw_numbers(4)).double().numpy()
    )
    assert numbers.min() >= 0 and numbers.max() < 1
    for draw in numbers:
        assert stats.kstest(draw, "uniform").pvalue > 1e-3
    others = (
        uniforms(1, keys_of(torch.arange(40_000) // 200, torch.arange(40_000) % 200), draw_numbers(1)).double().numpy()
    )
    pairs = [*numbers, others[0], np.roll(numbers[0], 1), np.roll(numbers[0], 200)]  # next draw, seed, index, epoch
    correlation = np.corrcoef(pairs) - np.eye(len(pairs))
    assert abs(correlation).max() < 5 / np.sqrt(40_000)


def test_seeds_and_epochs_have_numbers_of_their_own():
    # 6 seeds x 6 epochs of 4,000 images: every pair of (seed, epoch) is uncorrelated, also where the sums are equal.
    images = torch.arange(4_000)
    rows = [
        uniforms(seed, keys_of(torch.full_like(images, epoch), images), draw_numbers(1))[0].double().numpy()
        for seed in range(6)
        for epoch in range(6)
    ]
    correlation = np.corrcoef(rows) - np.eye(len(rows))
    assert abs(correlation).max() < 5 / np.sqrt(4_000)
    for row in rows:
        assert stats.kstest(row, "uniform").pvalue > 1e-4
