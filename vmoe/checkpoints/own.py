"""Saves a model of a custom training loop as a file that every tool opens."""

import copy
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vmoe.checkpoints.building import build_model
from vmoe.checkpoints.entry import ModelFacts
from vmoe.checkpoints.shared import shared_config
from vmoe.checkpoints.trained import TrainedModel
from vmoe.checkpoints.writing import write_weights
from vmoe.errors import UserError
from vmoe.models.families import own_channels
from vmoe.models.lora import merge_lora
from vmoe.models.members import refuse_ensemble
from vmoe.models.surgery import CREATED_WITH
from vmoe.moe import moe_layers
from vmoe.sizes import ImageSize, as_size, height_and_width

_NOT_KEPT = {"num_classes", "img_size", "in_chans", "device", "dtype", "pretrained", "cache_dir", "checkpoint_path"}


def save(
    model: nn.Module,
    path: str | Path,
    class_names: Sequence[str] | None = None,
    *,
    image_size: ImageSize | None = None,
    crop: Literal["centre", "squash", "letterbox"] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    name: str | None = None,
    kwargs: dict[str, Any] | None = None,
    multi_label: bool | None = None,
    thresholds: Sequence[float] | None = None,
) -> None:
    """Writes a trained model, sparse or dense, as one file that `vmoe.load` and every tool open.

    The file describes how to build the model. To verify this, the model is built from the description, and its logits
    are compared with the original's. If they differ, nothing is written.

    Args:
        model: A model by `vmoe.create_model`, `vmoe.sparsify`, `timm.create_model` or `vmoe.load`.
        path: A .safetensors or .ckpt file.
        class_names: Name of each class, in the order of the logits. None takes those of a loaded model.
        image_size: Side of the square images in pixels, or (height, width). None takes the size that the model was
            built for.
        crop: How images of another shape were fitted to that size (see `vmoe.prepare_image`). None takes a loaded
            model's, else "centre".
        mean: Mean of each channel for normalisation (see `vmoe.prepare_image`). None takes a loaded model's, else
            timm's for this model (`model.pretrained_cfg`).
        std: Standard deviation of each channel. None as for `mean`.
        name: timm's name of the model. None takes it from the model.
        kwargs: timm's arguments of the model, except `num_classes` and `img_size`. None takes those of
            `vmoe.create_model`.
        multi_label: Whether an image may have several classes, or none, so that each logit has its own sigmoid. None
            takes a loaded model's, else False.
        thresholds: With `multi_label` the least probability of each class that an image has. None takes a loaded
            model's, else 0.5 for all.

    Raises:
        UserError: An argument is missing or does not fit the model, the model cannot be built again, or `path` cannot
            be written.
    """
    if Path(path).suffix not in (".safetensors", ".ckpt"):
        raise UserError(f"path={path}: must end in .safetensors or .ckpt")
    model = getattr(model, "_orig_mod", model)  # the original of torch.compile(model)
    facts = describe(model, class_names, image_size=image_size, crop=crop, mean=mean, std=std, name=name, kwargs=kwargs)
    facts = _with_labels(model, facts, multi_label, thresholds)
    if isinstance(model, TrainedModel) and class_names is None and not facts.multi_label:
        facts = dataclasses.replace(facts, calibration=model.calibration)
    done = (model.epoch, model.step) if isinstance(model, TrainedModel) else (0, 0)
    write_weights(path, _plain_copy(model).state_dict(), facts, *done)


def describe(
    model: nn.Module,
    class_names: Sequence[str] | None = None,
    *,
    image_size: ImageSize | None = None,
    crop: Literal["centre", "squash", "letterbox"] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    name: str | None = None,
    kwargs: dict[str, Any] | None = None,
) -> ModelFacts:
    """The facts that a file needs to rebuild a model.

    The model is rebuilt here, and its logits are compared with the original's. The random generators do not change.

    Args:
        model: As in `save`, like the other arguments.

    Raises:
        UserError: An argument is missing or does not fit the model, or the model cannot be rebuilt.
    """
    own = _plain_copy(model)
    known = model if isinstance(model, TrainedModel) else None
    if class_names is None:
        if known is None:
            raise UserError("class_names: is missing; give the name of each class, in the order of the logits")
        class_names = known.class_names
    names = [str(each) for each in class_names]
    size = image_size or (known.image_size if known is not None else _size_of(model))
    of_timm = getattr(model, "pretrained_cfg", None) or {}
    count = own_channels(own)
    channels = known.channels if known is not None else count if count != 3 else None
    mean, std = (
        _per_channel(word, count, given if given is not None else getattr(known, word, None) or of_timm.get(word))
        for word, given in (("mean", mean), ("std", std))
    )
    built = _architecture(model, name, kwargs)
    layers = moe_layers(own)
    moe = layers[0][1].config if layers else None
    with torch.random.fork_rng(devices=[]):  # a training may be going on
        again = build_model(built["name"], built["kwargs"], moe, len(names), size, channels).eval()
    _require_same_logits(own, again, size, names, built)
    config = {"seed": 0, "output_dir": None, "optim": {}, "trainer": {}}
    if known is not None:
        config |= shared_config(known.config)
    config |= {"model": built, "moe": None if moe is None else dataclasses.asdict(moe)}
    fitted = crop or (known.crop if known is not None else "centre")
    facts = ModelFacts(config, names, size, mean, std, crop=fitted, channels=channels)
    if known is None:
        return facts
    of_labels = {"multi_label": known.multi_label, "thresholds": known.thresholds}
    return dataclasses.replace(facts, bit_depth=known.bit_depth, **of_labels)


