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
    """Keeps an average of the weights (EMA), by which validation, test and prediction are done; for any Trainer.

    With a `vmoe.Classifier` validation also logs `val/raw_top1`, the accuracy of the weights themselves, and
    checkpoints hold the average where `vmoe.load` takes it from. With another LightningModule the average is in the
    callback's own state. Each fit begins an average of its own, or goes on with that of `ckpt_path`. Also
    `validate`, `test` and `predict` with a `ckpt_path` take the average that is in it.

    Lightning's `EMAWeightAveraging` keeps its decay on the host, and cannot be part of a step that is captured as a
    CUDA graph, nor leave out an update that `vmoe.NanGuard` has blocked.

    Args:
        decay: The highest decay per update; in the first updates t it is at most (1 + t) / (10 + t).

    Raises:
        UserError: The decay is not in (0, 1).
    """

    def __init__(self, decay: float = 0.9999) -> None:
        if not 0 < decay < 1:
            raise UserError(f"decay={decay!r}: must be in (0, 1)")
        self.decay = decay
        self.average: WeightAverage | None = None  # that of a Classifier is also its own `average`
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
        if not isinstance(pl_module, Classifier):  # which updates its average itself
            self.average.to(pl_module.device)
            for optimizer in trainer.optimizers:
                optimizer.register_step_post_hook(
                    lambda optimizer, *_: self.average.update(getattr(optimizer, "found_inf", None))
                )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, Classifier):  # which evaluates by both
            self.on_test_start(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        average = self._of(pl_module)
        if average is not None:
            with torch.inference_mode(False):  # else a fit that follows could not change it
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
        if self._of(pl_module) is None or not saved:  # by the weights of the checkpoint, which are loaded before
            self._begin(pl_module)
        if saved:
            self._of(pl_module).load_state(saved)
        elif trainer.state.fn != TrainerFn.FITTING:
            rank_zero_warn("Ema: the checkpoint holds no average, so its weights themselves are evaluated")

    def state_dict(self) -> dict[str, Any]:
        return {} if self.average is None or self._is_of_classifier else self.average.state()

    def _of(self, pl_module: LightningModule) -> WeightAverage | None:
        return pl_module.average if isinstance(pl_module, Classifier) else self.average
