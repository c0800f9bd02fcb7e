"""Builds models from the names and arguments in a config or a checkpoint."""

import math
from typing import Any

from torch import nn

from vmoe.errors import UserError
from vmoe.models import create_model
from vmoe.models.sources import with_source
from vmoe.moe import MoeConfig
from vmoe.sizes import ImageSize

# Arguments of timm that would fetch or open other files. A checkpoint has its own weights.
_FETCHING_ARGUMENTS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


def build_model(
    name: str,
    kwargs: dict[str, Any],
    moe: MoeConfig | None,
    num_classes: int,
    image_size: ImageSize,
    channels: int | None = None,
) -> nn.Module:
    """Builds the model of a config for a data set, without trained weights.

    Without `moe` it is dense, whatever its name. Models for any image size get no size. None as `channels` means three.

    Raises:
        UserError: timm has no such model, it does not accept these arguments, or `moe` does not fit it.
    """
    if channels is not None:
        kwargs = {**kwargs, "in_chans": channels}
    try:
        model = _create(with_source(name), moe or False, num_classes, image_size, kwargs)
    except Exception as error:  # timm raises any type for wrong arguments
        reason = " ".join(str(error).split())
        if isinstance(error, KeyError) or not reason:
            reason = f"{type(error).__name__} {reason}".strip()
        with_these = [f"model.kwargs={kwargs}"] * bool(kwargs) + ["this moe"] * (moe is not None)
        how = f" with {' and '.join(with_these)}" if with_these else ""
        raise UserError(f"model.name={name}: cannot be built{how}: {reason}") from error
    _check_patches(model, image_size)
    return model


def _create(
    name: str, moe: MoeConfig | bool, num_classes: int, image_size: ImageSize, kwargs: dict[str, Any]
) -> nn.Module:
    try:
        return create_model(name, moe, num_classes=num_classes, img_size=image_size, **kwargs)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return create_model(name, moe, num_classes=num_classes, **kwargs)


def _check_patches(model: nn.Module, image_size: ImageSize) -> None:
    """Refuses image sizes of which patches would silently leave out the last rows or columns."""
    embed = getattr(model, "patch_embed", None)
    sides = getattr(embed, "patch_size", None)
    if sides is None or getattr(embed, "dynamic_img_pad", False):
        return
    if isinstance(image_size, tuple):
        patch = sides if isinstance(sides, tuple) else (sides, sides)
        if any(side % of_patch for side, of_patch in zip(image_size, patch, strict=True)):
            raise UserError(
                f"data.image_size={list(image_size)}: its height and width must be multiples of those of the patches, "
                f"{patch[0]} and {patch[1]}"
            )
        return
    side = math.lcm(*sides) if isinstance(sides, tuple) else sides
    if image_size % side:
        near = " or ".join(str(size) for size in (image_size // side * side, (image_size // side + 1) * side) if size)
        raise UserError(f"data.image_size={image_size}: is no multiple of the patch size {side}; use {near}")


def timm_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a run's model (`model.kwargs`) without those that would fetch weights."""
    return {key: value for key, value in kwargs.items() if key not in _FETCHING_ARGUMENTS}
