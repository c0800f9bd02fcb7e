"""The learning rate as a function of the update: a warm-up, then one of `vmoe.training.config.SCHEDULES`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from vmoe.errors import UserError
from vmoe.training.config import OptimConfig

_ONE_CYCLE_START = 1 / 25  # of the highest rate; torch's OneCycleLR starts there too
_DECAY_SHARES = {"step": 1 / 3, "warmup_stable_decay": 1 / 5}  # of a run, where decay_epochs is null


@dataclass(frozen=True)
class LearningRates:
    """The learning rates of a fit.

    torch's schedulers need whole updates and a known total. Here a fit may have no known end, and a warm-up may last a
    part of an epoch.

    Attributes:
        config: The highest and the lowest rate, and the schedule.
        updates: Updates in all; inf if the end is unknown: then the rate stays constant.
        warmup: Updates of the warm-up.
        decay: Updates of `decay_epochs`; inf if unknown.
    """

    config: OptimConfig
    updates: float = math.inf
    warmup: int = 0
    decay: float = math.inf

    def rate(self, step: int, falls: Sequence[int] = ()) -> float:
        """The learning rate of update `step`, 0-based.

        It rises linearly from lr / warmup to lr over the warm-up, then follows the schedule.

        Args:
            step: The update.
            falls: With schedule=plateau, the updates at which the rate falls.
        """
        highest, lowest, schedule = self.config.lr, self.config.min_lr, self.config.schedule
        if step < self.warmup:
            return self._rising((step + 1) / self.warmup)
        if schedule == "constant":
            return highest
        if schedule in ("step", "plateau"):
            times = step // self.decay if schedule == "step" else sum(fall <= step for fall in falls)
            return max(lowest, highest * self.config.decay_rate**times)
        if schedule == "warmup_stable_decay":
            decay = min(self.decay, max(1, self.updates - self.warmup))  # never into the warm-up: the rate would jump
            left = min(1.0, (self.updates - 1 - step) / decay) if math.isfinite(decay) else 1.0
            return lowest + (highest - lowest) * max(0.0, left)
        progress = min(1.0, (step - self.warmup) / max(1, self.updates - 1 - self.warmup))
        return lowest + (highest - lowest) * (1 + math.cos(math.pi * progress)) / 2

    def _rising(self, progress: float) -> float:
        highest = self.config.lr
        if self.config.schedule != "one_cycle":
            return highest * progress
        lowest = highest * _ONE_CYCLE_START
        return lowest + (highest - lowest) * (1 - math.cos(math.pi * progress)) / 2


class RateSchedule(torch.optim.lr_scheduler.LambdaLR):
    """A torch scheduler that follows `LearningRates`. Its state, which checkpoints hold, includes that of a plateau.

    Args:
        optimizer: Its learning rates are the highest of each group.
        rates: Returns the current rates: a resumed run may have more epochs.

    Attributes:
        falls: Updates at which the rate falls.
        lowest_loss: The lowest val/loss so far.
        waited: Validations since then, or since the last fall.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rates: Callable[[], LearningRates]) -> None:
        self.falls: list[int] = []
        self.lowest_loss, self.waited = math.inf, 0
        super().__init__(optimizer, lambda step: rates().rate(step, self.falls) / rates().config.lr)

    def observe(self, loss: float, config: OptimConfig) -> None:
        """Records an epoch's val/loss. Lowers the rate from the next update on if the loss has not fallen for long."""
        is_lower = loss < self.lowest_loss
        self.lowest_loss = min(self.lowest_loss, loss)
        self.waited = 0 if is_lower else self.waited + 1
        if self.waited >= config.patience_epochs:
            self.waited = 0
            self.falls = [*self.falls, self.last_epoch]
            self._apply()

    def _apply(self) -> None:
        for group, highest, share in zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True):
            rate = highest * share(self.last_epoch)
            if isinstance(group["lr"], Tensor):  # a CUDA graph reads this tensor
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def planned_rates(trainer: Trainer | None, config: OptimConfig, chooses_warmup: bool) -> LearningRates:
    """The learning rates of the fit that a Trainer starts.

    Args:
        trainer: The Trainer; None in a custom loop, where the rate stays constant.
        config: The optimiser's options.
        chooses_warmup: Whether the warm-up is a quarter of the epochs, at most the default.

    Raises:
        UserError: The training loader gives no batch.
    """
    if trainer is None:
        return LearningRates(config)
    updates, batches = trainer.estimated_stepping_batches, trainer.num_training_batches
    updates = math.inf if updates < 0 else updates  # an endless loader
    if batches == 0 and trainer.limit_train_batches:  # Lightning would end without an error
        raise UserError(
            "the training loader gives no batch: with drop_last a batch must not be larger than the training set; "
            "lower batch_size"
        )
    if math.isinf(batches):
        return LearningRates(config, updates)
    if chooses_warmup:
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else math.inf
        config = replace(config, warmup_epochs=min(OptimConfig.warmup_epochs, epochs / 4))
    updates_per_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
    decay = updates * _DECAY_SHARES.get(config.schedule, math.inf)
    if config.decay_epochs is not None:
        decay = config.decay_epochs * updates_per_epoch
    warmup = math.ceil(config.warmup_epochs * updates_per_epoch)
    return LearningRates(config, updates, warmup, math.ceil(decay) if math.isfinite(decay) else decay)
