"""Measures a trained model on a data set: `vmoe evaluate` in Python."""

import dataclasses
import warnings
from collections.abc import Sequence
from os import PathLike
from typing import Any, Literal

import torch

from vmoe.checkpoints import TrainedModel
from vmoe.checkpoints.trained import evaluating
from vmoe.classes import find_outputs, only_numbers, with_outputs
from vmoe.config_values import from_plain, with_section
from vmoe.data import AugmentConfig, DataConfig, ImageDataModule, SubsetConfig
from vmoe.data.config import TableConfig, set_and_root
from vmoe.errors import UserError
from vmoe.evaluation.engine import evaluate_sweep
from vmoe.evaluation.guidance import guidance_of, require_guidance
from vmoe.evaluation.metrics import Evaluation, MultiLabelEvaluation
from vmoe.progress import Progress, shown
from vmoe.text import counted, named

_WARNING = "warning: "
_MATCHES = ("by-name", "known", "by-number")


def evaluate(
    model: TrainedModel,
    data: str | PathLike[str] | DataConfig | None = None,
    *,
    root: str | PathLike[str] | None = None,
    split: Literal["test", "val"] = "test",
    classes: Literal["by-name", "known", "by-number"] = "by-name",
    capacity_factor: float | None = None,
    top_k: int | None = None,
    oracle_router: bool = False,
    batch_size: int | None = None,
    workers: int | None = None,
    progress: Progress = True,
) -> dict[str, Any]:
    """Measures a model on its current device, on a data set with the model's image size, mean and std.

    Args:
        model: A model of `vmoe.load`.
        data: The name of a data set, such as "cifar10"; a folder of class folders or of tar shards, or an .npz file; or
            a `DataConfig`. None takes the set that the model was trained on.
        root: The path of the data. None takes the run's.
        split: The part of the set.
        classes: The match of the set's classes to the model's: "by-name" in any order and number; "known" also leaves
            out images of classes that the model does not know; "by-number" ignores the names.
        capacity_factor: Capacity factor of the MoE layers for this measurement; inf drops nothing. None takes the
            model's own.
        top_k: Experts per token for this measurement. None takes the model's own.
        oracle_router: Whether to measure also the accuracy with a perfect router; the model needs a guided one.
        batch_size: Images per batch. None takes the run's.
        workers: Number of loading processes. None takes the run's.
        progress: Whether to show a progress bar on stderr if that is a terminal; or a function of the batches and a
            description.

    Returns:
        Plain types, as in `results` of evaluation.json: `images`, `top1`, `top5`, `nll`, `ece`, `brier`,
        `balanced_accuracy`, `f1`, `auroc`, `average_precision`, `class_accuracy`, `class_precision`, `class_f1`,
        `class_auroc`, `class_average_precision`, `class_precision_at_recall` (at a recall of 0, 0.05, ..., 1),
        `confusion`, `images_per_second`, `capacity_factor`, `top_k`, `dropped`, and by name `layers` with each MoE
        layer's dropped share and load. For an ensemble, `members` has the members' own figures and their disagreement.
        For a model with a guided router, `router` has the router's loss and accuracy.
        Accuracies and shares are fractions.

    Raises:
        UserError: The data are missing or have a class that the model does not know, an argument's value is not
            allowed, the model is dense, its tokens do not choose or its router was not guided, or a logit is not
            finite.
    """
    if not isinstance(model, TrainedModel):
        raise UserError(
            f"model: a {type(model).__name__} does not know its classes and how its images are prepared; vmoe.save "
            "writes a file with both, of which vmoe.load makes a model that does"
        )
    for name, value, allowed in (("split", split, ("test", "val")), ("classes", classes, _MATCHES)):
        if value not in allowed:
            raise UserError(f"{name}={value!r}: must be one of {', '.join(allowed)}")
    if oracle_router:
        require_guidance(model, "oracle_router")
    if data is None and model.config.get("data") is None:
        raise UserError(f"data: is missing; {model.path} does not record what the model was trained on")
    opened, lines = open_data(model, data_for(model, data, root, eval_batch_size=batch_size, workers=workers), classes)
    measured, line = match_classes(model, opened, classes)
    for warned in [each.removeprefix(_WARNING) for each in lines if each.startswith(_WARNING)] + [line] * bool(line):
        warnings.warn(warned, stacklevel=2)
    factors, top_ks = (None if value is None else [value] for value in (capacity_factor, top_k))
    with evaluating(model):
        (result,) = measure_split(measured, opened, split, factors, top_ks, model.device, progress, oracle_router)
    return result.as_dict()


