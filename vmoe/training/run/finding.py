"""Finds a learning rate and a batch size by Lightning's `Tuner`, on a run's own model and images."""

import contextlib
import csv
import dataclasses
import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from lightning import seed_everything
from lightning.pytorch import Trainer
from lightning.pytorch.tuner import Tuner

from vmoe.data import ImageDataModule
from vmoe.errors import UserError
from vmoe.files import atomic_write
from vmoe.training.classifier import Classifier
from vmoe.training.config import ParallelConfig, TrainConfig
from vmoe.training.distillation import load_teacher
from vmoe.training.fit import config_with
from vmoe.training.optim.timm_optimizers import check_optimizer
from vmoe.training.parallel.process import Process
from vmoe.training.run.data import images_of_run
from vmoe.training.run.model import built_model, facts_of_run, new_module, start_model
from vmoe.training.run.trainer import device_of, lightning_precision, quiet_lightning

LARGEST_BATCH = 8192  # Lightning's finder tries no larger one
_LOWEST, _HIGHEST = 1e-7, 1.0
_MEMORY = 0.98  # decay of the mean that smooths losses in Lightning's finder


@dataclass(frozen=True)
class FoundRate:
    """The result of a range test.

    Attributes:
        lr: The rate at which the loss falls fastest over the logarithm of the rate.
        rates: The rates of the test, one per update.
        losses: The smoothed loss at each rate.
    """

    lr: float
    rates: list[float] = field(repr=False)
    losses: list[float] = field(repr=False)

    def write(self, path: str | Path) -> None:
        """Writes a CSV file of the rates and losses."""
        with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(
                [("lr", "loss"), *zip(self.rates, self.losses, strict=True)]
            )


@dataclass(frozen=True)
class FoundBatchSize:
    """The largest batch that fits.

    Attributes:
        batch_size: Its number of images.
        is_limited_by_memory: Whether twice as many do not fit; else there are fewer training images, or it is
            `LARGEST_BATCH`.
    """

    batch_size: int
    is_limited_by_memory: bool


def find_lr(
    config: TrainConfig | str | PathLike[str],
    *,
    options: Mapping[str, Any] | None = None,
    steps: int = 100,
    log: Callable[[str], object] = print,
) -> FoundRate:
    """Finds a learning rate for a run. The rate rises from update to update until the loss rises. No run is kept.

        found = vmoe.find_lr("digits", options={"moe.num_experts": 16})
        vmoe.fit("digits", options={"moe.num_experts": 16, "optim.lr": found.lr})

    All parameters learn at the same rate in this test.

    Args:
        config: A recipe's name, the path of a config file, or a `TrainConfig`.
        options: Other options by their dotted names; not beside a `TrainConfig`.
        steps: Updates; 20 or more, since the first ten and the last are ignored.
        log: Called with lines on the run.

    Raises:
        UserError: An option is not allowed, there are several ranks, or the loss never falls.
    """
    if steps < 20:
        raise UserError(f"steps={steps}: must be 20 or more")
    with _short_run(_config_of(config, options), log, "find_lr") as short:
        accumulate, batches = short.trainer.accumulate_grad_batches, len(short.data.train_sampler)
        if accumulate > batches:  # Lightning's finder skips such updates
            raise UserError(
                f"trainer.accumulate={accumulate}: must be at most {batches}, the batches of an epoch, to find a rate; "
                "lower it"
            )
        found = Tuner(short.trainer).lr_find(
            short.module, datamodule=short.data, min_lr=_LOWEST, max_lr=_HIGHEST, num_training=steps, update_attr=False
        )
    rates = [float(rate) for rate in found.results["lr"]]
    losses = _mended_losses(rates, found.results["loss"], steps, accumulate)
    # Falls over the logarithm of the rate: Lightning's suggestion divides by the difference of two rates, which rewards
    # noise at tiny rates. The first ten losses are means of few, and at the last the test may have stopped.
    falls = {number: losses[number - 1] - losses[number + 1] for number in range(10, len(losses) - 2)}
    falls = {number: fall for number, fall in falls.items() if fall > 0}  # drops NaN too
    if not falls:
        raise UserError("find_lr: the loss never falls, so there is no rate to suggest; look at the images and labels")
    return FoundRate(rates[max(falls, key=falls.__getitem__)], rates, losses)


