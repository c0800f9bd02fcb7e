"""What jobs over many images share: the run's data as the options change it, or image files; and a progress bar."""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.progress import track

from vmoe.errors import UserError
from vmoe.memory import free_memory, is_out_of_memory, memory_line
from vmoe.text import printable

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from vmoe.checkpoints import Checkpoint
    from vmoe.data import DataConfig, ImageDataModule
    from vmoe.data.loading import ImageLoader

T = TypeVar("T")
# What jobs that measure a checkpoint call what `vmoe train` names by section
DATA_OPTIONS = {
    "data.name": "--data",
    "data.root": "--root",
    "data.eval_batch_size": "--batch-size",
    "data.workers": "--workers",
}


def load_data(checkpoint: "Checkpoint", options: argparse.Namespace, any_classes: bool = False) -> "ImageDataModule":
    """The run's data with the options' changes, prepared for this model: its image size, mean and std.

    Args:
        checkpoint: the model and what it was trained on.
        options: of the command line.
        any_classes: the set may have another number of classes than the model.

    Raises:
        UserError: an option's value is not allowed, or the set does not have the model's classes.
    """
    from vmoe.data import ImageDataModule

    data = ImageDataModule(_changed_config(checkpoint, options), seed=checkpoint.config.get("seed", 0))
    data.prepare_data()
    data.setup("test")
    for line in data.notes:
        print(printable(line), file=sys.stderr)
    if data.num_classes != len(checkpoint.class_names):
        if any_classes:
            return data
        raise UserError(f"{classes_differ(checkpoint, data)}; evaluate it on a set with its own classes")
    if data.class_names != checkpoint.class_names:
        pairs = zip(data.class_names, checkpoint.class_names, strict=True)
        here, there = next((here, there) for here, there in pairs if here != there)
        print(
            f"warning: class names differ from the checkpoint's ({here!r} for {there!r}); taken by number",
            file=sys.stderr,
        )
    return data


def classes_differ(checkpoint: "Checkpoint", data: "ImageDataModule") -> str:
    """Says how many classes a set and a checkpoint have."""
    return f"--data: {data.config.name} has {data.num_classes} classes, the checkpoint {len(checkpoint.class_names)}"


def halving_batches(job: Callable[[], T], options: argparse.Namespace) -> T:
    """What a job returns; where it runs out of memory, it begins again with half as many images a batch.

    Args:
        job: Reads `options.batch_size`, and calls `note_batches` once it knows its batches.
        options: Of the command line.

    Raises:
        UserError: batches cannot be smaller.
    """
    options.batch_unit = None
    while True:
        try:
            return job()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            unit = options.batch_unit
            half = None if unit is None else options.batch_size // 2 // unit * unit
            if not half:
                advice = "give a smaller --batch-size, another --device or a smaller model"
                raise UserError(memory_line(error, advice)) from error
            line = memory_line(error, f"begins again with batches of {half} images in place of {options.batch_size}")
        print(line, file=sys.stderr)  # outside of the block above, whose error holds what filled the memory
        options.batch_size = half
        free_memory()


def note_batches(options: argparse.Namespace, size: int, model: "nn.Module | None") -> None:
    """Tells `halving_batches` how many images a batch has, and of what that must be a multiple.

    Tokens that compete for capacity do so in groups of images, which must stay what they are.
    """
    import vmoe

    options.batch_size, options.batch_unit = size, 1
    for _, layer in vmoe.moe_layers(model) if model is not None else ():
        group = layer.config.routing_group
        if layer.config.eval_capacity_factor is None or layer.config.fills_slots or group == "image":
            continue
        options.batch_unit = size if group == "batch" else math.lcm(options.batch_unit, group)


def find_files(paths: "Sequence[str]") -> "list[Path]":
    """The image files that a job is given, by name or by folder; what is passed over in folders is said on stderr.

    Raises:
        UserError: a path does not exist or is no regular file, or a folder holds no picture.
    """
    from vmoe.data.image_files import PassedOver, find_images

    passed_over = PassedOver()
    files = find_images(paths, passed_over)
    if passed_over:
        print(printable(f"passed over: {passed_over}"), file=sys.stderr)
    return files


