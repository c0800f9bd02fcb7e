"""Trains as the command does, but in float64: what a sum's order changes then stays far below what a mistake does."""

import sys

import torch
from torch import nn

from vmoe.cli.train import main
from vmoe.data import Batch, ImageDataModule
from vmoe.training import run


def main_in_float64() -> int:
    """Runs the command with this process's arguments."""
    made, mixed = run.initial_model, ImageDataModule.on_after_batch_transfer

    def double_model(*arguments) -> nn.Module:
        model = made(*arguments).double()
        model.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(), *inputs[1:]))
        return model

    def double_targets(self, batch: Batch, dataloader_idx: int) -> Batch:
        batch = mixed(self, batch, dataloader_idx)
        targets = batch.targets
        return batch._replace(targets=targets.double() if isinstance(targets, torch.Tensor) else None)

    run.initial_model = double_model
    ImageDataModule.on_after_batch_transfer = double_targets
    return main(sys.argv[1:])


raise SystemExit(main_in_float64())
