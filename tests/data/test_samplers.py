"""The order of training."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vmoe.data import EpochBatchSampler
from vmoe.data.samplers import Balanced

sizes = {"length": st.integers(1, 200), "batch_size": st.integers(1, 64), "seed": st.integers(0, 2**32 - 1)}


@settings(deadline=None)
@given(**sizes, epoch=st.integers(0, 1000))
def test_an_epoch_is_a_permutation_in_full_batches(length, batch_size, seed, epoch):
    sampler = EpochBatchSampler(length, batch_size, seed)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    size = min(batch_size, length)
    assert len(batches) == len(sampler) == length // size
    assert all(len(batch) == size for batch in batches)
    indices = [index for batch in batches for _, index in batch]
    assert len(set(indices)) == len(indices) and set(indices) <= set(range(length))
    assert {seen for batch in batches for seen, _ in batch} == {epoch}


@settings(deadline=None)
@given(**sizes, epoch=st.integers(0, 1000), start=st.integers(0, 200))
def test_a_resume_gives_the_tail_once(length, batch_size, seed, epoch, start):
    sampler = EpochBatchSampler(length, batch_size, seed)
    sampler.set_epoch(epoch)
    whole = list(sampler)
    resumed = EpochBatchSampler(length, batch_size, seed)
    resumed.start_batch = start
    resumed.set_epoch(epoch)
    assert len(resumed) == len(sampler)
    assert list(resumed) == whole[start:]
    assert list(resumed) == whole


def test_epochs_and_seeds_differ():
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        sampler = EpochBatchSampler(100, 10, seed)
        sampler.set_epoch(epoch)
        orders.append([index for batch in sampler for _, index in batch])
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_epoch_and_start_are_read_with_the_first_batch():
    """Lightning makes the iterator, then sets the epoch, then takes the first batch."""
    sampler = EpochBatchSampler(100, 10, 0)
    iterator = iter(sampler)
    sampler.set_epoch(3)
    sampler.start_batch = 2
    expected = EpochBatchSampler(100, 10, 0)
    expected.set_epoch(3)
    assert list(iterator) == list(expected)[2:]


def test_an_epoch_of_several_passes():
    sampler = EpochBatchSampler(10, 4, 7, repeat=3)
    sampler.set_epoch(2)
    assert len(sampler) == 7  # 30 images
    keys = [key for batch in sampler for key in batch]
    assert [number for number, _ in keys] == [6] * 10 + [7] * 10 + [8] * 8
    assert sorted(index for _, index in keys[:10]) == sorted(index for _, index in keys[10:20]) == list(range(10))
    assert keys[:10] != [(6, index) for _, index in keys[10:20]]


def test_parts_of_a_batch_are_contiguous_and_together_the_batch():
    whole = list(EpochBatchSampler(20, 8, seed=3, repeat=2))
    parts = [list(EpochBatchSampler(20, 8, seed=3, repeat=2, part=part, parts=4)) for part in range(4)]
    assert len(whole) == 5 and all(len(part) == 5 for part in parts)
    assert [[key for part in parts for key in part[number]] for number in range(5)] == whole


def balanced(batch_size=9, epoch=0, **options):
    labels = np.repeat(np.arange(5), [60, 25, 10, 4, 1])
    sampler = EpochBatchSampler(len(labels), batch_size, 3, groups=Balanced(labels), **options)
    sampler.set_epoch(epoch)
    return sampler, labels


def test_class_balanced_epochs_give_every_class_as_often_and_no_key_twice():
    seen = []
    for epoch in range(6):
        sampler, labels = balanced(batch_size=10, epoch=epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) == 10
        for batch in batches:  # two rounds of five classes
            assert sorted(labels[index] for _, index in batch) == sorted([*range(5)] * 2)
        seen += [key for batch in batches for key in batch]
    assert len(set(seen)) == len(seen) == 600
    of_last, of_first = ([key for key in seen if labels[key[1]] == label] for label in (4, 0))
    assert sorted(of_last) == [(number, 99) for number in range(120)]  # its one image, in a pass of its own each time
    assert {index for number, index in of_first if number == 0} == set(range(60))  # all of them before any comes again


def test_class_balanced_batches_are_resumed_shared_and_differ_between_epochs():
    whole = list(balanced(batch_size=10, epoch=2)[0])
    resumed, _ = balanced(batch_size=10, epoch=2)
    resumed.start_batch = 4
    assert list(resumed) == whole[4:]
    halves = [list(balanced(batch_size=10, epoch=2, part=part, parts=2)[0]) for part in (0, 1)]
    assert [first + second for first, second in zip(*halves, strict=True)] == whole
    assert [index for batch in list(balanced(10, 3)[0]) for _, index in batch] != [
        index for batch in whole for _, index in batch
    ]
