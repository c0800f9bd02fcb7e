"""One process of a measurement, as torchrun starts it: does the jobs of a file and prints a row, as JSON, for each.

    torchrun --nproc-per-node 2 -m vmoe.bench.scaling.worker JOBS.pickle

A process that fails prints a row that says so and ends. torchrun then ends the others, which may wait for it.
"""

import json
import os
import pickle
import statistics
import sys
import time
import traceback
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from vmoe.bench.report import Row
from vmoe.bench.scaling.jobs import NUM_CLASSES, ScalingJob
from vmoe.bench.scaling.report import differences_from_one
from vmoe.bench.timing import release
from vmoe.checkpoints import build_model
from vmoe.config_values import to_plain
from vmoe.data import Batch
from vmoe.memory import is_out_of_memory
from vmoe.training.callbacks import NanGuard
from vmoe.training.classifier import Classifier
from vmoe.training.parallel import cut_of
from vmoe.training.processes import Place, connect, disconnect, gather, total
from vmoe.training.sample_draws import SampleDraws
from vmoe.training.sharded_files import FolderWriter
from vmoe.training.summary import peak_memory_mib
from vmoe.training.trainer import new_trainer, quiet_lightning

_UNTIMED = 5  # updates before the timed ones: kernels are compiled, and a graph is captured in the fourth


def main(path: Path) -> None:
    """Does the jobs of a file that `launch` wrote."""
    device, scratch, jobs = pickle.loads(path.read_bytes())
    if device.type == "cuda":
        device = torch.device("cuda", Place.of_this().local_rank)
        torch.cuda.set_device(device)
    # TF32 would round float32 products differently as the number of processes changes their sizes
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    connect(device.type)
    for job in jobs:
        start = time.monotonic()
        try:
            row = {"state": "done"} | (_speed_row if job.part == "speed" else _compared_row)(job, device, scratch)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            row = {"state": "no room" if is_out_of_memory(error) else "failed", "error": reason}
            traceback.print_exc()
        if Place.of_this().is_first or "error" in row:
            print(json.dumps(row | {"seconds": time.monotonic() - start}), flush=True)
        if "error" in row:
            os._exit(1)  # an ordinary exit would wait for the other processes, which wait for this one
        release(device)
    disconnect()


def _compared_row(job: ScalingJob, device: torch.device, scratch: Path) -> Row:
    """How far the results are from those of one process; in the part "checkpoint", half of the training is resumed."""
    result, save = TrainingResult(), TimedSave(scratch / f"{job.layout} {job.layout.processes}.ckpt")
    if job.part == "equality":
        train_on_noise(job, device, job.steps, [result])
    elif job.layout.processes == 1:
        train_on_noise(job, device, job.steps, [result, save], epochs=2)
    else:
        train_on_noise(job, device, job.steps, [save])
        train_on_noise(job, device, job.steps, [result], epochs=2, resume_from=save.path)
    row = {"losses": result.losses} | save.row
    reference = scratch / f"{job.part} {job.dtype}.pt"
    if not Place.of_this().is_first:
        return {}
    if job.layout.processes == 1:
        torch.save(result.content, reference)
    elif reference.exists():
        row |= differences_from_one(result.content, torch.load(reference), job.dtype)
    return row


def _speed_row(job: ScalingJob, device: torch.device, scratch: Path) -> Row:
    """The times of the slowest process, and the largest memory."""
    watch = Stopwatch(device)
    train_on_noise(job, device, _UNTIMED + job.steps, [watch])
    every = gather((watch.times(), peak_memory_mib(device)))
    slowest = max((times for times, _ in every), key=statistics.median)
    step_ms = statistics.median(slowest)
    low, _, high = statistics.quantiles(slowest, n=4, method="inclusive")
    return {
        "step_ms": step_ms,
        "spread": (high - low) / 2 / step_ms,
        "images_per_second": job.batch / step_ms * 1e3,
        "images_per_second_per_process": job.batch / step_ms * 1e3 / job.layout.processes,
        "peak_mib": max(peak for _, peak in every),
    }


