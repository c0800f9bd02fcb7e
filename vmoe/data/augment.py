"""Augments training images with albumentations behind named presets, seeded per sample."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # otherwise its import asks the network for a newer version

import albumentations as A
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from vmoe.data.config import AugmentConfig, Colour, Crop
from vmoe.data.images import eval_crop
from vmoe.data.presets import POLICY_SIDE, AugmentSteps, resolve
from vmoe.errors import UserError
from vmoe.sizes import ImageSize, as_size, height_and_width

_CROP_ASPECT = (3 / 4, 4 / 3)  # range of a crop by scale, relative to the result's own aspect


class Augmenter:
    """Augments training images. The result is a pure function of (image, seed, epoch, index).

    It neither reads nor changes global random state, so the number of workers and other random draws have no effect.

    Args:
        config: The preset and its parameters. A warning names parameters that the preset does not use.
        image_size: Side of the results in pixels, or (height, width).
        mean: Mean of the channels, in [0, 1]: the colour that fills erased and empty areas.
        flip: Probability of a horizontal flip if the config leaves it to the data set.
        seed: The seed, not negative.
        crop: How images of another shape are fitted, as in `DataConfig`.
        channels: As in `DataConfig`.
    """

    def __init__(
        self,
        config: AugmentConfig,
        image_size: ImageSize,
        mean: Colour,
        flip: float,
        seed: int,
        crop: Crop = "centre",
        channels: int | None = None,
    ) -> None:
        self.image_size, self.crop = image_size, crop
        self.seed = seed
        self._sides = height_and_width(image_size)
        self._is_own = config.albumentations is not None
        if isinstance(config.albumentations, dict):
            self._crops_by_scale = True
            self._transform: A.Compose | None = _made_pipeline(config.albumentations)
        else:
            steps = resolve(config, image_size, flip)
            self._crops_by_scale = steps.crop_scale is not None
            is_rgb = channels is None
            fill = tuple(round(255 * value) if is_rgb else value for value in mean)
            transforms = _crop_and_flip(steps, self._sides) + _colour_and_erase(steps, fill, max(self._sides))
            self._transform = A.Compose(transforms, is_check_shapes=False) if transforms else None
        self._share_generators()

    def _share_generators(self) -> None:
        """Makes the generators that are re-seeded for each sample, since new ones cost more than the augmentation."""
        self._random = random.Random()
        self._bits = np.random.Philox(key=self.seed)
        self._bits_state = self._bits.state
        if self._transform is not None:
            self._transform.set_random_state(np.random.Generator(self._bits), self._random)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores the shared generators in a spawned worker: NumPy below 2 pickles a copy of the bit generator."""
        self.__dict__.update(state)
        self._share_generators()

    def __call__(self, image: np.ndarray, epoch: int, index: int) -> np.ndarray:
        """Augments one image.

        Args:
            image: (H, W, 3) uint8, or with `channels` (H, W, C) float32, of any size. It is not changed.
            epoch: The epoch, not negative.
            index: Index of the image in its set.

        Returns:
            (height, width, C) of the same type.
        """
        if not self._crops_by_scale:
            image = eval_crop(image, self.image_size, self.crop)
        elif self.crop != "centre" and not self._is_own:  # first fit the shape, with some spare pixels for the crop
            image = eval_crop(image, as_size(*(round(side * 8 / 7) for side in self._sides)), self.crop)
        if self._transform is None:
            return image
        self._random.seed(self.seed << 128 | epoch << 64 | index)
        self._bits_state["state"]["counter"][:] = (0, 0, epoch, index)  # the first two count a sample's draws
        self._bits.state = self._bits_state
        return self._by_own_pipeline(image) if self._is_own else self._transform(image=image)["image"]

    def _by_own_pipeline(self, image: np.ndarray) -> np.ndarray:
        """Runs a user's pipeline on an image, and fits the result to the image size.

        Raises:
            UserError: It fails, or its result is no image of the same type.
        """
        try:
            varied = self._transform(image=image)["image"]
        except Exception as error:  # a user's step may raise any type
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            size = f"{image.shape[0]} x {image.shape[1]} pixels"
            raise UserError(f"data.augment.albumentations: fails on an image of {size} ({reason})") from error
        if not isinstance(varied, np.ndarray) or varied.dtype != image.dtype or varied.shape[2:] != image.shape[2:]:
            found = f"{getattr(varied, 'dtype', type(varied).__name__)} of shape {tuple(getattr(varied, 'shape', ()))}"
            raise UserError(
                f"data.augment.albumentations: gives {found}; it must give (height, width, {image.shape[2]}) "
                f"{image.dtype}, as it gets: leave out steps such as Normalize and ToTensorV2, which come afterwards"
            )
        return eval_crop(varied, self.image_size, self.crop)


