"""Augmentation of training images: albumentations behind named presets, seeded sample by sample."""

import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # otherwise importing it asks the network for a newer version

import albumentations as A
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from vmoe.data.config import AugmentConfig, Colour
from vmoe.data.images import eval_crop

# The values a preset gives to settings left at None; it uses no other settings.
_PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    "light": {"crop_padding": None, "crop_scale": None, "flip": None},
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
_PAD_UP_TO = 64  # pixels; larger images are cropped by scale
_CROP_SCALE = (0.08, 1.0)


class Augmenter:
    """Varies training images; the result is a pure function of (image, seed, epoch, index).

    No global random state is read or changed, so the number of workers and what else draws random numbers is no matter.

    Args:
        config: preset and its parameters. A parameter that the preset does not use is warned about.
        image_size: side of the results in pixels.
        mean: of the channels, in [0, 1]: the colour that fills what is cut out or moved in from outside.
        flip: probability of a horizontal flip where the config leaves it to the data set.
        seed: not negative.
    """

    def __init__(self, config: AugmentConfig, image_size: int, mean: Colour, flip: float, seed: int) -> None:
        self.image_size = image_size
        self.seed = seed
        settings = _settings(config)
        self._crops_by_scale = settings.get("crop_scale") is not None or (
            settings.get("crop_padding") is None and image_size > _PAD_UP_TO
        )
        fill = tuple(round(255 * value) for value in mean)
        steps = [] if config.preset == "none" else _crop_and_flip(settings, image_size, self._crops_by_scale, flip)
        if config.preset == "strong":
            steps += _colour_and_erase(settings, fill)
        self._steps = A.Compose(steps, is_check_shapes=False) if steps else None
        # One pair of generators, re-seeded for each sample: making new ones costs more than the augmentation itself.
        self._random = random.Random()
        self._bits = np.random.Philox(key=seed)
        self._bits_state = self._bits.state
        if self._steps is not None:
            self._steps.set_random_state(np.random.Generator(self._bits), self._random)

    def __call__(self, image: np.ndarray, epoch: int, index: int) -> np.ndarray:
        """Varies one image.

        Args:
            image: (H, W, 3) uint8 of any size; not changed.
            epoch: not negative.
            index: of the image in its set.

        Returns:
            (image_size, image_size, 3) uint8.
        """
        if self._steps is None or not self._crops_by_scale:
            image = eval_crop(image, self.image_size)
        if self._steps is None:
            return image
        self._random.seed(self.seed << 128 | epoch << 64 | index)
        self._bits_state["state"]["counter"][:] = (0, 0, epoch, index)  # the first two count the draws of a sample
        self._bits.state = self._bits_state
        return self._steps(image=image)["image"]


def _settings(config: AugmentConfig) -> dict[str, Any]:
    """The preset's values, overridden by the config's."""
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
    return settings


def _crop_and_flip(
    settings: dict[str, Any], image_size: int, by_scale: bool, default_flip: float
) -> list[A.BasicTransform]:
    size = (image_size, image_size)
    if by_scale:
        scale = tuple(settings["crop_scale"] or _CROP_SCALE)
        steps = [A.RandomResizedCrop(size=size, scale=scale, area_for_downscale="image")]
    else:
        padding = settings["crop_padding"]
        padding = image_size // 8 if padding is None else padding
        steps = [A.Pad(padding=padding), A.RandomCrop(*size)]
    flip = default_flip if settings["flip"] is None else settings["flip"]
    return [*steps, A.HorizontalFlip(p=flip)] if flip else steps


def _colour_and_erase(settings: dict[str, Any], fill: tuple[int, ...]) -> list[A.BasicTransform]:
    steps: list[A.BasicTransform] = []
    if settings["randaugment_ops"]:
        steps.append(_RandAugment(settings["randaugment_ops"], settings["randaugment_magnitude"], fill))
    if strength := settings["color_jitter"]:
        change = (1 - strength, 1 + strength)
        steps.append(A.ColorJitter(brightness=change, contrast=change, saturation=change, hue=(0, 0), p=1))
    if settings["erasing"]:
        steps.append(A.Erasing(p=settings["erasing"], fill=fill))
    return steps


class _RandAugment(A.ImageOnlyTransform):
    """torchvision's RandAugment as a step of albumentations, which has none. It draws from torch's global generator."""

    def __init__(self, operations: int, magnitude: int, fill: tuple[int, ...]) -> None:
        super().__init__(p=1)
        self.operations = v2.RandAugment(operations, magnitude, fill=list(fill))

    def get_params(self) -> dict[str, Any]:
        return {"torch_seed": self.py_random.getrandbits(63)}

    def apply(self, img: np.ndarray, torch_seed: int, **_: Any) -> np.ndarray:
        with _torch_seed(torch_seed):
            return np.array(self.operations(Image.fromarray(img)))


@contextmanager
def _torch_seed(seed: int) -> Iterator[None]:
    """Seeds torch's global CPU generator and restores it; other than `torch.manual_seed` it leaves GPUs alone."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