def measure_split(
    model: TrainedModel,
    data: ImageDataModule,
    split: str,
    factors: list[float] | None,
    top_ks: list[int] | None,
    device: torch.device,
    progress: Progress = True,
    oracle_router: bool = False,
) -> list[Evaluation | MultiLabelEvaluation]:
    """Measures a model of `match_classes` on the "val" or "test" split for each K and capacity factor.

    See `evaluate_sweep`.
    """
    loader = data.val_dataloader() if split == "val" else data.test_dataloader()
    batches = shown(loader, f"{split} set of {data.config.name}", progress)
    guidance = guidance_of(model)
    return list(
        evaluate_sweep(model, batches, len(model.class_names), factors, top_ks, device, guidance, oracle_router)
    )


def open_data(model: TrainedModel, config: DataConfig, classes: str = "by-name") -> tuple[ImageDataModule, list[str]]:
    """Opens a set and returns it with lines to print. With `classes` "known" it has only the model's classes.

    Raises:
        UserError: The data are missing or malformed, or the model knows none of their classes.
    """
    data = ImageDataModule(config, seed=model.config.get("seed", 0))
    data.prepare_data()
    data.setup("test")
    lines = list(data.notes)
    if classes != "known":
        return data, lines
    outputs = find_outputs(model.class_names, data.class_names)
    unknown = _unknown(outputs, data.class_names)
    if not unknown:
        return data, lines
    if len(unknown) == len(outputs):
        raise UserError(f"{classes_differ(model, data)}, and none of these is the checkpoint's")
    known = [name for name, output in zip(data.class_names, outputs, strict=True) if output is not None]
    left = sum(count for count, output in zip(data.images_of_classes("test"), outputs, strict=True) if output is None)
    what = f"with {counted(left, 'test image')}"
    if data.multi_label:  # an image stays, with its other labels or with none
        what = f"with {counted(left, 'label')} of test images; the images stay"
    lines.append(f"classes: left out {named(unknown)}, which the checkpoint does not know, {what}")
    config = dataclasses.replace(data.config, subset=dataclasses.replace(data.config.subset, classes=known))
    data = ImageDataModule(config, seed=data.seed)
    data.setup("test")
    return data, lines


def require_same_labels(model: TrainedModel, data: ImageDataModule) -> None:
    """Makes sure that both the model and its images are of one class per image, or both of several.

    Raises:
        UserError: they differ.
    """
    if model.multi_label != data.multi_label:
        several, one = "several classes per image", "one class per image"
        knows, has = (several, one) if model.multi_label else (one, several)
        raise UserError(f"data.name: {data.config.name} has {has}, and the checkpoint knows {knows}; give other data")