def find_batch_size(
    config: TrainConfig | str | PathLike[str],
    *,
    options: Mapping[str, Any] | None = None,
    log: Callable[[str], object] = print,
) -> FoundBatchSize:
    """Finds the largest batch of 1, 2, 4, ..., 8192 images that fits into memory. No run is kept.

        found = vmoe.find_batch_size("imagenet_vmoe_s16")
        vmoe.fit("imagenet_vmoe_s16", options={"data.batch_size": found.batch_size})

    Each size trains three updates. A GPU reports full memory; on a CPU the system may end the process instead.

    Args:
        config: A recipe's name, the path of a config file, or a `TrainConfig`.
        options: Other options by their dotted names; not beside a `TrainConfig`.
        log: Called with lines on the run.

    Raises:
        UserError: An option is not allowed, there are several ranks, or a single image does not fit.
    """
    config = _config_of(config, options)
    # The smallest size comes first. Lightning would keep a size of at least all training images, and not try any
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=2))
    with _short_run(config, log, "find_batch_size") as short:
        if short.trainer.strategy.root_device.type == "cpu":
            log("warning: on a CPU the system may end this process when the memory is full")
        images = short.data.train_sampler.epoch_images // short.data.config.repeat
        most = min(images, LARGEST_BATCH)
        doublings = max(1, most.bit_length() - 1)  # up to the largest batch of at most so many images
        try:
            size = Tuner(short.trainer).scale_batch_size(
                short.module, datamodule=short.data, init_val=2, max_trials=doublings, max_val=2 ** (doublings + 1)
            )
        except ValueError as error:
            if short.data.batch_size > 1:
                raise
            raise UserError(
                "find_batch_size: not even one image fits the memory; take a smaller model or smaller images"
            ) from error
    return FoundBatchSize(size, is_limited_by_memory=2 * size <= most)


@dataclass(frozen=True)
class _ShortRun:
    """The model, data and Trainer that a finder trains for a few steps."""

    trainer: Trainer
    module: Classifier
    data: ImageDataModule


def _config_of(config: TrainConfig | str | PathLike[str], options: Mapping[str, Any] | None) -> TrainConfig:
    return config if isinstance(config, TrainConfig) else config_with(config, options or {})


@contextlib.contextmanager
def _short_run(config: TrainConfig, log: Callable[[str], object], finder: str) -> Iterator[_ShortRun]:
    """A short run of a config in one process, with a Trainer that keeps no files."""
    if Process.this().world_size > 1:
        raise UserError(f"{finder}: works in one process; start it without torchrun", everywhere=True)
    trainer = dataclasses.replace(config.trainer, cuda_graph=False, compile=False)
    alone = ParallelConfig(draws=config.parallel.draws)  # a single process ignores all else, as in training
    config = dataclasses.replace(config, trainer=trainer, parallel=alone)
    check_optimizer(config.optim)
    device = device_of(config)
    data = images_of_run(config, device)
    seed_everything(config.seed, verbose=False)
    model, _ = start_model(config, data, device, log)
    facts = facts_of_run(config, built_model(config, None), data)
    module = new_module(config, model, None, load_teacher(config.distill, data, config.loss), facts)
    with quiet_lightning(), tempfile.TemporaryDirectory() as folder:
        logging.getLogger("lightning.pytorch.tuner").setLevel(logging.ERROR)
        run = Trainer(
            accelerator=device.type,
            devices=1,
            precision=lightning_precision(config),
            max_epochs=-1,
            accumulate_grad_batches=config.trainer.accumulate,
            check_val_every_n_epoch=10**9,
            num_sanity_val_steps=0,
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        yield _ShortRun(run, module, data)


def _mended_losses(rates: list[float], smoothed: list[float], steps: int, accumulate: int) -> list[float]:
    """The smoothed losses of Lightning's finder, rescaled to the size of losses.

    The finder divides a loss by `accumulate`, and corrects the mean of n losses for one more than n (or for more, after
    updates of fewer batches, which it skips). So its first losses are half of the true ones.
    """
    losses = []
    for number, (rate, loss) in enumerate(zip(rates, smoothed, strict=True), start=1):
        updates = max(1, round(steps * math.log(rate / _LOWEST) / math.log(_HIGHEST / _LOWEST)))
        losses.append(float(loss) * accumulate * (1 - _MEMORY ** (updates + 1)) / (1 - _MEMORY**number))
    return losses
