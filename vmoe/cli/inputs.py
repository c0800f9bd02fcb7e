"""What jobs over a data set share: the run's data as the options change it, and a progress bar."""

import argparse
import dataclasses
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import track

from vmoe.errors import UserError

if TYPE_CHECKING:
    from vmoe.checkpoints import Checkpoint
    from vmoe.data import ImageDataModule


def load_data(checkpoint: "Checkpoint", options: argparse.Namespace) -> "ImageDataModule":
    """The run's data with the options' changes, prepared for this model: its image size, mean and std.

    Raises:
        UserError: an option's value is not allowed, or the set does not have the model's classes.
    """
    from vmoe.data import DataConfig, ImageDataModule, SubsetConfig
    from vmoe.training.config import from_plain

    config = from_plain(DataConfig, checkpoint.config["data"], "data.")
    changes = {"image_size": checkpoint.image_size, "mean": checkpoint.mean, "std": checkpoint.std}
    changes["pipeline"] = "workers"  # the same images, of which a job may want only a few
    if options.data is not None and options.data != config.name:
        changes["subset"] = SubsetConfig()  # the run's class names mean nothing in another set
    for field, value in (
        ("name", options.data),
        ("root", options.root),
        ("eval_batch_size", options.batch_size),
        ("workers", options.workers),
    ):
        if value is not None:
            changes[field] = value
    data = ImageDataModule(dataclasses.replace(config, **changes), seed=checkpoint.config["seed"])
    data.prepare_data()
    data.setup("test")
    if data.num_classes != len(checkpoint.class_names):
        raise UserError(
            f"--data: {data.config.name} has {data.num_classes} classes, the checkpoint {len(checkpoint.class_names)}; "
            "evaluate it on a set with its own classes"
        )
    if data.class_names != checkpoint.class_names:
        pairs = zip(data.class_names, checkpoint.class_names, strict=True)
        here, there = next((here, there) for here, there in pairs if here != there)
        print(
            f"warning: class names differ from the checkpoint's ({here!r} for {there!r}); taken by number",
            file=sys.stderr,
        )
    return data


class Tracked:
    """Batches with a progress bar on stderr, each time they are gone through."""

    def __init__(self, batches: Iterable, description: str) -> None:
        self._batches, self._description = batches, description

    def __iter__(self):
        return iter(track(self._batches, self._description, console=Console(stderr=True), transient=True))