def train_on_noise(
    job: ScalingJob, device: torch.device, steps: int, callbacks: list[Callback], epochs: int = 1,
    resume_from: Path | None = None,
) -> None:  # fmt: skip
    """Trains on random images by the trainer of `vmoe train`; the callbacks keep what is measured.

    Args:
        job: The training.
        device: Device of this process.
        steps: Updates per epoch.
        callbacks: Callbacks of the trainer.
        epochs: Epochs after which it stops. The learning rate of the part "checkpoint" is planned for two.
        resume_from: A checkpoint to go on from.
    """
    config = job.config(device.type, epochs)
    torch.manual_seed(0)
    # Small models are made on the CPU, so that they start alike on every device
    with torch.device(device if job.part == "speed" else "cpu"):
        model = build_model(job.model.name, job.model.kwargs, job.moe(), NUM_CLASSES, job.model.image_size)
    if job.dtype == "float64":
        model.double()
    draws = SampleDraws(0) if config.parallel.draws == "sample" else None
    if draws is not None:
        draws.install(model)
    if job.compiled:
        model.compile(dynamic=False)
    cut = cut_of(config.parallel, job.layout.processes, device.type)
    planned = 2 if job.part == "checkpoint" else epochs
    module = PlannedClassifier(model, **to_plain(config.optim))
    module.updates, module.draws, module.shard = planned * steps, draws, cut
    if job.graphed:
        module.capture_steps()
    batches = [_random_batch(job, number, device) for number in range(1 if job.part == "speed" else steps)]
    loader = DataLoader(batches * (steps // len(batches)), batch_size=None, collate_fn=lambda batch: batch)
    with quiet_lightning():
        trainer = new_trainer(config, device, Place.of_this(), [NanGuard(), *callbacks, ReleaseModel()], FolderWriter())
        trainer.fit(module, loader, ckpt_path=resume_from, weights_only=True)


class PlannedClassifier(Classifier):
    """Plans its learning rate for a number of updates that its Trainer may not reach."""

    updates = 0

    def planned_updates(self) -> int:
        return self.updates


def _random_batch(job: ScalingJob, number: int, device: torch.device) -> Batch:
    """This process's images of a batch: each by a seed of its own, so that they are the same for any processes."""
    place, side = Place.of_this(), job.model.image_size
    own = job.batch // place.count
    images, labels, keys = [], [], []
    for index in range(place.rank * own, place.rank * own + own):
        draw = torch.Generator().manual_seed(number * job.batch + index)
        images.append(torch.randn(3, side, side, generator=draw))
        labels.append(torch.randint(NUM_CLASSES, (), generator=draw))
        keys.append(torch.tensor([number, index]))
    dtype = torch.float64 if job.dtype == "float64" else torch.float32
    return Batch(
        torch.stack(images).to(device, dtype), torch.stack(labels).to(device), [], keys=torch.stack(keys).to(device)
    )


class ReleaseModel(Callback):
    """Lets go of model and optimiser at the end, which the trainer would otherwise move to the host."""

    def on_fit_end(self, trainer: Trainer, module: Classifier) -> None:
        module.model = nn.Identity()
        trainer.strategy.optimizers = []


class TrainingResult(Callback):
    """Losses, weights and the first moments of the gradients, of all processes."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.content: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: Trainer, module: Classifier, outputs: Any, *_: Any) -> None:
        self.losses.append(float(total(outputs["loss"].detach().double()) / Place.of_this().count))

    def on_train_end(self, trainer: Trainer, module: Classifier) -> None:
        states, parameters = trainer.optimizers[0].state, dict(module.model.named_parameters())
        self.content = {
            "losses": self.losses,
            "weights": {name: _on_host(parameter) for name, parameter in parameters.items()},
            "moments": {name: _on_host(states[parameter]["exp_avg"]) for name, parameter in parameters.items()},
        }


def _on_host(tensor: Tensor) -> Tensor:
    """A copy on the host, gathered where it is sharded; all processes must call it."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().clone()


class TimedSave(Callback):
    """Saves a checkpoint at the end of each epoch, and keeps how long that took and how large it is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.row: Row = {}

    def on_train_epoch_end(self, trainer: Trainer, module: Classifier) -> None:
        gather(None)  # waits for the other processes
        start = time.perf_counter()
        trainer.save_checkpoint(self.path)
        gather(None)
        files = [self.path, *self.path.rglob("*")]
        size = sum(file.stat().st_size for file in files if file.is_file())
        self.row = {"save_seconds": time.perf_counter() - start, "checkpoint_mib": size / 2**20}


class Stopwatch(Callback):
    """Marks the time at the beginning of each update and at the end of the last."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, module: Classifier, batch: Batch, batch_idx: int) -> None:
        if self.device.type == "cuda" and batch_idx == 1:  # before a graph takes its memory, which replays do not
            torch.cuda.reset_peak_memory_stats(self.device)
        self._mark()

    def on_train_end(self, trainer: Trainer, module: Classifier) -> None:
        self._mark()

    def _mark(self) -> None:
        if self.device.type == "cuda":
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def times(self) -> list[float]:
        """Milliseconds of each update after the untimed ones."""
        pairs = pairwise(self._marks[_UNTIMED:])
        if self.device.type != "cuda":
            return [(end - start) * 1e3 for start, end in pairs]
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) for start, end in pairs]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
