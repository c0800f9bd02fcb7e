"""The average of the weights (EMA) as a callback."""

from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from vmoe.checkpoints.state import average_of
from vmoe.errors import UserError
from vmoe.training.classifier import Classifier
from vmoe.training.optim.average import WeightAverage


class Ema(Callback):
    """Keeps a moving average of the weights (EMA) and validates, tests and predicts with it; for any Trainer.

    With a `vmoe.Classifier` validation also logs `val/raw_top1`, the accuracy of the weights themselves, and
    checkpoints hold the average where `vmoe.load` reads it. With another LightningModule the callback's own state holds
    the average. Each fit starts a new average, or continues that of `ckpt_path`. With `ckpt_path`, `validate`, `test`
    and `predict` use the average in that file.

    Lightning's `EMAWeightAveraging` keeps its decay on the host. So it cannot be part of a step captured as a CUDA
    graph, and cannot skip an update that `vmoe.NanGuard` has blocked.

    Args:
        decay: The highest decay per update. At update t the decay is at most (1 + t) / (10 + t).

    Raises:
        UserError: The decay is not in (0, 1).
    """

    def __init__(self, decay: float = 0.9999) -> None:
        if not 0 < decay < 1:
            raise UserError(f"decay={decay!r}: must be in (0, 1)")
        self.decay = decay
        self.average: WeightAverage | None = None  # for a Classifier the same object as `Classifier.average`
        self._is_of_classifier = False
        self._swapped = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._begin(pl_module)
        elif isinstance(pl_module, Classifier):
            self.average, self._is_of_classifier = pl_module.average, True  # another Ema may have kept it
        elif self.average is not None and not self.average.is_of(pl_module):
            self.average = None

    def _begin(self, pl_module: LightningModule) -> None:
        self._is_of_classifier = isinstance(pl_module, Classifier)
        self.average = WeightAverage(pl_module.model if self._is_of_classifier else pl_module, self.decay)
        if self._is_of_classifier:
            pl_module.average = self.average

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, Classifier):  # a Classifier updates its average itself
            self.average.to(pl_module.device)
            for optimizer in trainer.optimizers:
                optimizer.register_step_post_hook(
                    lambda optimizer, *_: self.average.update(getattr(optimizer, "found_inf", None))
                )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, Classifier):  # a Classifier evaluates with both itself
            self.on_test_start(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        average = self._of(pl_module)
        if average is not None:
            with torch.inference_mode(False):  # else a later fit could not change it
                average.to(pl_module.device)
            self._swapped.enter_context(average.applied())

    on_predict_start = on_test_start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swapped.close()

    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._swapped.close()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        is_ours = isinstance(pl_module, Classifier)
        saved = average_of(checkpoint) if is_ours else checkpoint.get("callbacks", {}).get(self.state_key)
        if self._of(pl_module) is None or not saved:  # start from the checkpoint's weights, which are loaded by now
            self._begin(pl_module)
        if saved:
            self._of(pl_module).load_state(saved)
        elif trainer.state.fn != TrainerFn.FITTING:
            rank_zero_warn("Ema: the checkpoint holds no average, so its weights themselves are evaluated")

    def state_dict(self) -> dict[str, Any]:
        return {} if self.average is None or self._is_of_classifier else self.average.state()

    def _of(self, pl_module: LightningModule) -> WeightAverage | None:
        return pl_module.average if isinstance(pl_module, Classifier) else self.average
