"""One process of a measurement, which torchrun starts. It does the jobs of a file and prints a JSON row for each.

    torchrun --nproc-per-node 2 -m vmoe.bench.scaling.worker JOBS.pickle

A process that fails prints a row with the reason and ends. torchrun then ends the others, which may wait for it. It
starts all of them again, and they continue with the next job.
"""

import json
import os
import pickle
import statistics
import sys
import threading
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
from vmoe.checkpoints import describe
from vmoe.data import Batch
from vmoe.memory import is_out_of_memory
from vmoe.training.callbacks import NanGuard
from vmoe.training.classifier import Classifier
from vmoe.training.parallel.collectives import connect, disconnect, gather, total
from vmoe.training.parallel.folder_writer import FolderWriter
from vmoe.training.parallel.process import Process
from vmoe.training.parallel.strategies import sharding_of
from vmoe.training.run.model import new_module
from vmoe.training.run.summary import peak_memory_mib
from vmoe.training.run.trainer import new_trainer, quiet_lightning

_UNTIMED = 5  # updates before the timed ones: kernels are compiled, and a graph is captured in the fourth


def main(path: Path) -> None:
    """Does the jobs of a file that `launch` wrote. After a restart it continues after the last started job."""
    device, scratch, job_seconds, jobs = pickle.loads(path.read_bytes())
    is_first = Process.this().is_first
    if device.type == "cuda":
        device = torch.device("cuda", Process.this().local_rank)
        torch.cuda.set_device(device)
    # TF32 rounds float32 products differently when the number of processes changes their sizes
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    connect(device.type)
    begun = path.with_suffix(".begun")
    (done, *_) = gather(int(begun.read_text()) if is_first and begun.exists() else 0)
    for number, job in list(enumerate(jobs))[done:]:
        if is_first:
            begun.write_text(str(number + 1))
        start = time.monotonic()
        late = {"state": "failed", "error": f"took longer than {job_seconds:g} s"}
        timer = threading.Timer(job_seconds, _print_row, [late, number, start])
        timer.daemon = True
        timer.start()
        try:
            row = {"state": "done"} | (_speed_row if job.part == "speed" else _compared_row)(job, device, scratch)
        except Exception as error:
            traceback.print_exc()
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            row = {"state": "no room" if is_out_of_memory(error) else "failed", "error": reason}
        timer.cancel()
        if is_first or "error" in row:
            _print_row(row, number, start)
        release(device)
    disconnect()


def _print_row(row: Row, number: int, start: float) -> None:
    """Prints the row of a job. If the job failed, it ends the process."""
    print(json.dumps(row | {"job": number, "seconds": time.monotonic() - start}), flush=True)
    if row["state"] != "done":
        os._exit(1)  # an ordinary exit would wait for the other processes, which wait for this one


def _compared_row(job: ScalingJob, device: torch.device, scratch: Path) -> Row:
    """The differences from one process. In the part "checkpoint", half of the training is resumed."""
    process, result = Process.this(), TrainingResult()
    if job.part == "equality":
        train_on_noise(job, device, job.steps, [result])
        row = {}
    else:
        save = TimedSave(scratch / f"{job.layout} {process.world_size}.ckpt")
        train_on_noise(job, device, job.steps, [result, save], epochs=2)
        row = save.row
        if process.world_size > 1:
            result = TrainingResult()
            train_on_noise(job, device, job.steps, [result], epochs=2, resume_from=save.path)
    reference = scratch / f"{job.part} {job.dtype}.pt"
    if process.is_first and process.world_size == 1:
        torch.save(result.content, reference)
    elif process.is_first and reference.exists():
        row |= differences_from_one(result.content, torch.load(reference), job.dtype)
    return row | {"losses": result.losses}


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
    """Trains on random images by the trainer of `vmoe train`, with `steps` updates per epoch.

    The callbacks keep the measurements. `resume_from` is a checkpoint to resume from.
    """
    config = job.config(device.type, epochs)
    torch.manual_seed(0)
    # small models are made on the CPU, so that they start with the same weights on every device
    with torch.device(device if job.part == "speed" else "cpu"):
        model = job.workload.build()
    if job.dtype == "float64":
        model.double()
    shard, facts = sharding_of(config.parallel, job.layout.processes, device.type), None
    if job.part == "checkpoint":  # before sharding: a sharded model cannot be described
        facts = describe(model, list(map(str, range(NUM_CLASSES))), name=job.model.name, kwargs=job.model.kwargs)
    module = new_module(config, model, shard, None, facts)
    batches = [_random_batch(job, number, device) for number in range(1 if job.part == "speed" else steps)]
    loader = DataLoader(batches * (steps // len(batches)), batch_size=None, collate_fn=lambda batch: batch)
    with quiet_lightning():
        trainer = new_trainer(config, device, [NanGuard(), *callbacks, ReleaseModel()], FolderWriter())
        trainer.fit(module, loader, ckpt_path=resume_from, weights_only=True)


def _random_batch(job: ScalingJob, number: int, device: torch.device) -> Batch:
    """This process's images of a batch, which is the same for any number of processes."""
    process, side = Process.this(), job.model.image_size
    own = slice(process.rank * job.batch // process.world_size, (process.rank + 1) * job.batch // process.world_size)
    draw = torch.Generator().manual_seed(number)
    images = torch.randn(job.batch, 3, side, side, generator=draw)[own]
    labels = torch.randint(NUM_CLASSES, (job.batch,), generator=draw)[own]
    keys = torch.tensor([[number, index] for index in range(job.batch)])[own]
    dtype = torch.float64 if job.dtype == "float64" else torch.float32
    return Batch(images.to(device, dtype), labels.to(device), [], keys=keys.to(device))


class ReleaseModel(Callback):
    """Drops model and optimiser at the end; otherwise the trainer would move them to the host."""

    def on_fit_end(self, trainer: Trainer, module: Classifier) -> None:
        module.model = nn.Identity()
        trainer.strategy.optimizers = []


class TrainingResult(Callback):
    """Keeps losses, weights and the first moments of the gradients of all processes."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.content: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: Trainer, module: Classifier, outputs: Any, *_: Any) -> None:
        self.losses.append(float(total(outputs["loss"].detach().double()) / Process.this().world_size))

    def on_train_end(self, trainer: Trainer, module: Classifier) -> None:
        states, parameters = trainer.optimizers[0].state, dict(module.model.named_parameters())
        self.content = {
            "losses": self.losses,
            "weights": {name: _on_host(parameter) for name, parameter in parameters.items()},
            "moments": {name: _on_host(states[parameter]["exp_avg"]) for name, parameter in parameters.items()},
        }


def _on_host(tensor: Tensor) -> Tensor:
    """A copy on the host, gathered if it is sharded. All processes must call it."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().clone()


class TimedSave(Callback):
    """Saves a checkpoint after the first epoch, and keeps its time and size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.row: Row = {}

    def on_train_epoch_end(self, trainer: Trainer, module: Classifier) -> None:
        if trainer.current_epoch > 0:
            return
        gather(None)  # waits for the other processes
        start = time.perf_counter()
        trainer.save_checkpoint(self.path)
        gather(None)
        files = [self.path, *self.path.rglob("*")]
        size = sum(file.stat().st_size for file in files if file.is_file())
        self.row = {"save_seconds": time.perf_counter() - start, "checkpoint_mib": size / 2**20}


class Stopwatch(Callback):
    """Records the time at the start of each update and at the end of the last."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, module: Classifier, batch: Batch, batch_idx: int) -> None:
        if self.device.type == "cuda" and batch_idx == 1:  # before a graph is captured; replays take no memory
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
