"""The records of a run while it trains: metrics.csv, TensorBoard events, the terminal."""

import csv
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from vmoe.checkpoints import RunFolder
from vmoe.errors import UserError
from vmoe.extras import require_module
from vmoe.files import atomic_write
from vmoe.training.callbacks.routing_monitor import RoutingMonitor
from vmoe.training.classifier import RAW_TOP1, Classifier
from vmoe.training.config import TrainerConfig, logger_options
from vmoe.training.parallel.collectives import gather
from vmoe.training.parallel.process import Process
from vmoe.training.routing_sums import as_metrics, metric_columns, warnings_of
from vmoe.training.run.progress import TrainingProgress


class Clock:
    """Seconds spent in all, and in the training steps of this epoch. A resumed run continues both.

    Lightning's `Timer` does not keep the seconds of an unfinished epoch.
    """

    def __init__(self) -> None:
        self._spent = {"total": 0.0, "epoch": 0.0}
        self._since: dict[str, float] = {}  # start times of running counters

    def start(self, name: str, fresh: bool = False) -> None:
        """Starts to count "total" or "epoch". With `fresh` it starts from zero."""
        self._spent[name] = 0.0 if fresh else self._spent[name]
        self._since[name] = time.perf_counter()

    def stop_epoch(self) -> None:
        self._spent["epoch"] = self.seconds("epoch")
        self._since.pop("epoch", None)

    def seconds(self, name: str) -> float:
        now = time.perf_counter()
        return self._spent[name] + now - self._since.get(name, now)

    def state(self) -> dict[str, float]:
        return {name: self.seconds(name) for name in self._spent}

    def load_state(self, state: dict[str, float]) -> None:
        self._spent = dict(state)


class MetricsTable:
    """metrics.csv, a row per epoch. The whole small file is replaced each time, so it is never half-written.

    Args:
        path: The file.
        columns: Its columns.
        step: Rows of later steps are dropped, since a resumed run writes them again.
    """

    def __init__(self, path: Path, columns: list[str], step: int) -> None:
        self.path = path
        self.columns = columns
        self.rows: list[dict[str, str]] = []
        if path.is_file() and step:
            with open(path, newline="", encoding="utf-8") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]

    def append(self, row: dict[str, Any]) -> None:
        self.rows.append({column: str(row[column]) for column in self.columns})
        with atomic_write(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)

    def median(self, column: str) -> float:
        return statistics.median(float(row[column]) for row in self.rows)


