"""Shared code of jobs on many images: the run's data with the options' changes, or image files."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from vmoe.cli.common import renamed
from vmoe.errors import UserError
from vmoe.memory import free_memory, is_out_of_memory, memory_line
from vmoe.text import printable

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from vmoe.checkpoints import TrainedModel
    from vmoe.data import DataConfig, ImageDataModule
    from vmoe.data.config import TableConfig
    from vmoe.data.loading import ImageLoader

T = TypeVar("T")
TABLE_ROLES = ("path", "label", "split", "separator", "columns")
# Keys of `vmoe train` -> the options of jobs that measure a checkpoint
DATA_OPTIONS = {
    "data.name": "--data",
    "data.root": "--root",
    "data.eval_batch_size": "--batch-size",
    "data.workers": "--workers",
    "data.table": "--columns",
    **{f"data.table.{role}": f"--columns {role}=" for role in TABLE_ROLES},
    "classes": "--classes",
}


def load_data(checkpoint: "TrainedModel", options: argparse.Namespace) -> "ImageDataModule":
    """The run's data with the options' changes and the model's image size, mean and std.

    With --classes known they have only the classes that the model knows.

    Raises:
        UserError: An option's value is not allowed, or the set is missing or malformed.
    """
    from vmoe.evaluation.evaluate import open_data

    data, lines = open_data(checkpoint, changed_config(checkpoint, options), options.classes)
    for line in lines:
        print(printable(renamed(line, DATA_OPTIONS)), file=sys.stderr)
    return data


def matched(checkpoint: "TrainedModel", data: "ImageDataModule", classes: str, verbose: bool = True) -> "TrainedModel":
    """The checkpoint with outputs for the classes of the measured set (see `match_classes`).

    If the classes differ and `verbose` is set, it prints a line on the match to stderr.

    Raises:
        UserError: The model does not know a class of the set.
    """
    from vmoe.evaluation.evaluate import match_classes

    result, line = match_classes(checkpoint, data, classes)
    if line is not None and verbose:
        print(printable(line), file=sys.stderr)
    return result


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `load_data`, and the device."""
    add = parser.add_argument
    add("--data", metavar="NAME", help="another set than the run's: a folder, a table, an .npz file or a set's name")
    add("--root", metavar="DIR", help="where the data are, if not where the run had them")
    line = (
        "find the set's classes among the checkpoint's by name, whatever their order and number; known leaves out "
        "images of classes that it does not know; by-number ignores the names (default: by-name)"
    )
    add("--classes", choices=("by-name", "by-number", "known"), default="by-name", help=line)
    add_columns_option(parser, "with a table, its columns where the run's had other names")
    add("--batch-size", type=int, metavar="N", help="images per batch")
    add("--workers", type=int, metavar="N", help="processes that load images")
    add("--device", default="auto", help="auto, cpu or cuda (default: auto)")


def add_columns_option(parser: argparse.ArgumentParser, line: str) -> None:
    """Adds --columns, which `table_columns` reads, with a line of help."""
    roles = ", ".join(TABLE_ROLES)
    parser.add_argument("--columns", nargs="+", metavar="ROLE=NAME", help=f"{line}: {roles}, as in label=kind")