def depth_of(known: int | None, files: "Sequence[Path]") -> int | None:
    """The bits of files with more than 8 per channel: a model's own, else as measured, which is said on stderr."""
    from vmoe.data.bit_depth import depth_lines, depth_of_files

    if known is not None or (measured := depth_of_files(files)) is None:
        return known
    for line in depth_lines("images", None, measured, None):
        print(line, file=sys.stderr)
    return measured.bits


def say_left_out(lines: "Sequence[str]", count: int) -> None:
    """Says on stderr which of `count` image files could not be read; each of these has a line."""
    if lines:
        print(f"{len(lines)} of {count} files left out:", *map(printable, lines), sep="\n  ", file=sys.stderr)


def load_files(
    checkpoint: "Checkpoint", paths: "Sequence[Path]", options: argparse.Namespace
) -> "tuple[ImageLoader, list[Path]]":
    """Batches of image files without labels, prepared as in evaluation, in a random order, and the files in that order.

    All files are opened first; those that cannot be read are left out, and said on stderr.

    Raises:
        UserError: an option's value is not allowed, or not one file can be read.
    """
    import numpy as np
    import torch

    from vmoe.data.checking import readable_files
    from vmoe.data.image_files import none_readable
    from vmoe.data.loading import ImageLoader, UnlabelledImages

    config = _changed_config(checkpoint, options)
    count = len(paths)
    paths, damaged = readable_files(paths, config.workers or torch.get_num_threads())
    if not paths:
        raise none_readable(damaged)
    say_left_out(damaged, count)
    shuffled = [paths[place] for place in np.random.default_rng(options.seed).permutation(len(paths))]
    depth = depth_of(checkpoint.bit_depth, paths)
    images = UnlabelledImages(shuffled, config.image_size, config.mean, config.std, depth)
    size = config.eval_batch_size or config.batch_size
    return ImageLoader(images, workers=config.workers, batch_size=size), shuffled


def data_config(checkpoint: "Checkpoint", name: str | None = None) -> "DataConfig":
    """The run's data config, for the images that this model takes; a `name` is needed where it tells of none.

    Raises:
        UserError: neither tells of data.
    """
    from vmoe.data import DataConfig
    from vmoe.training.plain import from_plain

    trained_on = checkpoint.config.get("data")
    if trained_on is None and name is None:
        raise UserError(f"{checkpoint.path}: does not tell what it was trained on; give --data and --root")
    config = from_plain(DataConfig, trained_on or {"name": name}, f"{checkpoint.path}: data.")
    return dataclasses.replace(config, image_size=checkpoint.image_size, mean=checkpoint.mean, std=checkpoint.std)


def _changed_config(checkpoint: "Checkpoint", options: argparse.Namespace) -> "DataConfig":
    """The same with the options' changes."""
    from vmoe.data import DataConfig, SubsetConfig

    config = data_config(checkpoint, options.data)
    changes = {"pipeline": "workers"}  # the same images, of which a job may want only a few
    if options.data is not None and options.data != config.name:
        changes["subset"] = SubsetConfig()  # the run's class names mean nothing in another set
        changes["images"] = None  # which only fractals have
        changes["bit_depth"] = None
        if "linear" in getattr(options, "probe", ()):  # which chooses its penalty in validation
            changes["val_fraction"] = config.val_fraction or DataConfig.val_fraction
    given = {
        "name": options.data,
        "root": options.root,
        "eval_batch_size": options.batch_size,
        "workers": options.workers,
    }
    changes |= {field: value for field, value in given.items() if value is not None}
    try:
        changed = dataclasses.replace(config, **changes)
    except ValueError as error:
        raise UserError(f"data.{error}") from error
    note_batches(options, changed.eval_batch_size or changed.batch_size, checkpoint.model)
    return changed


class Tracked:
    """Batches with a progress bar on stderr, where that is a terminal, each time they are gone through."""

    def __init__(self, batches: Iterable, description: str) -> None:
        self._batches, self._description = batches, description

    def __iter__(self):
        console = Console(stderr=True)
        hidden = not console.is_terminal
        return iter(track(self._batches, self._description, console=console, transient=True, disable=hidden))
