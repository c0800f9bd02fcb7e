"""The learning rate as a function of the update: a linear warm-up, then half a cosine."""

import math
from dataclasses import dataclass, replace

from lightning.pytorch import Trainer

from vmoe.errors import UserError
from vmoe.training.config import OptimConfig


@dataclass(frozen=True)
class LearningRates:
    """The learning rates of a fit.

    torch's schedulers count in whole updates of a known total; here a fit may have no end, and a warm-up of part of an
    epoch.

    Attributes:
        config: The highest and the lowest rate.
        updates: Updates in all; inf where nobody knows an end: then the rate stays.
        warmup: Updates of the warm-up.
    """

    config: OptimConfig
    updates: float = math.inf
    warmup: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of update `step`, 0-based.

        Linear from lr / warmup up to lr over the warm-up, then half a cosine that ends in min_lr.
        """
        if step < self.warmup:
            return self.config.lr * (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.updates - 1 - self.warmup))
        lowest = self.config.min_lr
        return lowest + (self.config.lr - lowest) * (1 + math.cos(math.pi * progress)) / 2


def planned_rates(trainer: Trainer | None, config: OptimConfig, chooses_warmup: bool) -> LearningRates:
    """The learning rates of what a Trainer is about to do.

    Args:
        trainer: None in a loop of one's own, where the rate stays.
        config: The optimiser's options.
        chooses_warmup: Whether a quarter of the epochs warms up, at most the usual number of them.

    Raises:
        UserError: the training loader gives no batch.
    """
    if trainer is None:
        return LearningRates(config)
    updates, batches = trainer.estimated_stepping_batches, trainer.num_training_batches
    updates = math.inf if updates < 0 else updates  # of an endless loader
    if batches == 0 and trainer.limit_train_batches:  # where Lightning would end without a word of failure
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
    return LearningRates(config, updates, math.ceil(config.warmup_epochs * updates_per_epoch))
