"""Evaluation by several processes, each with whole batches, so that every image is seen among the same others."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from vmoe.data.loading import Batch

NOT_COUNTED = -1  # label of images that another process counts


def part_of_batches(order: list[int], batch_size: int, part: int, parts: int) -> tuple[list[int], int]:
    """The images of every `parts`-th batch, and how many of those batches this process counts.

    All processes get equally many batches, since they may have to compute together. One that would have one batch less
    gets the set's first again, which is not counted.
    """
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    own = batches[part::parts]
    filling = batches[:1] if len(own) < -(-len(batches) // parts) else []
    return [index for batch in own + filling for index in batch], len(own)


class OrderedLoader:
    """A loader that Lightning leaves as it is, since it is no DataLoader: its order and its ranks are its own.

    Args:
        loader: Gives batches.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.batch_sampler = getattr(loader, "batch_sampler", None)  # of which Lightning sets the epoch

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.loader)


class FilledLoader:
    """A loader that gives all batches after the first `counted` ones the label `NOT_COUNTED`.

    Args:
        loader: Gives batches.
        counted: How many of them this process counts.
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
