"""A model of anybody's training loop as a file that every tool opens."""

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
from vmoe.models.lora import merge_lora
from vmoe.models.members import refuse_ensemble
from vmoe.models.surgery import CREATED_WITH
from vmoe.moe import moe_layers
from vmoe.sizes import ImageSize, as_size, height_and_width

_NOT_KEPT = {"num_classes", "img_size", "device", "dtype", "pretrained", "cache_dir", "checkpoint_path"}


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

    The file tells how the model is built. So the model is built again from what the file will tell, and its logits are
    compared with the model's; nothing is written if they differ.

    Args:
        model: A model by `vmoe.create_model`, `vmoe.sparsify`, `timm.create_model` or `vmoe.load`.
        path: A .safetensors or .ckpt file.
        class_names: Name of each class, in the order of the logits. None: those of a loaded model.
        image_size: Side of the square images in pixels, or (height, width). None: what the model was made for.
        crop: How pictures of another shape were fitted to that (see `vmoe.prepare_image`). None: a loaded model's, else
            "centre".
        mean: Mean of each channel that images were normalised with (see `vmoe.prepare_image`). None: a loaded model's,
            else timm's for this model (`model.pretrained_cfg`).
        std: Standard deviation of each channel. None: the same as for `mean`.
        name: timm's name of the model. None: as the model itself tells it.
        kwargs: The arguments of timm it was made with, beside `num_classes` and `img_size`. None: those that
            `vmoe.create_model` was given.
        multi_label: Whether an image may have several classes, or none, so that each logit is of a sigmoid of its own.
            None: a loaded model's, else False.
        thresholds: With `multi_label` the probability of each class from which an image has it. None: a loaded model's,
            else 0.5 for all.

    Raises:
        UserError: An argument is missing or does not fit the model, the model cannot be built again, or `path` cannot
            be written.
    """
    if Path(path).suffix not in (".safetensors", ".ckpt"):
        raise UserError(f"path={path}: must end in .safetensors or .ckpt")
    model = getattr(model, "_orig_mod", model)  # of torch.compile(model)
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
    """What a file has to tell of a model, so that the model is built again from it.

    It is built again here, and its logits are compared with the model's. No random number is drawn.

    Args:
        model: As in `save`; the other arguments are the same, too.

    Raises:
        UserError: An argument is missing or does not fit the model, or the model cannot be built again.
    """
    own = _plain_copy(model)
    known = model if isinstance(model, TrainedModel) else None
    if class_names is None:
        if known is None:
            raise UserError("class_names: is missing; give the name of each class, in the order of the logits")
        class_names = known.class_names
    names = [str(each) for each in class_names]
    size = image_size or (known.image_size if known is not None else _size_of(model))
    told = getattr(model, "pretrained_cfg", None) or {}
    mean, std = (
        _three(word, given if given is not None else getattr(known, word, None) or told.get(word))
        for word, given in (("mean", mean), ("std", std))
    )
    built = _architecture(model, name, kwargs)
    layers = moe_layers(own)
    moe = layers[0][1].config if layers else None
    with torch.random.fork_rng(devices=[]):  # of a training that goes on
        again = build_model(built["name"], built["kwargs"], moe, len(names), size).eval()
    _require_same_logits(own, again, size, names, built)
    config = {"seed": 0, "output_dir": None, "optim": {}, "trainer": {}}
    if known is not None:
        config |= shared_config(known.config)
    config |= {"model": built, "moe": None if moe is None else dataclasses.asdict(moe)}
    fitted = crop or (known.crop if known is not None else "centre")
    facts = ModelFacts(config, names, size, mean, std, crop=fitted)
    if known is None:
        return facts
    of_labels = {"multi_label": known.multi_label, "thresholds": known.thresholds}
    return dataclasses.replace(facts, bit_depth=known.bit_depth, **of_labels)


def _with_labels(
    model: nn.Module, facts: ModelFacts, multi_label: bool | None, thresholds: Sequence[float] | None
) -> ModelFacts:
    """The facts with what `save` was given of the labels.

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
    """A copy on the CPU in float32 and evaluation mode, as a file's model is; adapters are part of its weights."""
    with torch.no_grad():
        return merge_lora(copy.deepcopy(model).cpu().float().eval())


def _size_of(model: nn.Module) -> ImageSize:
    """The size of the images that a model was made for.

    Raises:
        UserError: it does not tell.
    """
    sides = getattr(getattr(model, "patch_embed", None), "img_size", None)
    sides = sides or (getattr(model, "pretrained_cfg", None) or {}).get("input_size", ())[1:]
    if len(sides) != 2:
        raise UserError("image_size: is missing; give the side in pixels of the images it was trained on")
    return as_size(int(sides[0]), int(sides[1]))


def _three(word: str, values: Any) -> list[float]:
    if values is None or len(values) != 3:
        raise UserError(f"{word}={values}: must be three numbers, those that images were normalised with")
    return [float(value) for value in values]


def _architecture(model: nn.Module, name: str | None, kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Timm's name of a model and its arguments, as a config has them.

    Raises:
        UserError: they are not known, or an argument is not of plain types.
    """
    known: dict[str, Any] = getattr(model, CREATED_WITH, {})
    if isinstance(model, TrainedModel):
        known = model.config["model"]
    told = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    name = name or known.get("name") or told
    if name is None:
        raise UserError(f"name: is missing; {type(model).__name__} does not tell timm's name of itself, so give it")
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
    """Fills the model that was built again, and compares its logits on random images with the model's, bit for bit.

    Raises:
        UserError: the weights do not fit it, or the logits or their number differ.
    """
    how = f"name={built['name']!r}, kwargs={built['kwargs']}"
    images = torch.randn(2, 3, *height_and_width(size), generator=torch.Generator().manual_seed(0))
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
