"""What jobs over many images share: the run's data as the options change it, or image files."""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from vmoe.errors import UserError
from vmoe.memory import free_memory, is_out_of_memory, memory_line
from vmoe.text import printable

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from vmoe.checkpoints import TrainedModel
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


def load_data(checkpoint: "TrainedModel", options: argparse.Namespace) -> "ImageDataModule":
    """The run's data with the options' changes, prepared for this model: its image size, mean and std.

    Args:
        checkpoint: the model and what it was trained on.
        options: of the command line; with --classes known, only the classes that the model knows.

    Raises:
        UserError: an option's value is not allowed, or the set is missing or malformed.
    """
    from vmoe.data import ImageDataModule

    data = ImageDataModule(_changed_config(checkpoint, options), seed=checkpoint.config.get("seed", 0))
    data.prepare_data()
    data.setup("test")
    for line in data.notes:
        print(printable(line), file=sys.stderr)
    if options.classes == "known":
        data = _with_known_classes(checkpoint, data)
    return data


def matched(checkpoint: "TrainedModel", data: "ImageDataModule", classes: str, say: bool = True) -> "TrainedModel":
    """The checkpoint with the set's classes for its own: its outputs by name, in the set's order and only those.

    Args:
        checkpoint: a model.
        data: what it is measured on.
        classes: "by-name"; "known", the same; or "by-number", where the set's names mean nothing.
        say: whether a line on stderr tells how they are matched, where they are not the same.

    Raises:
        UserError: the model does not know a class of the set.
    """
    from vmoe.classes import find_outputs, only_numbers, with_outputs

    theirs, ours = checkpoint.class_names, list(data.class_names)
    if theirs == ours:
        return checkpoint
    if classes == "by-number" and len(ours) > len(theirs):
        raise UserError(f"--classes by-number: {classes_differ(checkpoint, data)}; leave some out")
    if classes == "by-number" or (only_numbers(ours) and len(ours) == len(theirs)):
        line, result = f"taken by number, such as {printable(ours[0])} for {printable(theirs[0])}", checkpoint
    else:
        outputs = find_outputs(theirs, ours)
        if unknown := _unknown(outputs, ours):
            raise UserError(
                f"{classes_differ(checkpoint, data)}, which does not know {_some(unknown)}; give --classes known to "
                "leave their images out, or --classes by-number if only the names differ"
            )
        line = (
            f"matched by name: the set has {len(ours)} of the checkpoint's {len(theirs)}, and only these are predicted"
        )
        if len(ours) == len(theirs):
            line = "matched by name: the set has them in another order than the checkpoint"
        result = checkpoint.with_facts_for(with_outputs(checkpoint, outputs), class_names=ours)
    if say:
        print(f"classes: {line}", file=sys.stderr)
    return result


def _with_known_classes(checkpoint: "TrainedModel", data: "ImageDataModule") -> "ImageDataModule":
    """The same data without the classes that the checkpoint does not know; a line counts them."""
    from vmoe.classes import find_outputs
    from vmoe.data import ImageDataModule

    outputs = find_outputs(checkpoint.class_names, data.class_names)
    unknown = _unknown(outputs, data.class_names)
    if not unknown:
        return data
    if len(unknown) == len(outputs):
        raise UserError(f"{classes_differ(checkpoint, data)}, and none of these is the checkpoint's")
    known = [name for name, output in zip(data.class_names, outputs, strict=True) if output is not None]
    left = sum(count for count, output in zip(data.images_of_classes("test"), outputs, strict=True) if output is None)
    print(
        f"classes: left out {_some(unknown)}, which the checkpoint does not know, with {left} test images",
        file=sys.stderr,
    )
    config = dataclasses.replace(data.config, subset=dataclasses.replace(data.config.subset, classes=known))
    data = ImageDataModule(config, seed=data.seed)
    data.setup("test")
    return data


def _unknown(outputs: "Sequence[int | None]", names: "Sequence[str]") -> list[str]:
    return [name for name, output in zip(names, outputs, strict=True) if output is None]


def _some(names: "Sequence[str]") -> str:
    return printable(", ".join(names[:5]) + (", ..." if len(names) > 5 else ""))


def add_classes_option(parser: argparse.ArgumentParser) -> None:
    """`--classes`: how a set's classes are found among a checkpoint's."""
    parser.add_argument(
        "--classes",
        choices=("by-name", "by-number", "known"),
        default="by-name",
        help="find the set's classes among the checkpoint's by name, whatever their order and number; known leaves out "
        "images of classes that it does not know; by-number ignores the names (default: by-name)",
    )


def classes_differ(checkpoint: "TrainedModel", data: "ImageDataModule") -> str:
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
    checkpoint: "TrainedModel", paths: "Sequence[Path]", options: argparse.Namespace
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


def data_config(checkpoint: "TrainedModel", name: str | None = None) -> "DataConfig":
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


def _changed_config(checkpoint: "TrainedModel", options: argparse.Namespace) -> "DataConfig":
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
