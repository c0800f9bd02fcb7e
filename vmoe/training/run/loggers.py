"""The loggers of Lightning that a run's `trainer.loggers` asks for, beside the files in its folder."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger

from vmoe.checkpoints import RunFolder, flatten
from vmoe.config_values import to_plain
from vmoe.errors import UserError
from vmoe.extras import require_module
from vmoe.training.config import TrainConfig, logger_options

_IN_FOLDER = ("csv", "tensorboard")  # which `Journal` writes, so that they go on where a resumed run left them
_MLFLOW_URI = "MLFLOW_TRACKING_URI"


def require_loggers(config: TrainConfig) -> None:
    """Checks, before a run begins, that the packages of its loggers are installed.

    Raises:
        MissingExtraError: one is not; the line has the command that installs it.
    """
    for name in logger_options(config.trainer.loggers):
        if name not in _IN_FOLDER:
            require_module(name)


@contextmanager
def open_loggers(config: TrainConfig, folder: RunFolder) -> Iterator[list[Logger]]:
    """The loggers that a Trainer is given, with the run's config as their hyper-parameters; they end with the block.

    Raises:
        UserError: a logger does not take one of its options, or cannot begin.
    """
    loggers: list[Logger] = []
    failed, tracking_uri = 1, os.environ.get(_MLFLOW_URI)
    of_user = getattr(sys.modules.get("wandb"), "run", None)  # begun before, which `WandbLogger` then goes on with
    try:
        for name, options in logger_options(config.trainer.loggers).items():
            if name in _IN_FOLDER:
                continue
            try:
                logger = _new_logger(name, folder, options)
                loggers.append(logger)
                logger.log_hyperparams(flatten(to_plain(config)))
            except Exception as error:  # their packages raise types of their own
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"trainer.loggers: {name} cannot begin with {options} ({reason})") from error
        yield loggers
        failed = 0
    finally:
        for logger in loggers:
            # Else the next run of this process would go on with this one's
            if isinstance(logger, WandbLogger) and of_user is None:
                logger.experiment.finish(failed)
        if tracking_uri is None:  # MLflow sets it to this run's
            os.environ.pop(_MLFLOW_URI, None)


def rate_monitors(loggers: list[Logger]) -> list[LearningRateMonitor]:
    """What logs the learning rate, where there is a logger."""
    return [LearningRateMonitor()] if loggers else []


def _new_logger(name: str, folder: RunFolder, options: dict[str, Any]) -> Logger:
    if name == "wandb":
        return WandbLogger(**{"save_dir": str(folder.path), "name": folder.path.name, **options})
    own = {"run_name": folder.path.name, "tracking_uri": os.environ.get(_MLFLOW_URI)}
    if own["tracking_uri"] is None and not {"tracking_uri", "save_dir"} & options.keys():
        path = folder.path.resolve()
        own |= {"tracking_uri": f"sqlite:///{path / 'mlflow.db'}", "artifact_location": (path / "mlruns").as_uri()}
    return MLFlowLogger(**(own | options))