def match_classes(model: TrainedModel, data: ImageDataModule, classes: str) -> tuple[TrainedModel, str | None]:
    """A view of the model with only the outputs of the set's classes, in the set's order.

    Args:
        model: The model.
        data: The set.
        classes: "by-name" or "known" match names; "by-number" ignores them.

    Returns:
        The view, or the model itself if the classes are the same; and a line on the match, or None.

    Raises:
        UserError: The model does not know a class of the set.
    """
    theirs, ours = model.class_names, list(data.class_names)
    require_same_labels(model, data)
    if theirs == ours:
        return model, None
    if classes == "by-number" and len(ours) > len(theirs):
        raise UserError(f"classes='by-number': {classes_differ(model, data)}; leave some out")
    if classes == "by-number" or (only_numbers(ours) and len(ours) == len(theirs)):
        return model, f"classes: taken by number, such as {ours[0]} for {theirs[0]}"
    outputs = find_outputs(theirs, ours)
    if unknown := _unknown(outputs, ours):
        raise UserError(
            f"{classes_differ(model, data)}, which does not know {named(unknown)}; give classes='known' to leave their "
            "images out, or classes='by-number' if only the names differ"
        )
    line = f"matched by name: the set has {len(ours)} of the checkpoint's {len(theirs)}, and only these are predicted"
    if len(ours) == len(theirs):
        line = "matched by name: the set has them in another order than the checkpoint"
    view = model.with_facts_for(with_outputs(model, [each for each in outputs if each is not None]), class_names=ours)
    return view, f"classes: {line}"


def classes_differ(model: TrainedModel, data: ImageDataModule) -> str:
    """A message with the numbers of classes of a set and a model."""
    classes = counted(data.num_classes, "class", "classes")
    return f"data.name: {data.config.name} has {classes}, the checkpoint {len(model.class_names)}"


def _unknown(outputs: Sequence[int | None], names: Sequence[str]) -> list[str]:
    return [name for name, output in zip(names, outputs, strict=True) if output is None]


def data_for(
    model: TrainedModel,
    data: str | PathLike[str] | DataConfig | None = None,
    root: str | PathLike[str] | None = None,
    **changes: Any,
) -> DataConfig:
    """The config of a set with the image options of a model.

    Args:
        model: The model.
        data: As for `evaluate`.
        root: As for `evaluate`.
        **changes: Other fields of the config; None keeps a field.

    Raises:
        UserError: Neither the model nor `data` names a set, or a value is not allowed.
    """
    changes = {name: value for name, value in changes.items() if value is not None}
    if isinstance(data, DataConfig):
        config = data
    else:
        name, found = (None, None) if data is None else set_and_root(data)
        root = found if root is None else root
        config = trained_on(model, name)
        if name is not None and name != config.name:
            # The run's class names mean nothing in another set; only fractals have `images`, and only tables columns
            of_a_set = {"subset": SubsetConfig(), "images": None, "table": TableConfig()}
            # pictures of channels hold measurements, which keep their meaning in any set
            of_a_set["bit_depth"] = None if model.channels is None else model.bit_depth
            changes = {"name": name} | of_a_set | changes
        elif model.bit_depth is not None:  # by which it was trained: to measure it on other images would change them
            changes = {"bit_depth": model.bit_depth} | changes
    if root is not None:
        changes["root"] = str(root)
    if config.augment.albumentations is not None:  # no image is varied, and its steps may be known to training alone
        changes = {"augment": AugmentConfig()} | changes
    fixed = {"image_size": model.image_size, "crop": model.crop, "mean": model.mean, "std": model.std}
    fixed["channels"] = model.channels
    try:
        return dataclasses.replace(config, pipeline="workers", **fixed, **changes)
    except ValueError as error:
        raise UserError(with_section(str(error), DataConfig, "data.")) from error


def trained_on(model: TrainedModel, name: str | None = None) -> DataConfig:
    """The config of the set that a model was trained on. A `name` is needed if the model does not record one.

    Raises:
        UserError: Neither names a set.
    """
    config = model.config.get("data")
    if config is None and name is None:
        raise UserError(f"{model.path}: does not record what it was trained on; give data.name and data.root")
    plain = config or {"name": name}
    return dataclasses.replace(
        from_plain(DataConfig, plain, f"{model.path}: data."),
        image_size=model.image_size,
        crop=model.crop,
        mean=model.mean,
        std=model.std,
        channels=model.channels,
    )
