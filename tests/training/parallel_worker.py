"""Trains as the command does, but in float64: what a sum's order changes then stays far below what a mistake does.

Before the update SIGNAL_AT the process of rank SIGNALLED_RANK gets the signal SIGNAL, where the environment says so, or
cannot write files of more than FILE_BYTES any more.
"""

import os
import resource
import sys

import torch
from torch import nn

from vmoe.cli.train import main
from vmoe.data import Batch, ImageDataModule
from vmoe.training import run
from vmoe.training.module import Classifier


def main_in_float64() -> int:
    """Runs the command with this process's arguments."""
    made, mixed = run.initial_model, ImageDataModule.on_after_batch_transfer

    def double_model(*arguments) -> nn.Module:
        model = made(*arguments).double()
        print(f"made on {next(model.parameters()).device.type}", file=sys.stderr)
        model.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(), *inputs[1:]))
        return model

    def double_targets(self, batch: Batch, dataloader_idx: int) -> Batch:
        batch = mixed(self, batch, dataloader_idx)
        targets = batch.targets
        return batch._replace(targets=targets.double() if isinstance(targets, torch.Tensor) else None)

    step = Classifier.training_step

    def failing_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        environment = {"SIGNAL_AT": "-1", "SIGNALLED_RANK": "0", "RANK": "0", **os.environ}
        is_mine = environment["RANK"] == environment["SIGNALLED_RANK"]
        is_first_start = environment.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if self.global_step == int(environment["SIGNAL_AT"]) and is_mine and is_first_start:
            if "SIGNAL" in environment:
                os.kill(os.getpid(), int(environment["SIGNAL"]))
            else:
                limit = int(environment["FILE_BYTES"])
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return step(self, batch, batch_idx)

    Classifier.training_step = failing_step
    run.initial_model = double_model
    ImageDataModule.on_after_batch_transfer = double_targets
    return main(sys.argv[1:])


raise SystemExit(main_in_float64())
