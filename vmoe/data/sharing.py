"""Splits evaluation over ranks in whole batches, so that every image has the same batch as on one rank."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from vmoe.data.loading import Batch

NOT_COUNTED = -1  # label of images that another rank counts


def part_of_batches(order: list[int], batch_size: int, part: int, parts: int) -> tuple[list[int], int]:
    """The images of every `parts`-th batch, and the number of those batches that this rank counts.

    All ranks get the same number of batches, since they may have to compute together. A rank that would have one batch
    less gets the set's first batch again, which is not counted.
    """
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    own = batches[part::parts]
    filling = batches[:1] if len(own) < -(-len(batches) // parts) else []
    return [index for batch in own + filling for index in batch], len(own)


class OrderedLoader:
    """A loader that is no DataLoader, so that Lightning does not replace its sampler.

    Args:
        loader: The loader of batches.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.batch_sampler = getattr(loader, "batch_sampler", None)  # Lightning sets its epoch

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.loader)


class FilledLoader:
    """A loader that sets the label `NOT_COUNTED` in all batches after the first `counted` ones.

    Args:
        loader: The loader of batches.
        counted: Number of batches that this rank counts.
    """

    def __init__(self, loader: Iterable[Batch], counted: int) -> None:
        self.loader, self.counted = loader, counted

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(self.loader):
            yield batch if number < self.counted else _not_counted(batch)


def _not_counted(batch: Batch) -> Batch:
    return batch._replace(labels=torch.full_like(batch.labels, NOT_COUNTED))
