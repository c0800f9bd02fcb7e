"""Benchmark of data pipelines: images/s of a loader, and of a training with it."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmoe.bench.report import Column
from vmoe.data import Batch, ImageDataModule
from vmoe.models.members import ensemble_size, of_rows
from vmoe.moe import auxiliary_loss
from vmoe.training.graph import GraphedStep

DATA_COLUMNS = (
    Column("images", "source"),
    Column("pipeline", "pipeline"),
    Column("workers", "workers"),
    Column("first batch s", "first_batch_seconds", ".2f"),
    Column("loader's images/s", "images_per_second", ",.0f"),
    Column("training's images/s", "training_images_per_second", ",.0f"),
    Column("on synthetic images", "synthetic_images_per_second", ",.0f"),
    Column("share", "share_of_synthetic", ".3f"),
    Column("loader / training", "share_of_model", ".2f"),
    Column("training is bound by", "bound_by"),
)
_WARM_UP = 5  # steps that are not counted; a graph is captured in the fourth


@dataclass(frozen=True)
class LoaderRate:
    """The speed of a loader."""

    first_batch_seconds: float  # until the first batch: to start workers, or to read the set onto the device
    images_per_second: float  # after the first batch
    images: int  # number of counted images


def loader_rate(make_loader: Callable[[], Iterable], seconds: float, ahead: int, device: torch.device) -> LoaderRate:
    """Reads batches for some time, and starts again after the last one.

    Args:
        make_loader: Returns an iterable of batches. Their first field holds the images (B, ...).
        seconds: Seconds to count; at least one batch is counted.
        ahead: Number of batches that are not counted, since they may have been prepared before.
        device: The device that may still compute a batch when the loader returns it.
    """
    start = time.perf_counter()
    batches = endless(make_loader())
    next(batches)
    _synchronise(device)
    first = time.perf_counter() - start
    for _ in range(ahead):
        next(batches)
    return LoaderRate(first, *_rate(lambda: len(next(batches)[0]), seconds, device))


def _unchanged(batch: Batch) -> Batch:
    return batch


class TrainingStep:
    """Forward pass under autocast, loss with the balance losses, backward pass, update by fused AdamW.

    As in `vmoe train`, the step first makes the images of a batch that has only keys. Autocast is to `dtype`. The model
    is on `device` and may be compiled, in place. With `graphed` a step is captured as a CUDA graph. The learning rate
    is 0, so the weights do not change.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, dtype: torch.dtype, compiled: bool, graphed: bool
    ) -> None:
        self.model, self.device, self.dtype, self.graphed = model.train(), device, dtype, graphed
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True, capturable=graphed)
        if compiled:
            model.compile(dynamic=False)
        self._run = GraphedStep(self._step) if graphed else self._step
        self._made = _unchanged

    def _step(self, batch: Batch) -> Tensor:
        batch = self._made(batch)
        self.optimizer.zero_grad(set_to_none=True)
        is_mixed, keeps_casts = self.dtype != torch.float32, not self.graphed  # a graph must not keep casts
        with torch.autocast(self.device.type, self.dtype, enabled=is_mixed, cache_enabled=keeps_casts):
            targets = batch.labels if batch.targets is None else batch.targets
            targets = of_rows(targets, ensemble_size(self.model))
            loss = F.cross_entropy(self.model(batch.images), targets) + auxiliary_loss(self.model)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def rate(
        self, batches: Iterator[Batch], seconds: float, ahead: int = 0, made: Callable[[Batch], Batch] = _unchanged
    ) -> float:
        """Images/s of steps on an endless iterator of batches on the device, counted for some `seconds`.

        The first few batches, and those that may have been prepared `ahead`, are not counted. `made` makes the images
        of a batch that has only keys, within the step.
        """
        self._made = made
        if self.graphed:
            self._run.forget()

        def step() -> int:
            batch = next(batches)
            self._run(batch)
            return len(batch.labels)

        for _ in range(_WARM_UP + ahead):
            step()
        return _rate(step, seconds, self.device)[0]


def endless(batches: Iterable) -> Iterator:
    """Yields the batches without end."""
    while True:
        yield from batches


def ready_batches(module: ImageDataModule, loader: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yields batches on the device without end, prepared as a trainer prepares a loader's batches."""
    for batch in endless(loader):
        tensors = {name: value for name, value in batch._asdict().items() if isinstance(value, Tensor)}
        moved = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        yield module.on_after_batch_transfer(batch._replace(**moved), 0)


def _rate(step: Callable[[], int], seconds: float, device: torch.device) -> tuple[float, int]:
    """Images/s, and the number of images, of steps that return their number of images."""
    _synchronise(device)
    images, start = 0, time.perf_counter()
    while not images or time.perf_counter() - start < seconds:
        images += step()
    _synchronise(device)  # waits for batches that the device still computes
    return images / (time.perf_counter() - start), images


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
