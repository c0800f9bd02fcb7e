"""The job `vmoe benchmark data`: a config's data pipelines beside its model."""

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from vmoe.bench.data import DATA_COLUMNS, TrainingStep, endless, loader_rate, ready_batches
from vmoe.bench.plan.choice import AUTOCAST_DTYPES
from vmoe.bench.report import Row, markdown_table
from vmoe.bench.torchvision_data import torchvision_loader, torchvision_plan
from vmoe.checkpoints import build_model
from vmoe.cli.benchmark_jobs import Results
from vmoe.cli.train_options import parse
from vmoe.data import Batch, DataConfig, ImageDataModule
from vmoe.errors import UserError
from vmoe.sizes import height_and_width
from vmoe.training.config import TrainConfig


class _Source(NamedTuple):
    """A source of batches."""

    name: str
    pipeline: str
    workers: int
    loader: Callable[[], Iterable]  # its batches begin with the images
    batches: Callable[[], Iterator[Batch]]  # on the device, without end
    made: Callable[[Batch], Batch]  # a batch with its images, where a step that is captured makes them


def data(options: argparse.Namespace, overrides: list[str], results: Results) -> None:
    """The data pipelines of a config beside a training of its model on synthetic images."""
    if not options.seconds > 0:
        raise UserError(f"--seconds {options.seconds}: must be above 0")
    config = parse(["--config", options.config, *overrides])
    if options.torchvision:
        torchvision_plan(config.data)  # raises for unsupported options before any image is read
    # mixing stays on, as in most epochs
    plain = dataclasses.replace(config.data, mix=dataclasses.replace(config.data.mix, until=1.0))
    log = results.log(options.config)
    graphed = config.trainer.cuda_graph and options.device.type == "cuda"
    modules = _modules(options, plain, graphed, log)
    sources = [_own_pipeline(module, options.device) for module in modules]
    size = modules[0].image_size
    if options.torchvision:
        sources += [_torchvision(modules[0], workers, options.device) for workers in dict.fromkeys(options.workers)]
    step, synthetic = _config_training(config, modules[0], options.device, graphed)
    rows = []
    for source in sources:
        log(f"{source.name}, pipeline {source.pipeline}, {source.workers} workers")
        rows.append(_rate_of_source(source, step, synthetic, options.seconds, options.device))
    batch = config.data.batch_size
    table = (
        f"## {options.config}: {config.data.name}, {size} pixels, batches of {batch}, {config.model.name}\n\n"
        + markdown_table(DATA_COLUMNS, rows)
    )
    print(table + "\n")
    settings = {"config": options.config, "batch": batch, "image_size": size, "seconds": options.seconds}
    results.write("data", step.dtype, settings | {"rows": rows}, [table])
    print(f"data.json and data.md in {options.out}")


def _modules(
    options: argparse.Namespace, config: DataConfig, graphed: bool, log: Callable[[str], None]
) -> list[ImageDataModule]:
    """The chosen pipelines, each with the config's images and those of the shards, except those that do not fit."""
    chosen = [("workers", workers) for workers in dict.fromkeys(options.workers)] + [("device", max(options.workers))]
    chosen = [(pipeline, workers) for pipeline, workers in chosen if pipeline in options.pipelines]
    images = [config]
    if options.shards is not None:
        images.append(dataclasses.replace(config, name="webdataset", root=options.shards))
    modules = []
    for (pipeline, workers), source in itertools.product(chosen, images):
        changed = dataclasses.replace(source, pipeline=pipeline, workers=workers)
        module = ImageDataModule(changed, options.seed, options.device, in_step=graphed)
        try:
            module.prepare_data()
            module.setup("fit")
        except UserError as error:
            if not modules:
                raise
            log(f"left out: {error}")  # the set does not fit on the device
            continue
        modules.append(module)
    return modules


def _own_pipeline(module: ImageDataModule, device: torch.device) -> _Source:
    config = module.config
    return _Source(
        config.name, config.pipeline, config.workers, lambda: _complete(module),
        lambda: ready_batches(module, module.train_dataloader(), device), module.made,
    )  # fmt: skip


def _complete(module: ImageDataModule) -> Iterator[Batch]:
    """Yields training batches without end, with their images."""
    return map(module.made, endless(module.train_dataloader()))


def _torchvision(module: ImageDataModule, workers: int, device: torch.device) -> _Source:
    loader = torchvision_loader(module, workers)

    def batches() -> Iterator[Batch]:
        for images, labels in endless(loader):
            yield Batch(images.to(device, non_blocking=True), labels.to(device, non_blocking=True), [])

    return _Source("torchvision", "workers", workers, lambda: loader, batches, module.made)


def _config_training(
    config: TrainConfig, module: ImageDataModule, device: torch.device, graphed: bool
) -> tuple[TrainingStep, Batch]:
    """A step of the config's training, and a batch of synthetic images for it."""
    size, classes, batch = module.image_size, module.num_classes, config.data.batch_size
    with device:
        model = build_model(config.model.name, config.model.kwargs, config.moe, classes, size, module.channels)
        images = torch.randn(batch, module.channels or 3, *height_and_width(size))
        synthetic = Batch(images, torch.randint(classes, (batch,)), [])
    dtype = AUTOCAST_DTYPES[config.trainer.precision]
    return TrainingStep(model, device, dtype, config.trainer.compile, graphed), synthetic


def _rate_of_source(source: _Source, step: TrainingStep, synthetic: Batch, seconds: float, device: torch.device) -> Row:
    """The rate of a source's loader, of a training with it, and of the same training on synthetic images."""
    ahead = 2 * source.workers  # the batches that DataLoader prefetches
    rate = loader_rate(source.loader, seconds, ahead, device)
    on_synthetic = step.rate(endless([synthetic]), seconds)
    fed = step.rate(source.batches(), seconds, ahead, source.made)
    return {
        "source": source.name, "pipeline": source.pipeline, "workers": source.workers, **dataclasses.asdict(rate),
        "training_images_per_second": fed, "synthetic_images_per_second": on_synthetic,
        "share_of_synthetic": fed / on_synthetic, "share_of_model": rate.images_per_second / on_synthetic,
        "bound_by": "the data" if rate.images_per_second < on_synthetic else "the model",
    }  # fmt: skip
