"""Evaluation by several processes: whole batches, every image counted once."""

import pytest

from vmoe.data import DataConfig, ImageDataModule
from vmoe.data.config import SubsetConfig
from vmoe.data.sharing import NOT_COUNTED, part_of_batches


def test_every_batch_belongs_to_one_process_and_all_have_equally_many():
    parts = [part_of_batches(list(range(10)), 4, part, 2) for part in range(2)]
    assert parts == [([0, 1, 2, 3, 8, 9], 2), ([4, 5, 6, 7, 0, 1, 2, 3], 1)]


def test_a_set_of_fewer_batches_than_processes():
    parts = [part_of_batches([5, 6, 7], 4, part, 3) for part in range(3)]
    assert parts == [([5, 6, 7], 1), ([5, 6, 7], 0), ([5, 6, 7], 0)]


@pytest.mark.parametrize("pipeline", ["workers", "device"])
@pytest.mark.parametrize("loader", ["val_dataloader", "test_dataloader", "train_eval_dataloader"])
def test_the_parts_together_are_the_whole(pipeline, loader):
    config = DataConfig(batch_size=32, eval_batch_size=64, pipeline=pipeline, subset=SubsetConfig(per_class=30))
    whole = _batches(ImageDataModule(config, seed=0), loader)
    parts = [_batches(ImageDataModule(config, seed=0, part=part, parts=3), loader) for part in range(3)]
    assert len({len(part) for part in parts}) == 1
    for number, batch in enumerate(whole):
        own = parts[number % 3][number // 3]
        assert own.images.equal(batch.images) and own.labels.equal(batch.labels)
    assert sum((batch.labels != NOT_COUNTED).sum() for part in parts for batch in part) == sum(
        len(batch.labels) for batch in whole
    )


def _batches(data: ImageDataModule, loader: str) -> list:
    data.setup()
    return list(getattr(data, loader)())
