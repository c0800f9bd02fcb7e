"""The description of the model in a Classifier's checkpoint, and the Classifier of such a file."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from vmoe.checkpoints import (
    ModelFacts,
    TrainedModel,
    describe,
    load,
    read_checkpoint,
    read_foreign_weights,
    trained_weights,
    unmerged_weights,
)
from vmoe.config_values import to_plain
from vmoe.data import ImageDataModule
from vmoe.errors import UserError
from vmoe.models.lora import has_lora
from vmoe.training.config import OptimConfig


def found_facts(
    model: nn.Module, data: LightningDataModule | None, given: dict[str, Any], sections: dict[str, Any]
) -> ModelFacts | None:
    """The facts that rebuild a model and prepare its images. If they are unknown it warns and returns None.

    Args:
        model: The model.
        data: The Trainer's datamodule.
        given: The given `class_names`, `mean` and `std`; None values come from the data or a loaded model.
        sections: The options of the optimiser and of the loss, in the form of a run's config.
    """
    known = model if isinstance(model, TrainedModel) else None
    for key, value in given.items():
        sources = (value, getattr(data, key, None), getattr(known, key, None))
        given = given | {key: next((each for each in sources if each is not None), None)}
    names = given["class_names"] or [str(number) for number in range(getattr(model, "num_classes", 0))]
    try:
        facts = describe(model, names, mean=given["mean"], std=given["std"])
    except UserError as error:
        rank_zero_warn(
            f"the checkpoint holds weights alone, since what it is of cannot be written: {error}. Open it by "
            "vmoe.Classifier.load_from_checkpoint(path, model=...)"
        )
        return None
    config = facts.config | sections
    if not isinstance(data, ImageDataModule):
        return replace(facts, config=config)
    config |= {"data": to_plain(data.config), "seed": data.seed}
    return replace(facts, config=config, bit_depth=data.bit_depth, channels=data.channels)


def restored(
    cls: type, path: str | Path, device: torch.device, model: nn.Module | None, strict: bool, changes: dict[str, Any]
) -> Any:
    """The Classifier of a file; see `Classifier.load_from_checkpoint`."""
    if model is None:
        trained = load(path, device)
        known = OptimConfig.__dataclass_fields__
        options = {key: value for key, value in trained.config.get("optim", {}).items() if key in known}
        lr = changes.get("lr")
        if "min_lr" in options and isinstance(lr, int | float):
            options["min_lr"] = min(options["min_lr"], lr)
        if "loss" in trained.config:
            options["loss"] = trained.config["loss"]
        if trained.multi_label:
            options["multi_label"] = True
        task, path = cls(trained, **(options | changes)), trained.path
        task.thresholds = trained.thresholds
    else:
        weights = read_foreign_weights(path)
        if weights is None:
            content = read_checkpoint(path)
            weights = unmerged_weights(content) if has_lora(model) else trained_weights(content)
        with _one_line_of_misfits(path):
            model.load_state_dict(weights, strict=strict)
        task = cls(model.to(device), **changes)
    _load_others(task, path, strict)
    return task


def _load_others(task: LightningModule, path: str | Path, strict: bool) -> None:
    """Fills the modules that a subclass has beside the model."""
    others = [name for name in task.state_dict() if not name.startswith("model.")]
    if not others:
        return
    saved = {} if read_foreign_weights(path) is not None else read_checkpoint(path)["state_dict"]
    missing = [name for name in others if name not in saved]
    if missing and strict:
        raise UserError(
            f"{path}: has no {missing[0]}, which {type(task).__name__} has beside its model; strict=False leaves it as "
            "it is made"
        )
    with _one_line_of_misfits(path):
        task.load_state_dict({name: saved[name] for name in others if name in saved}, strict=False)


@contextmanager
def _one_line_of_misfits(path: str | Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: its weights do not fit this model ({reason})") from error
