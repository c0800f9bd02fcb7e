"""Resolves a config's augmentation steps from its preset, for both pipelines."""

import warnings
from typing import Any, NamedTuple

from vmoe.data.sections import OF_WORKERS, AugmentConfig
from vmoe.sizes import ImageSize, height_and_width

# A preset's values for settings that are None. It uses no other settings.
_PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    "light": {"crop_padding": None, "crop_scale": None, "flip": None},
    "autoaugment": {"crop_padding": None, "crop_scale": None, "flip": None},
    "augmix": {"crop_padding": None, "crop_scale": None, "flip": None},
    "three_augment": {"crop_padding": None, "crop_scale": None, "flip": None, "color_jitter": 0.3},
    "strong": {
        "crop_padding": None,
        "crop_scale": None,
        "flip": None,
        "randaugment_ops": 2,
        "randaugment_magnitude": 9,
        "color_jitter": 0.2,
        "erasing": 0.25,
    },
}
POLICY_SIDE = 64  # pixels; larger images are cropped by scale
_CROP_SCALE = (0.08, 1.0)


class AugmentSteps(NamedTuple):
    """Every step of the augmentation in order. None or 0 leaves a step out.

    Attributes:
        crop_padding: Pixels per side by which images are padded before a random crop.
        crop_scale: Smallest and largest share of the area, for a crop by scale.
        flip: Probability of a horizontal flip.
        randaugment_ops: RandAugment's operations per image.
        randaugment_magnitude: The lowest and the highest, both included.
        color_jitter: Largest relative change of brightness, contrast and saturation.
        erasing: Probability of erasing a rectangle.
        policy: "autoaugment", "augmix" or "three_augment", which the device pipeline does not have.
    """

    crop_padding: int | None = None
    crop_scale: tuple[float, float] | None = None
    flip: float = 0.0
    randaugment_ops: int = 0
    randaugment_magnitude: tuple[int, int] = (0, 0)
    color_jitter: float = 0.0
    erasing: float = 0.0
    policy: str | None = None


def resolve(config: AugmentConfig, image_size: ImageSize, flip: float) -> AugmentSteps:
    """The augmentation steps of a config.

    Args:
        config: The preset and its parameters. A warning names parameters that the preset does not use.
        image_size: Side of the results in pixels, or (height, width).
        flip: Probability of a horizontal flip if the config leaves it to the data set.
    """
    settings = dict(_PRESETS[config.preset])
    for name in _PRESETS["strong"]:
        value = getattr(config, name)
        if value is None:
            continue
        if name in settings:
            settings[name] = value
        else:
            warnings.warn(
                f"data.augment.{name}={value} has no effect: preset {config.preset!r} does not use it", stacklevel=3
            )
    if config.preset == "none":
        return AugmentSteps()
    padding, scale = settings["crop_padding"], settings["crop_scale"]
    if scale is None and padding is None:
        sides = height_and_width(image_size)
        padding, scale = (min(sides) // 8, None) if max(sides) <= POLICY_SIDE else (None, _CROP_SCALE)
    magnitude = settings.get("randaugment_magnitude", 0)
    return AugmentSteps(
        crop_padding=padding,
        crop_scale=None if scale is None else tuple(scale),
        flip=flip if settings["flip"] is None else settings["flip"],
        randaugment_ops=settings.get("randaugment_ops", 0),
        randaugment_magnitude=(magnitude, magnitude) if isinstance(magnitude, int) else tuple(magnitude),
        color_jitter=settings.get("color_jitter", 0.0),
        erasing=settings.get("erasing", 0.0),
        policy=config.preset if config.preset in OF_WORKERS else None,
    )