def halving_batches(job: Callable[[], T], options: argparse.Namespace) -> T:
    """Runs a job and returns its result. If memory runs out, it starts again with half the batch size.

    Args:
        job: Reads `options.batch_size`, and calls `note_batches` once it knows its batches.
        options: The command line's options.

    Raises:
        UserError: Batches cannot be smaller.
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
        print(line, file=sys.stderr)  # after the block above, since its error holds the memory
        options.batch_size = half
        free_memory()


def note_batches(options: argparse.Namespace, size: int, model: "nn.Module | None") -> None:
    """Records for `halving_batches` the batch size and its required divisor.

    The divisor keeps routing groups intact: their images compete for capacity.
    """
    from vmoe.moe import moe_layers

    options.batch_size, options.batch_unit = size, 1
    for _, layer in moe_layers(model) if model is not None else ():
        group = layer.config.routing_group
        if layer.config.eval_capacity_factor is None or layer.config.fills_slots or group == "image":
            continue
        options.batch_unit = size if group == "batch" else math.lcm(options.batch_unit, group)


def find_files(paths: "Sequence[str]", channels: int | None = None) -> "list[Path]":
    """The image files of a job's paths, files or folders. It prints on stderr what it ignores in folders.

    A model that reads pictures by their `channels` takes .npy files, too.

    Raises:
        UserError: A path does not exist or is no regular file, or a folder holds no picture.
    """
    from vmoe.data.image_files import IgnoredFiles, find_images

    ignored = IgnoredFiles()
    files = find_images(paths, ignored, arrays=channels is not None)
    if ignored:
        print(printable(f"ignored: {ignored}"), file=sys.stderr)
    return files


def depth_of(known: int | None, files: "Sequence[Path]", channels: int | None = None) -> int | None:
    """The bit depth of files with more than 8 bits per channel: the model's, else measured and printed on stderr."""
    from vmoe.data.bit_depth import depth_lines, depth_of_files

    if known is not None or (measured := depth_of_files(files, channels)) is None:
        return known
    for line in depth_lines("images", None, measured, None):
        print(line, file=sys.stderr)
    return measured.bits


def print_left_out(lines: "Sequence[str]", count: int) -> None:
    """Prints on stderr a line for each of `count` image files that could not be read."""
    if lines:
        print(f"{len(lines)} of {count} files left out:", *map(printable, lines), sep="\n  ", file=sys.stderr)


def load_files(
    checkpoint: "TrainedModel", paths: "Sequence[Path]", options: argparse.Namespace
) -> "tuple[ImageLoader, list[Path]]":
    """Batches of image files without labels, prepared as in evaluation, in random order, and the files in that order.

    All files are opened first. Those that cannot be read are left out and printed on stderr.

    Raises:
        UserError: An option's value is not allowed, or no file can be read.
    """
    import numpy as np
    import torch

    from vmoe.data.checking import readable_files
    from vmoe.data.image_files import none_readable
    from vmoe.data.loading import ImageLoader, UnlabelledImages

    config = changed_config(checkpoint, options)
    count = len(paths)
    depth = depth_of(checkpoint.bit_depth, paths, config.channels)
    paths, damaged = readable_files(paths, config.workers or torch.get_num_threads(), depth, config.channels)
    if not paths:
        raise none_readable(damaged)
    print_left_out(damaged, count)
    shuffled = [paths[place] for place in np.random.default_rng(options.seed).permutation(len(paths))]
    prepared = config.image_size, config.mean, config.std, depth, config.crop, config.channels
    images = UnlabelledImages(shuffled, *prepared)
    size = config.eval_batch_size or config.batch_size
    return ImageLoader(images, num_workers=config.workers, batch_size=size), shuffled


def table_columns(given: Sequence[str]) -> "TableConfig":
    """The columns of a table in `--columns`.

    Raises:
        UserError: A word is no ROLE=NAME.
    """
    from vmoe.data.config import TableConfig

    columns: dict[str, Any] = {}
    for word in given:
        role, equals, name = word.partition("=")
        if role not in TABLE_ROLES or not equals or not name:
            raise UserError(f"--columns {word}: must be ROLE=NAME, where ROLE is one of {', '.join(TABLE_ROLES)}")
        columns[role] = name.split(",") if role == "columns" and name != "others" else name
    try:
        return TableConfig(**columns)
    except ValueError as error:
        raise UserError(f"--columns {error}") from error


def changed_config(checkpoint: "TrainedModel", options: argparse.Namespace) -> "DataConfig":
    """The data of a checkpoint with the options' changes."""
    from vmoe.data import DataConfig
    from vmoe.evaluation.evaluate import data_for, trained_on

    changes = {"eval_batch_size": options.batch_size, "workers": options.workers}
    chooses_in_validation = "linear" in getattr(options, "probe", ())
    if options.data is not None and chooses_in_validation:
        own = trained_on(checkpoint, options.data)
        if own.name != options.data:
            changes["val_fraction"] = own.val_fraction or DataConfig.val_fraction
    if options.columns is not None:
        changes["table"] = table_columns(options.columns)
    changed = data_for(checkpoint, options.data, options.root, **changes)
    note_batches(options, changed.eval_batch_size or changed.batch_size, checkpoint)
    return changed
