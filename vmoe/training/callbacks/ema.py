"""The average of the weights (EMA) as a callback."""

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from vmoe.checkpoints.state import average_of
from vmoe.errors import UserError
from vmoe.training.average import WeightAverage
from vmoe.training.classifier import Classifier


class Ema(Callback):
    """Keeps an average of the weights (EMA), by which validation, test and prediction are done; for any Trainer.

    With a `vmoe.Classifier` validation also logs `val/raw_top1`, the accuracy of the weights themselves, and
    checkpoints hold the average where `vmoe.load` takes it from. With another LightningModule the average is in the
    callback's own state.

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
        self._average: WeightAverage | None = None  # of a LightningModule that has no place for it
        self._swapped = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or self._of(pl_module) is not None:
            return
        if isinstance(pl_module, Classifier):
            pl_module.average = WeightAverage(pl_module.model, self.decay)
        else:
            self._average = WeightAverage(pl_module, self.decay)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average is not None:
            self._average.to(pl_module.device)
            for optimizer in trainer.optimizers:
                optimizer.register_step_post_hook(
                    lambda optimizer, *_: self._average.update(getattr(optimizer, "found_inf", None))
                )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average is not None:  # a Classifier evaluates by both
            self._swapped.enter_context(self._average.applied())

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        average = self._of(pl_module)
        if average is not None:
            average.to(pl_module.device)
            self._swapped.enter_context(average.applied())

    on_predict_start = on_test_start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swapped.close()

    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._swapped.close()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = average_of(checkpoint)
        if isinstance(pl_module, Classifier) and pl_module.average is not None and saved is not None:
            pl_module.average.load_state(saved)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._average is None else self._average.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._average is not None:
            self._average.load_state(state_dict)

    def _of(self, pl_module: LightningModule) -> WeightAverage | None:
        return pl_module.average if isinstance(pl_module, Classifier) else self._average
