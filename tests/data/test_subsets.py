"""Stratified choices: exact counts, determinism, nesting."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmoe.data import SubsetConfig
from vmoe.data.subsets import choose_training, find_classes, split
from vmoe.errors import UserError

NAMES = [f"class {index}" for index in range(6)]
label_arrays = st.lists(st.integers(0, 5), min_size=1, max_size=200).map(np.array)
fractions = st.floats(0.01, 0.99)
seeds = st.integers(0, 2**32 - 1)


def counts(labels):
    return np.bincount(labels, minlength=6)


@settings(deadline=None)
@given(label_arrays, fractions, seeds)
def test_split_is_a_stratified_partition(labels, fraction, seed):
    kept, cut = split(labels, fraction, seed)
    assert sorted([*kept, *cut]) == list(range(len(labels)))
    for size, taken in zip(counts(labels), counts(labels[cut]), strict=True):
        rounded = int(fraction * size + 0.5)
        assert taken == (min(max(rounded, 1), size - 1) if size else 0)


@settings(deadline=None)
@given(label_arrays, fractions, fractions, seeds)
def test_fractions_are_exact_repeatable_and_nested(labels, one, other, seed):
    small, large = (
        choose_training(labels, SubsetConfig(fraction=fraction), NAMES, seed) for fraction in sorted((one, other))
    )
    for size, taken in zip(counts(labels), counts(labels[small]), strict=True):
        assert taken == (max(1, int(min(one, other) * size + 0.5)) if size else 0)
    assert set(small) <= set(large)
    assert np.array_equal(small, choose_training(labels, SubsetConfig(fraction=min(one, other)), NAMES, seed))


@settings(deadline=None)
@given(st.integers(1, 10), seeds)
def test_per_class_is_exact(wanted, seed):
    labels = np.arange(60) % 6
    chosen = choose_training(labels, SubsetConfig(per_class=wanted), NAMES, seed)
    assert counts(labels[chosen]).tolist() == [wanted] * 6
    assert (np.diff(chosen) > 0).all()


def test_another_seed_chooses_other_images():
    labels = np.zeros(1000, dtype=int)
    one, other = (choose_training(labels, SubsetConfig(fraction=0.5), NAMES, seed) for seed in (0, 1))
    assert not np.array_equal(one, other)


def test_all_of_it_is_all_of_it():
    labels = np.arange(60) % 6
    for config in (SubsetConfig(), SubsetConfig(fraction=1.0)):
        assert choose_training(labels, config, NAMES, 0).tolist() == list(range(60))


def test_too_many_a_class_names_the_short_one():
    labels = np.array([0] * 9 + [1] * 4)
    with pytest.raises(UserError, match="per_class=5: class 'bee' has only 4 training images"):
        choose_training(labels, SubsetConfig(per_class=5), ["ant", "bee"], 0)


def test_classes_by_name_and_index_in_the_order_given():
    assert find_classes(["cow", 0, "1"], ["ant", "bee", "cow"]) == [2, 0, 1]
    assert find_classes(["3", 1], ["1", "3"]) == [1, 0]  # a name wins over an index
    with pytest.raises(UserError, match="no class '01' in this data set"):
        find_classes(["01"], ["ant", "bee", "cow"])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["bees"], "no class 'bees' in this data set; did you mean 'bee'?"),
        ([7], "no class 7 in this data set; the 3 classes are ant, bee, cow"),
        ([-1], "no class -1"),
        (["ant", 0], "class 'ant' is given twice"),
    ],
)
def test_wrong_classes(wanted, message):
    with pytest.raises(UserError) as caught:
        find_classes(wanted, ["ant", "bee", "cow"])
    assert message in str(caught.value)


def test_a_long_tail_falls_exponentially_to_its_ratio():
    """CIFAR-100's usual one: 10,847 of 50,000 images at a ratio of 100."""
    labels = np.arange(50_000) % 100
    names = [str(label) for label in range(100)]
    chosen = choose_training(labels, SubsetConfig(imbalance=100), names, seed=0)
    sizes = np.bincount(labels[chosen])
    assert (sizes[0], sizes[50], sizes[-1], len(chosen)) == (500, 48, 5, 10_847)
    steeper = choose_training(labels, SubsetConfig(imbalance=200), names, seed=0)
    assert set(steeper) < set(chosen)
