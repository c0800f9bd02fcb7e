"""The loggers of Lightning that a run's `trainer.loggers` asks for, beside the files in its folder."""

from typing import Any

from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import Logger

from vmoe.checkpoints import RunFolder, flatten
from vmoe.config_values import to_plain
from vmoe.errors import UserError
from vmoe.extras import require_module
from vmoe.training.config import TrainConfig, logger_options

_IN_FOLDER = ("csv", "tensorboard")  # which `Journal` writes, so that they go on where a resumed run left them


def require_loggers(config: TrainConfig) -> None:
    """Checks, before a run begins, that the packages of its loggers are installed.

    Raises:
        MissingExtraError: one is not; the line has the command that installs it.
    """
    for name in logger_options(config.trainer.loggers):
        if name not in _IN_FOLDER:
            require_module(name)


def new_loggers(config: TrainConfig, folder: RunFolder) -> list[Logger]:
    """The loggers that a Trainer is given, with the run's config as their hyper-parameters.

    Raises:
        UserError: a logger does not take one of its options.
    """
    loggers = []
    for name, options in logger_options(config.trainer.loggers).items():
        if name in _IN_FOLDER:
            continue
        try:
            loggers.append(_new_logger(name, folder, options))
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"trainer.loggers: {name} cannot be made with {options} ({reason})") from error
    for logger in loggers:
        logger.log_hyperparams(flatten(to_plain(config)))
    return loggers


def rate_monitors(loggers: list[Logger]) -> list[LearningRateMonitor]:
    """What logs the learning rate, where there is a logger."""
    return [LearningRateMonitor()] if loggers else []


def _new_logger(name: str, folder: RunFolder, options: dict[str, Any]) -> Logger:
    if name == "wandb":
        from lightning.pytorch.loggers import WandbLogger

        return WandbLogger(**{"save_dir": str(folder.path), "name": folder.path.name, **options})
    from lightning.pytorch.loggers import MLFlowLogger

    return MLFlowLogger(**{"save_dir": str(folder.path / "mlruns"), "run_name": folder.path.name, **options})
