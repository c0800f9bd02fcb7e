"""One training on synthetic images by the trainer of all runs, and what is read while it goes."""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vmoe.bench.scaling.exchange import Profile, Shares
from vmoe.bench.scaling.jobs import CLASSES, Job
from vmoe.checkpoints import ENTRY, build_model, new_entry
from vmoe.data import Batch
from vmoe.training.module import Classifier
from vmoe.training.parallel import cut_of
from vmoe.training.processes import Place, total
from vmoe.training.sample_draws import SampleDraws
from vmoe.training.sharded_files import FolderWriter
from vmoe.training.summary import peak_memory_mib
from vmoe.training.trainer import new_trainer, quiet_lightning

WARM_UP = 5  # updates that are not timed; the last of them is watched for waits
PROFILED = 2
SEED = 0
_WAITS = "called a synchronizing CUDA operation"  # what torch says of it


class Images:
    """Random images and labels of this process, made once on the device; groups are those of the global batch.

    Args:
        job: The training.
        count: Batches.
        device: Where they lie.
        different: Each batch has images of its own.
    """

    def __init__(self, job: Job, count: int, device: torch.device, different: bool) -> None:
        place = Place.of_this()
        self.count = count
        side, own = job.model.image_size, job.batch // place.count
        dtype = torch.float64 if job.dtype == "float64" else torch.float32
        self._batches = []
        for number in range(count if different else 1):
            # Where results are compared, each process draws all and takes its own; else on the device, which is faster
            where, size = ("cpu", job.batch) if different else (device, own)
            draw = torch.Generator(where).manual_seed(SEED + number + (0 if different else place.rank))
            images = torch.randn(size, 3, side, side, generator=draw, device=where)
            labels = torch.randint(CLASSES, (size,), generator=draw, device=where)
            keys = torch.stack([torch.full((size,), number), torch.arange(size)], 1)
            first = place.rank * own if different else 0
            images, labels, keys = (part[first : first + own].to(device) for part in (images, labels, keys))
            self._batches.append(Batch(images.to(dtype), labels, [], keys=keys))

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        return (self._batches[number % len(self._batches)] for number in range(self.count))


@dataclass
class Speed:
    """Of this process.

    Attributes:
        step_ms: Median time of an update.
        spread: Half the distance of the quartiles, as a share of it.
        peak_mib: Memory at most: allocated on a GPU, else of the process.
        waits: Where the host waited for the device in one update; None off CUDA.
        shares: Of the step's time in the exchange between processes; None where it was not profiled.
    """

    step_ms: float
    spread: float
    peak_mib: float
    waits: list[str] | None
    shares: Shares | None = None


def train(
    job: Job,
    device: torch.device,
    images: Images,
    callbacks: list[Callback],
    *,
    model: nn.Module | None = None,
    cut: Callable[[nn.Module], None] | None = None,
    epochs: int = 1,
    epochs_in_all: int = 1,
    resume_from: Path | None = None,
) -> None:
    """Trains through `images` once an epoch; what is found out is in the callbacks.

    Args:
        job: The training.
        device: Of this process.
        images: Its batches.
        callbacks: Of the trainer.
        model: The model, where not the job's own with random weights.
        cut: What cuts it, where not its strategy's.
        epochs: After which it stops.
        epochs_in_all: For which the learning rate is planned.
        resume_from: A checkpoint to go on from.
    """
    config = job.config(device.type, epochs)
    model = new_model(job, device) if model is None else model
    draws = SampleDraws(SEED) if config.parallel.draws == "sample" else None
    if draws is not None:
        draws.install(model)
    cut = cut or cut_of(config.parallel, job.processes, device.type)
    if config.trainer.compile:
        model.compile(dynamic=False)
    graphed = config.trainer.cuda_graph
    module = Classifier(model, config.optim, epochs_in_all, len(images), cuda_graph=graphed, draws=draws, cut=cut)
    with quiet_lightning():
        trainer = new_trainer(config, device, Place.of_this(), [*callbacks, _Forgets()], FolderWriter())
        trainer.fit(module, images, ckpt_path=resume_from, weights_only=True)


def new_model(job: Job, device: torch.device) -> nn.Module:
    """A job's model with random weights, the same in all processes."""
    torch.manual_seed(SEED)
    # Small ones on the CPU, so that they start alike everywhere
    with torch.device(device if job.part == "speed" else "cpu"):
        model = build_model(job.model.name, job.model.kwargs, job.moe(), CLASSES, job.model.image_size)
    return model.double() if job.dtype == "float64" else model


