"""The loggers of Lightning that `trainer.loggers` names, beside the files in a run's folder."""

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

_IN_FOLDER = ("csv", "tensorboard")  # `Journal` writes these, so that a resumed run continues them
_MLFLOW_URI = "MLFLOW_TRACKING_URI"


def require_loggers(config: TrainConfig) -> None:
    """Checks, before a run starts, that the packages of its loggers are installed.

    Raises:
        MissingExtraError: A package is missing. The message has the command that installs it.
    """
    for name in logger_options(config.trainer.loggers):
        if name not in _IN_FOLDER:
            require_module(name)


@contextmanager
def open_loggers(config: TrainConfig, folder: RunFolder) -> Iterator[list[Logger]]:
    """The Trainer's loggers, with the run's config as hyper-parameters. They are closed at the end of the context.

    Raises:
        UserError: A logger does not accept one of its options, or cannot start.
    """
    loggers: list[Logger] = []
    failed, tracking_uri = 1, os.environ.get(_MLFLOW_URI)
    of_user = getattr(sys.modules.get("wandb"), "run", None)  # the user's own W&B run, which WandbLogger continues
    try:
        for name, options in logger_options(config.trainer.loggers).items():
            if name in _IN_FOLDER:
                continue
            try:
                logger = _new_logger(name, folder, options)
                loggers.append(logger)
                logger.log_hyperparams(flatten(to_plain(config)))
            except Exception as error:  # the loggers' packages raise types of their own
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"trainer.loggers: {name} cannot begin with {options} ({reason})") from error
        yield loggers
        failed = 0
    finally:
        for logger in loggers:
            # else the next run in this process would continue this W&B run
            if isinstance(logger, WandbLogger) and of_user is None:
                logger.experiment.finish(failed)
        if tracking_uri is None:  # MLflow has set it to this run's
            os.environ.pop(_MLFLOW_URI, None)


def rate_monitors(loggers: list[Logger]) -> list[LearningRateMonitor]:
    """The callbacks that log the learning rate; none without a logger."""
    return [LearningRateMonitor()] if loggers else []


def _new_logger(name: str, folder: RunFolder, options: dict[str, Any]) -> Logger:
    if name == "wandb":
        return WandbLogger(**{"save_dir": str(folder.path), "name": folder.path.name, **options})
    own = {"run_name": folder.path.name, "tracking_uri": os.environ.get(_MLFLOW_URI)}
    if own["tracking_uri"] is None and not {"tracking_uri", "save_dir"} & options.keys():
        path = folder.path.resolve()
        own |= {"tracking_uri": f"sqlite:///{path / 'mlflow.db'}", "artifact_location": (path / "mlruns").as_uri()}
    return MLFlowLogger(**(own | options))