class Events:
    """TensorBoard's events. If they cannot be written, the run prints that once and continues with metrics.csv alone.

    Lightning's TensorBoardLogger would end the run, and keeps the events that a resumed run writes again.

    Args:
        folder: The run's folder.
        step: Updates done before this process; later events of a stopped run are dropped.
        log: Called with a line on the failure.
    """

    def __init__(self, folder: Path, step: int, log: Callable[[str], None]) -> None:
        self._folder, self._log = folder, log
        self._writer: Any = None  # a SummaryWriter
        self._hook, threading.excepthook = threading.excepthook, self._in_thread
        with self._warned():
            require_module("tensorboard")
            from torch.utils.tensorboard import SummaryWriter  # here: a run works without TensorBoard

            self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, row: dict[str, Any], warnings: list[str]) -> None:
        """Writes a row of metrics and warnings, and flushes them to the disk."""
        with self._warned():
            if self._writer is None:
                return
            for name, value in row.items():
                if name not in ("epoch", "step"):
                    self._writer.add_scalar(name, value, row["step"])
            for line in warnings:
                self._writer.add_text("warnings", line, row["step"])
            self._writer.flush()

    def close(self) -> None:
        with self._warned():
            if self._writer is not None:
                self._writer.close()
        threading.excepthook = self._hook

    def _in_thread(self, failure: threading.ExceptHookArgs) -> None:
        """Collects a failure. TensorBoard writes in a thread and raises its errors here, in the caller."""
        of_writer = type(failure.thread).__module__.startswith("tensorboard.")
        if not (of_writer and isinstance(failure.exc_value, OSError)):
            self._hook(failure)

    @contextmanager
    def _warned(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writer = None
            self._log(f"warning: {self._folder}: TensorBoard's events cannot be written ({error.strerror or error})")
        except UserError as error:
            self._log(f"TensorBoard's events are not written: {error}")


class Journal(Callback):
    """Writes and prints an epoch's metrics, and warns of dead experts and damaged images.

    Every rank has a journal, since metrics are means over all ranks. Only the first rank's writes and prints.

    Args:
        folder: The run's folder.
        clock: The run's clock.
        progress: The terminal.
        monitor: The callback that reads the routers' sums; it runs before this one.
        step: Updates done before this process: 0, or those of the resumed checkpoint.
        config: The options, for `log_every` and TensorBoard.
    """

    def __init__(
        self,
        folder: RunFolder,
        clock: Clock,
        progress: TrainingProgress,
        monitor: RoutingMonitor,
        step: int,
        config: TrainerConfig,
    ) -> None:
        self.monitor = monitor
        self.folder = folder
        self.clock = clock
        self.progress = progress
        self.step = step
        self.log_every = config.log_every
        self.events: Events | None = None
        self._has_events = "tensorboard" in logger_options(config.loggers)
        self.table: MetricsTable | None = None
        self._told_damaged = 0

    def on_train_start(self, trainer: Trainer, module: Classifier) -> None:
        of_training = [f"train/{name}" for name in module.metrics.train_names]
        columns = ["epoch", "step", *of_training, "train/images_per_second", "lr"]
        if trainer.datamodule.has_validation:
            columns += [f"val/{name}" for name in module.metrics.names]
            columns += [] if module.average is None or module.multi_label else [RAW_TOP1]
        columns += metric_columns(module.model)
        if Process.this().is_first:
            self.table = MetricsTable(self.folder.metrics, columns, self.step)
            if self._has_events:
                self.events = Events(self.folder.path, self.step, self.progress.log)
        self.clock.start("total")
        self._start_epoch(trainer, fresh=False)

    def on_train_epoch_start(self, trainer: Trainer, module: Classifier) -> None:
        self._start_epoch(trainer, fresh=True)

    def on_train_batch_end(
        self, trainer: Trainer, module: Classifier, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        is_last = batch_idx + 1 == trainer.num_training_batches
        if is_last or (batch_idx + 1) % self.log_every == 0:
            self.progress.show_steps(batch_idx + 1, self._train_metrics(module))
        if is_last:
            self.clock.stop_epoch()

    def on_train_epoch_end(self, trainer: Trainer, module: Classifier) -> None:
        row = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            **self._train_metrics(module),
            "lr": module.rate(trainer.global_step - 1),
            **module.validation_metrics(),
            **as_metrics(self.monitor.means),
        }
        damaged = dict.fromkeys(place for places in gather(list(module.damaged)) for place in places)
        if self.table is None:
            return
        self.table.append(row)
        warnings = warnings_of(self.monitor.means)
        if len(damaged) > self._told_damaged:
            self._told_damaged = len(damaged)
            warnings.append(f"{self._told_damaged} damaged images were replaced: {', '.join(damaged)}")
        if self.events is not None:
            self.events.write(row, warnings)
        self.progress.show_epoch(row, warnings)

    def on_train_end(self, trainer: Trainer, module: Classifier) -> None:
        self.progress.stop()
        if self.events is not None:
            self.events.close()

    def on_exception(self, trainer: Trainer, module: Classifier, exception: BaseException) -> None:
        self.on_train_end(trainer, module)

    def _start_epoch(self, trainer: Trainer, fresh: bool) -> None:
        self.clock.start("epoch", fresh)
        self.progress.start_epoch(trainer.current_epoch + 1, trainer.max_epochs, trainer.num_training_batches)

    def _train_metrics(self, module: Classifier) -> dict[str, float]:
        metrics = module.train_metrics()  # synchronises with the device, so that the clock is right
        speed = module.train_images() / max(self.clock.seconds("epoch"), 1e-9)
        return {**metrics, "train/images_per_second": speed}