def _with_labels(
    model: nn.Module, facts: ModelFacts, multi_label: bool | None, thresholds: Sequence[float] | None
) -> ModelFacts:
    """The facts with the label options of `save`.

    Raises:
        UserError: The thresholds do not fit, or the model is an ensemble.
    """
    several = facts.multi_label if multi_label is None else multi_label
    if not several:
        if thresholds is not None:
            raise UserError("thresholds: are for several classes per image; give multi_label=True too")
        return dataclasses.replace(facts, multi_label=False, thresholds=None)
    refuse_ensemble(model, "multi_label: an ensemble answers with the mean of softmax probabilities")
    if thresholds is None:
        return dataclasses.replace(facts, multi_label=True)
    given = [float(each) for each in thresholds]
    if len(given) != len(facts.class_names):
        raise UserError(
            f"thresholds: are {len(given)}, but the classes are {len(facts.class_names)}; give one for each"
        )
    if not all(0 <= each <= 1 for each in given):
        raise UserError(f"thresholds: {given} must be probabilities from 0 to 1")
    return dataclasses.replace(facts, multi_label=True, thresholds=given)


def _plain_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU in float32 and evaluation mode, with adapters merged, like the model of a file."""
    with torch.no_grad():
        return merge_lora(copy.deepcopy(model).cpu().float().eval())


def _size_of(model: nn.Module) -> ImageSize:
    """The image size that a model was built for.

    Raises:
        UserError: It is unknown.
    """
    sides = getattr(getattr(model, "patch_embed", None), "img_size", None)
    sides = sides or (getattr(model, "pretrained_cfg", None) or {}).get("input_size", ())[1:]
    if len(sides) != 2:
        raise UserError("image_size: is missing; give the side in pixels of the images it was trained on")
    return as_size(int(sides[0]), int(sides[1]))


def _per_channel(word: str, count: int, values: Any) -> list[float]:
    if values is None or len(values) != count:
        needed = "three" if count == 3 else count
        raise UserError(f"{word}={values}: must be {needed} numbers, those that images were normalised with")
    return [float(value) for value in values]


def _architecture(model: nn.Module, name: str | None, kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """A model's timm name and arguments, in the form of a config.

    Raises:
        UserError: They are unknown, or an argument has no plain type.
    """
    known: dict[str, Any] = getattr(model, CREATED_WITH, {})
    if isinstance(model, TrainedModel):
        known = model.config["model"]
    of_timm = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    name = name or known.get("name") or of_timm
    if name is None:
        raise UserError(f"name: is missing; {type(model).__name__} does not hold timm's name of it, so give it")
    kwargs = known.get("kwargs", {}) if kwargs is None else kwargs
    kept = {key: value for key, value in kwargs.items() if key not in _NOT_KEPT}
    for key, value in kept.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise UserError(f"kwargs: {key}={value!r} cannot be written; only plain types can") from error
    return {"name": name, "kwargs": kept}


@torch.no_grad()
def _require_same_logits(
    model: nn.Module, again: nn.Module, size: ImageSize, names: list[str], built: dict[str, Any]
) -> None:
    """Loads the weights into the rebuilt model, and compares both models' logits on random images bit for bit.

    Raises:
        UserError: The weights do not fit it, or the logits or their number differ.
    """
    how = f"name={built['name']!r}, kwargs={built['kwargs']}"
    images = torch.randn(2, own_channels(model), *height_and_width(size), generator=torch.Generator().manual_seed(0))
    expected = model(images)
    if expected.shape != (len(images), len(names)):
        raise UserError(
            f"class_names: are {len(names)}, but the model gives {expected.shape[-1]} logits; give a name for each"
        )
    advice = "give the name and kwargs that it was made with"
    try:
        again.load_state_dict(model.state_dict())
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{how}: is built otherwise than this model ({reason}); {advice}") from error
    if not torch.equal(again(images), expected):
        raise UserError(f"{how}: gives other logits than this model with the same weights; {advice}")
