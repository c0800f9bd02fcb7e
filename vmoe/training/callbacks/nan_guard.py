"""The guard against NaN and inf as a callback."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from vmoe.errors import UserError
from vmoe.training.classifier import Classifier
from vmoe.training.guard import Guard, obeys_a_flag


class NanGuard(Callback):
    """Stops a training at a loss or gradient of NaN or inf and keeps the last good weights; for any Trainer.

    The update is blocked on the device at once. The host reads the flag only every `every` steps and before a
    checkpoint is written, so no step synchronises with the GPU. An optimiser that is not fused cannot be blocked on the
    device. With it the host reads the flag at every step.

    Args:
        every: Number of batches between two readings of the flag.

    Raises:
        UserError: `every` is below 1.
    """

    def __init__(self, every: int = 50) -> None:
        if every < 1:
            raise UserError(f"every={every!r}: must be a whole number >= 1")
        self.every = every
        self.guard = Guard()
        self._watches_step = False  # whether the LightningModule passes loss and gradients to the guard itself

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.guard = Guard()  # forgets a bad step of an earlier fit
        self._watches_step = isinstance(pl_module, Classifier)
        if isinstance(pl_module, Classifier):
            pl_module.guard = self.guard

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.guard.to(pl_module.device)
        for optimizer in filter(obeys_a_flag, trainer.optimizers):
            optimizer.register_step_pre_hook(lambda optimizer, *_: self.guard.block(optimizer))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not self._watches_step:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            self.guard.check_update(optimizer, nn.utils.get_total_norm(gradients), trainer.global_step, scaler)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 == trainer.num_training_batches or (batch_idx + 1) % self.every == 0:
            self._read(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._read(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.guard = Guard()  # the weights are those before the bad step and may be saved
        if isinstance(pl_module, Classifier):
            pl_module.guard = None

    def _read(self, trainer: Trainer) -> None:
        self.guard.raise_if_bad(fp16=trainer.precision == "16-mixed")
