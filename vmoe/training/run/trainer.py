"""Lightning's Trainer with the settings of all runs, and its device."""

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import LightningEnvironment

from vmoe.errors import UserError
from vmoe.training.config import TrainConfig
from vmoe.training.parallel.folder_writer import FolderWriter
from vmoe.training.parallel.process import Process, cluster_environment
from vmoe.training.parallel.strategies import strategy_of
from vmoe.training.run.checkpoints import AtomicCheckpointIO

_PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def new_trainer(
    config: TrainConfig,
    device: torch.device,
    callbacks: list[Any],
    writer: FolderWriter,
    loggers: Sequence[Logger] = (),
) -> Trainer:
    """A Trainer without Lightning's own checkpoints, progress bar and files: this package provides them."""
    process = Process.this()
    return Trainer(
        accelerator=device.type,
        devices=process.local_world_size,
        num_nodes=process.world_size // process.local_world_size,
        strategy=strategy_of(config, process.world_size, writer),
        use_distributed_sampler=False,
        precision=lightning_precision(config),
        max_epochs=config.trainer.epochs,
        accumulate_grad_batches=config.trainer.accumulate,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO(), cluster_environment() or LightningEnvironment()],
        inference_mode=False,  # so that the test reuses the graphs that validation compiled
        num_sanity_val_steps=0,  # it would draw random numbers that a resumed run does not
        logger=list(loggers) or False,
        log_every_n_steps=config.trainer.log_every,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def lightning_precision(config: TrainConfig) -> str:
    """Lightning's name of a run's precision."""
    return _PRECISIONS[config.trainer.precision]


def device_of(config: TrainConfig) -> torch.device:
    """The device of this rank.

    Raises:
        UserError: The device is missing, or the config does not work on it.
    """
    process = Process.this()
    wanted = config.trainer.device
    if process.world_size > 1 and config.parallel.strategy == "none":
        raise UserError(
            f"--parallel.strategy none: there are {process.world_size} processes; use auto, ddp, fsdp or expert",
            everywhere=True,
        )
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--trainer.device cuda: no usable GPU here; use cpu or auto")
    if wanted == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("--trainer.device mps: there is no usable GPU of Apple's here; use cpu or auto")
        if process.world_size > 1:
            raise UserError("--trainer.device mps: trains in one process only; use cpu", everywhere=True)
        if config.data.pipeline == "device":
            raise UserError("--data.pipeline device: does not go with --trainer.device mps; use workers")
        return torch.device("mps")
    device = torch.device("cpu")
    if wanted != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", process.local_rank) if process.world_size > 1 else torch.device("cuda")
    if device.type == "cpu" and config.trainer.precision == "fp16":
        raise UserError("--trainer.precision fp16: needs a GPU, and there is none here; use bf16 or 32")
    return device


class quiet_lightning(warnings.catch_warnings):
    """Silences Lightning's hints on hardware, loaders and resumption; this package handles all of them."""

    def __enter__(self) -> None:
        super().__enter__()
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module="lightning")
