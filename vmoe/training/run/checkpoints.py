"""The callback that writes a run's last.ckpt and best.ckpt."""

import math
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, Trainer

from vmoe.checkpoints import RunFolder, copy_checkpoint, read_checkpoint, write_content
from vmoe.checkpoints.state import RunProgress, progress_of, put_progress
from vmoe.errors import UserError
from vmoe.training.classifier import Classifier
from vmoe.training.parallel.collectives import Flag, gather
from vmoe.training.parallel.folder_writer import FolderWriter
from vmoe.training.parallel.process import Process
from vmoe.training.run.journal import Clock
from vmoe.training.run.stopping import Interrupted, SignalWatch


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name and renames it, so that a full disk or a kill leaves the old one.

    It also reads the checkpoint folder of a sharded model.
    """

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return read_checkpoint(path)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        write_content(path, checkpoint)


class RunCheckpoints(Callback):
    """Saves the last and the best checkpoint, stops early, and at a signal stops after the current step.

    Without validation the last epoch's checkpoint is the best.

    Args:
        folder: The run's folder.
        clock: The run's clock, which continues after a resumption.
        patience: Stops after this many epochs without a better val/top1 (or val/mAP); None never stops.
        writer: Writes the checkpoints of a sharded model.
    """

    def __init__(
        self,
        folder: RunFolder,
        clock: Clock,
        patience: int | None,
        writer: FolderWriter,
    ) -> None:
        self.folder = folder
        self.clock = clock
        self.patience = patience
        self.writer = writer
        self.best: dict[str, float] = {"epoch": 0, "val/loss": math.inf}
        self._batches_done = 0
        self._finished = False
        self._signals = SignalWatch()
        self._stopping = Flag()

    def on_train_start(self, trainer: Trainer, module: Classifier) -> None:
        self._signals.install()  # replaces Lightning's handlers, which would stop between two batches of one update

    def on_train_batch_end(
        self, trainer: Trainer, module: Classifier, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        is_last = batch_idx + 1 == trainer.num_training_batches  # the end of an epoch is saved after validation, below
        is_update = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        is_stopping = self._signals.received is not None or self.writer.failed  # the save below raises the error
        if is_update and not is_last and self._stopping.seen(is_stopping):
            self._batches_done = batch_idx + 1
            self._save_last(trainer, module)
            self.writer.wait()
            raise Interrupted(self._signal(), trainer.global_step, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Trainer, module: Classifier) -> None:
        epochs_done = trainer.current_epoch + 1
        # without validation this comes from a batch of training images
        if not math.isfinite(module.evaluation_metrics("val")["val/loss"]):
            raise UserError(
                f"epoch {epochs_done}: the loss in evaluation is not finite, the weights have overflowed; lower "
                "--optim.lr or warm up longer. Earlier checkpoints are unchanged",
                everywhere=True,
            )
        validation = module.validation_metrics()
        is_best = not validation or _rank(validation, module) > _rank(self.best, module)
        if is_best:
            self.best = {"epoch": epochs_done, **validation}
        self._batches_done = 0
        if self.patience is not None and epochs_done - self.best["epoch"] >= self.patience:
            trainer.should_stop = True
        self._finished = trainer.should_stop or epochs_done == trainer.max_epochs
        if is_best:  # first, since last.ckpt records the epoch of best.ckpt
            trainer.save_checkpoint(self.folder.best)
            self.writer.then(partial(copy_checkpoint, self.folder.best, self.folder.last))
        else:
            self._save_last(trainer, module)
        is_stopping = self._stopping.settle() or self._signals.received is not None
        if any(gather(is_stopping)) and not self._finished:
            self.writer.wait()
            raise Interrupted(self._signal(), trainer.global_step, epochs_done)

    def on_train_end(self, trainer: Trainer, module: Classifier) -> None:
        self.writer.wait()
        self._signals.remove()

    def on_exception(self, trainer: Trainer, module: Classifier, exception: BaseException) -> None:
        failed = self.writer.leave()
        if failed is not None and Process.this().is_first:
            print(f"vmoe train: error: {failed}", file=sys.stderr)  # besides the error that stops the run
        self._signals.remove()

    def on_save_checkpoint(self, trainer: Trainer, module: Classifier, checkpoint: dict[str, Any]) -> None:
        epochs_done = trainer.current_epoch + (self._batches_done == 0)
        images = trainer.datamodule.fingerprint
        put_progress(checkpoint, RunProgress(epochs_done, self._finished, self.best, self.clock.state(), images))

    def on_load_checkpoint(self, trainer: Trainer, module: Classifier, checkpoint: dict[str, Any]) -> None:
        progress = progress_of(checkpoint)
        self.best = progress.best
        self.clock.load_state(progress.clock)

    def _save_last(self, trainer: Trainer, module: Classifier) -> None:
        trainer.save_checkpoint(self.folder.last)

    def _signal(self) -> int:
        """The signal that stops the run. Another rank may have received it."""
        return self._signals.received or signal.SIGTERM


def _rank(validation: dict[str, float], module: Classifier) -> tuple[float, float]:
    """The sort key of epochs: val/top1 (or val/mAP), then val/loss, since small validation sets often have ties."""
    return validation.get(f"val/{module.metrics.monitored}", -math.inf), -validation["val/loss"]
