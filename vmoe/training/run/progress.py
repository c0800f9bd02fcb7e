"""The terminal output: a line per epoch, and in a terminal a bar over an epoch's steps."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from vmoe.text import printable


class TrainingProgress:
    """Shows loss, accuracy and images per second while a run trains.

    Lightning's RichProgressBar leaves no line per epoch in a log file, and reads metrics from the device at each step.

    Args:
        quiet: Whether to show nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet)
        self._bar: Bar | None = None

    def start_epoch(self, epoch: int, epochs: int, steps: int) -> None:
        self.stop()
        self._title = f"epoch {epoch}/{epochs}"
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, TextColumn("{task.fields[metrics]}"), console=self.console, transient=True)
            self._task = self._bar.add_task(self._title, total=steps, metrics="")
            self._bar.start()

    def show_steps(self, done: int, metrics: dict[str, float]) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, metrics=_train_text(metrics))

    def show_epoch(self, row: dict[str, float], warnings: list[str]) -> None:
        self.stop()
        epoch = f"{self._title:>15}  {_train_text(row)}"
        if "val/loss" in row:
            epoch += f"  val loss {row['val/loss']:.3f}  {_accuracy(row, 'val')}"
        if "val/raw_top1" in row:
            epoch += f" (by EMA; raw {row['val/raw_top1']:.2%})"
        self.log(epoch)
        for line in warnings:
            self.log(f"warning: {line}")

    def log(self, line: str) -> None:
        """Prints a line as it is: never wrapped, without markup and terminal commands."""
        self.console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _train_text(metrics: dict[str, float]) -> str:
    speed = metrics["train/images_per_second"]
    return f"loss {metrics['train/loss']:.3f}  {_accuracy(metrics, 'train')}  {speed:,.0f} img/s"


def _accuracy(metrics: dict[str, float], split: str) -> str:
    """The text of the accuracy: top-1; with several classes per image mAP, or F1 in training."""
    names = {"top1": "top-1", "mAP": "mAP", "f1": "F1"}
    name = next(name for name in names if f"{split}/{name}" in metrics)
    return f"{names[name]} {metrics[f'{split}/{name}']:7.2%}"
