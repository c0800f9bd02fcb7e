"""Trains as the command does, but in float64, so that effects of the order of sums stay far below those of mistakes.

Environment variables control it. Before the update SIGNAL_AT the rank SIGNALLED_RANK gets the signal SIGNAL, or can no
longer write files above FILE_BYTES. At the update NAN_AT the images are NaN. An update takes STEP_SECONDS more. The
shards of a rank take WRITE_SECONDS more to write, and a printed line gives the update at that time. With UNCAPTURED
the step of `trainer.cuda_graph` runs uncaptured, on the CPU. At its end each process prints its number of gloo threads.
"""

import os
import resource
import sys
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from gloo_threads import gloo_threads
from torch import nn

from vmoe.cli.train import main
from vmoe.data import Batch, ImageDataModule
from vmoe.training import classifier
from vmoe.training.classifier import Classifier
from vmoe.training.config import TrainConfig
from vmoe.training.run import model, train

DEFAULTS = {"SIGNAL_AT": "-1", "SIGNALLED_RANK": "0", "RANK": "0", "NAN_AT": "-1", "STEP_SECONDS": "0"}


def main_in_float64(arguments: list[str]) -> int:
    """Runs the command with these arguments."""
    made, mixed = model.initial_model, ImageDataModule.on_after_batch_transfer

    def double_model(config: TrainConfig, *others) -> nn.Module:
        double = made(config, *others).double()
        print(f"made on {next(double.parameters()).device.type}", file=sys.stderr)
        double.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(), *inputs[1:]))
        return double

    def double_targets(self, batch: Batch, dataloader_idx: int) -> Batch:
        batch = mixed(self, batch, dataloader_idx)
        targets = batch.targets
        return batch._replace(targets=targets.double() if isinstance(targets, torch.Tensor) else None)

    step, update = Classifier.training_step, -1

    def failing_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        nonlocal update
        update = self.global_step
        environment = {**DEFAULTS, **os.environ}
        time.sleep(float(environment["STEP_SECONDS"]))
        if update == int(environment["NAN_AT"]):
            batch = batch._replace(images=batch.images * torch.nan)
        is_mine = environment["RANK"] == environment["SIGNALLED_RANK"]
        is_first_start = environment.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if self.global_step == int(environment["SIGNAL_AT"]) and is_mine and is_first_start:
            if "SIGNAL" in environment:
                os.kill(os.getpid(), int(environment["SIGNAL"]))
            else:
                limit = int(environment["FILE_BYTES"])
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return step(self, batch, batch_idx)

    write = dcp.FileSystemWriter.write_data

    def slow_write(self, *arguments):
        if "WRITE_SECONDS" in os.environ:
            time.sleep(float(os.environ["WRITE_SECONDS"]))
            print(f"{Path(self.path).name}: written in update {update}", file=sys.stderr)
        return write(self, *arguments)

    if "UNCAPTURED" in os.environ:
        classifier.GraphedStep = lambda captured: captured
        train.device_of = lambda config: torch.device("cpu")
        train._without_cuda = lambda config, progress: config
    dcp.FileSystemWriter.write_data = slow_write
    Classifier.training_step = failing_step
    model.initial_model = double_model
    ImageDataModule.on_after_batch_transfer = double_targets
    return main(arguments)


try:
    code = main_in_float64(sys.argv[1:])
finally:
    print(f"threads of gloo at the end: {gloo_threads()}", file=sys.stderr)
raise SystemExit(code)