def measure_speed(job: Job, device: torch.device, profiled: bool) -> Speed:
    """Trains for so many updates and times them.

    Args:
        job: The training.
        device: Of this process.
        profiled: Looks with the profiler at two updates more, on a GPU.
    """
    watch = Stopwatch(job.steps, device, PROFILED if profiled and device.type == "cuda" else 0)
    images = Images(job, WARM_UP + job.steps + watch.profiled, device, different=False)
    train(job, device, images, [watch])
    return watch.result()


class Stopwatch(Callback):
    """Times the updates after the first few, and watches one for waits and a few for the exchange."""

    def __init__(self, steps: int, device: torch.device, profiled: int = 0, warm_up: int = WARM_UP) -> None:
        self.steps, self.device, self.profiled, self.warm_up = steps, device, profiled, warm_up
        self._marks: list[Any] = []
        self._waits: list[str] | None = None
        self._caught: warnings.catch_warnings | None = None
        self._profile = Profile()
        self._shares: Shares | None = None

    def on_train_batch_start(self, trainer: Trainer, module: Classifier, batch: Batch, batch_idx: int) -> None:
        if self.warm_up <= batch_idx <= self.warm_up + self.steps:
            self._mark()
        if self.device.type != "cuda":
            return
        if batch_idx == min(1, self.warm_up - 1):  # a graph takes its memory when it is captured, not in replays
            torch.cuda.reset_peak_memory_stats(self.device)
        if batch_idx == self.warm_up - 1:
            self._caught = warnings.catch_warnings(record=True)
            self._lines = self._caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        if batch_idx == self.warm_up + self.steps and self.profiled:
            self._profile.start()

    def on_train_batch_end(
        self, trainer: Trainer, module: Classifier, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if self._caught is not None:
            torch.cuda.set_sync_debug_mode("default")
            self._caught.__exit__(None, None, None)
            self._caught = None
            self._waits = [f"{line.filename}:{line.lineno}" for line in self._lines if _WAITS in str(line.message)]

    def on_train_end(self, trainer: Trainer, module: Classifier) -> None:
        if len(self._marks) == self.steps:  # no batch began after the last timed one
            self._mark()
        self._shares = self._profile.stop()

    def on_exception(self, trainer: Trainer, module: Classifier, exception: BaseException) -> None:
        self.on_train_batch_end(trainer, module, None, None, 0)

    def result(self) -> Speed:
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            times = [start.elapsed_time(end) for start, end in pairs]
        else:
            times = [(end - start) * 1e3 for start, end in pairs]
        low, _, high = statistics.quantiles(times, n=4, method="inclusive")
        median = statistics.median(times)
        return Speed(median, (high - low) / 2 / median, peak_memory_mib(self.device), self._waits, self._shares)

    def _mark(self) -> None:
        if self.device.type == "cuda":
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self._marks.append(mark)


class Outcome(Callback):
    """What a training came to: losses, weights, the moments of its gradients, and the routing; of all processes."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.content: dict[str, Any] = {}

    def on_train_batch_end(
        self, trainer: Trainer, module: Classifier, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.losses.append(float(total(outputs["loss"].detach().double()) / Place.of_this().count))

    def on_train_end(self, trainer: Trainer, module: Classifier) -> None:
        states = trainer.optimizers[0].state
        parameters = dict(module.model.named_parameters())
        self.content = {
            "losses": self.losses,
            "weights": {name: _whole(parameter) for name, parameter in parameters.items()},
            "moments": {name: _whole(states[parameter]["exp_avg"]) for name, parameter in parameters.items()},
            "routing": {name: loads for name, (loads, _, _) in module.routing.means().items()},
        }


class Saves(Callback):
    """Saves a checkpoint at the end of the first epoch, by which any number of processes can go on."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, module: Classifier) -> None:
        trainer.save_checkpoint(self.path)

    def on_save_checkpoint(self, trainer: Trainer, module: Classifier, checkpoint: dict[str, Any]) -> None:
        checkpoint[ENTRY] = new_entry(ema=None)


class _Forgets(Callback):
    """Lets go of model and optimiser, which the trainer would otherwise move to the host."""

    def on_fit_end(self, trainer: Trainer, module: Classifier) -> None:
        module.model = nn.Identity()
        trainer.strategy.optimizers = []

    def on_exception(self, trainer: Trainer, module: Classifier, exception: BaseException) -> None:
        self.on_fit_end(trainer, module)


def _whole(tensor: Tensor) -> Tensor:
    """A copy on the host, put together where processes have parts of it; all must call it."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().clone()