def _crop_and_flip(steps: AugmentSteps, size: tuple[int, int]) -> list[A.BasicTransform]:
    height, width = size
    transforms: list[A.BasicTransform] = []
    if steps.crop_scale is not None:
        ratio = tuple(each * (width / height) for each in _CROP_ASPECT)
        transforms = [A.RandomResizedCrop(size=size, scale=steps.crop_scale, ratio=ratio, area_for_downscale="image")]
    elif steps.crop_padding is not None:
        transforms = [A.Pad(padding=steps.crop_padding), A.RandomCrop(height, width)]
    return [*transforms, A.HorizontalFlip(p=steps.flip)] if steps.flip else transforms


def _made_pipeline(content: dict[str, Any]) -> A.Compose:
    """Makes the pipeline that a user saved.

    Raises:
        UserError: This version of albumentations cannot make it.
    """
    try:
        pipeline = A.from_dict(content)
        return pipeline if isinstance(pipeline, A.Compose) else A.Compose([pipeline])
    except Exception as error:  # for unknown steps and arguments it raises any type
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"data.augment.albumentations: albumentations {A.__version__} cannot make this pipeline ({reason}); "
            "save it with this version"
        ) from error


def _policy(name: str, side: int, fill: tuple[float, ...]) -> A.BasicTransform | A.BaseCompose:
    """The operations of a preset for images of this longer side."""
    if name == "three_augment":
        blur = A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=1)
        return A.OneOf([A.ToGray(p=1), A.Solarize(threshold_range=(0.5, 0.5), p=1), blur], p=1)
    if name == "augmix":
        return _OfTorchvision(v2.AugMix(fill=list(fill)))
    policies = v2.AutoAugmentPolicy
    return _OfTorchvision(
        v2.AutoAugment(policies.CIFAR10 if side <= POLICY_SIDE else policies.IMAGENET, fill=list(fill))
    )


def _colour_and_erase(
    steps: AugmentSteps, fill: tuple[float, ...], side: int
) -> list[A.BasicTransform | A.BaseCompose]:
    transforms: list[A.BasicTransform | A.BaseCompose] = []
    if steps.policy is not None:
        transforms.append(_policy(steps.policy, side, fill))
    if steps.randaugment_ops:
        transforms.append(_OfTorchvision(_randaugment(steps, fill)))
    if steps.color_jitter:
        change = (1 - steps.color_jitter, 1 + steps.color_jitter)
        transforms.append(A.ColorJitter(brightness=change, contrast=change, saturation=change, hue=(0, 0), p=1))
    if steps.erasing:
        transforms.append(A.Erasing(p=steps.erasing, fill=fill))
    return transforms


def _randaugment(steps: AugmentSteps, fill: tuple[float, ...]) -> v2.Transform:
    """RandAugment's operations. Each draws its own magnitude between the lowest and the highest."""
    low, high = steps.randaugment_magnitude
    choices = [v2.RandAugment(1, magnitude, fill=list(fill)) for magnitude in range(low, high + 1)]
    # with a single magnitude RandomChoice would still draw, and shift the draws of the operations
    operation = v2.RandomChoice(choices) if len(choices) > 1 else choices[0]
    return v2.Compose([operation] * steps.randaugment_ops)


class _OfTorchvision(A.ImageOnlyTransform):
    """Runs operations of torchvision as a step of albumentations. They draw from torch's global generator.

    Args:
        operations: Operations on an image of Pillow.
    """

    def __init__(self, operations: v2.Transform) -> None:
        super().__init__(p=1)
        self.operations = operations

    def get_params(self) -> dict[str, Any]:
        return {"torch_seed": self.py_random.getrandbits(63)}

    def apply(self, img: np.ndarray, torch_seed: int, **_: Any) -> np.ndarray:
        with _torch_seed(torch_seed):
            return np.array(self.operations(Image.fromarray(img)))


@contextmanager
def _torch_seed(seed: int) -> Iterator[None]:
    """Seeds torch's global CPU generator and restores it. Unlike `torch.manual_seed` it does not touch GPUs."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
