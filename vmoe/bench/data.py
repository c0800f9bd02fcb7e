"""Benchmark of a data pipeline by itself: how many images/s its loader hands over."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from vmoe.bench.report import Column

COLUMNS = (
    Column("workers", "workers"),
    Column("first batch s", "first_batch_seconds", ".2f"),
    Column("images/s", "images_per_second", ",.0f"),
    Column("of the model's", "share_of_model", ".2f"),
    Column("training is bound by", "bound_by"),
)


@dataclass(frozen=True)
class LoaderRate:
    """How fast a loader was.

    Attributes:
        first_batch_seconds: Until the first batch, the start of worker processes included.
        images_per_second: From then on.
        images: That were counted.
    """

    first_batch_seconds: float
    images_per_second: float
    images: int


def loader_rate(loader: Iterable, seconds: float, ahead: int) -> LoaderRate:
    """Reads batches, from the start again after the last one, for some time.

    Args:
        loader: Yields batches whose first field holds the images, (B, ...).
        seconds: How long to count; at least one batch is counted.
        ahead: Batches that may have been prepared before the counting begins, and are not counted.
    """
    start = time.perf_counter()
    batches = _endless(loader)
    next(batches)
    first = time.perf_counter() - start
    for _ in range(ahead):
        next(batches)
    images, start = 0, time.perf_counter()
    while not images or time.perf_counter() - start < seconds:
        images += len(next(batches)[0])
    return LoaderRate(first, images / (time.perf_counter() - start), images)


def _endless(loader: Iterable) -> Iterator[tuple[torch.Tensor, ...]]:
    while True:
        yield from loader
