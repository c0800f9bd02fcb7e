"""Finds a learning rate: Lightning's range test (Smith 2017) on a run's own model and images."""

import csv
import dataclasses
import logging
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from lightning import seed_everything
from lightning.pytorch import Trainer
from lightning.pytorch.tuner import Tuner

from vmoe.errors import UserError
from vmoe.files import atomic_write
from vmoe.training.config import ParallelConfig, TrainConfig
from vmoe.training.distillation import load_teacher
from vmoe.training.fit import config_with
from vmoe.training.optim.timm_optimizers import check_optimizer
from vmoe.training.parallel.process import Process
from vmoe.training.run.data import images_of_run
from vmoe.training.run.model import built_model, facts_of_run, new_module, start_model
from vmoe.training.run.trainer import device_of, lightning_precision, quiet_lightning

_LOWEST, _HIGHEST = 1e-7, 1.0
_MEMORY = 0.98  # of the mean that smooths losses, in Lightning's finder


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


def find_lr(
    config: TrainConfig | str | PathLike[str],
    *,
    options: Mapping[str, Any] | None = None,
    steps: int = 100,
    say: Callable[[str], object] = print,
) -> FoundRate:
    """Finds a learning rate for a run. The rate rises from update to update until the loss rises. No run is kept.

        found = vmoe.find_lr("digits", options={"moe.num_experts": 16})
        vmoe.fit("digits", options={"moe.num_experts": 16, "optim.lr": found.lr})

    All parameters learn at the same rate in this test.

    Args:
        config: A recipe's name, the path of a config file, or a `TrainConfig`.
        options: Other options by their dotted names; not beside a `TrainConfig`.
        steps: Updates; 20 or more, since the first ten and the last are ignored.
        say: Called with lines on the run.

    Raises:
        UserError: An option is not allowed, there are several ranks, or the loss never falls.
    """
    if not isinstance(config, TrainConfig):
        config = config_with(config, options or {})
    if steps < 20:
        raise UserError(f"steps={steps}: must be 20 or more")
    if Process.this().world_size > 1:
        raise UserError("find_lr: works in one process; start it without torchrun", everywhere=True)
    trainer = dataclasses.replace(config.trainer, cuda_graph=False, compile=False)
    alone = ParallelConfig(draws=config.parallel.draws)  # a single process ignores all else, as in training
    config = dataclasses.replace(config, trainer=trainer, parallel=alone)
    check_optimizer(config.optim)
    device = device_of(config)
    data = images_of_run(config, device)
    seed_everything(config.seed, verbose=False)
    model, _ = start_model(config, data, device, say)
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
        found = Tuner(run).lr_find(
            module, datamodule=data, min_lr=_LOWEST, max_lr=_HIGHEST, num_training=steps, update_attr=False
        )
    rates = [float(rate) for rate in found.results["lr"]]
    losses = _mended_losses(rates, found.results["loss"], steps, config.trainer.accumulate)
    if not rates:
        raise UserError(
            f"trainer.accumulate={config.trainer.accumulate}: must be at most the batches of an epoch; lower it"
        )
    # Falls over the logarithm of the rate: Lightning's suggestion divides by the difference of two rates, which rewards
    # noise at tiny rates. The first ten losses are means of few, and at the last the test may have stopped.
    falls = {number: losses[number - 1] - losses[number + 1] for number in range(10, len(losses) - 2)}
    falls = {number: fall for number, fall in falls.items() if fall > 0}  # drops NaN too
    if not falls:
        raise UserError("find_lr: the loss never falls, so there is no rate to suggest; look at the images and labels")
    return FoundRate(rates[max(falls, key=falls.__getitem__)], rates, losses)


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
