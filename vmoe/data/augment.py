"""Augmentation of training images: albumentations behind named presets, seeded sample by sample."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # otherwise importing it asks the network for a newer version

import albumentations as A
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from vmoe.data.config import AugmentConfig, Colour, Crop
from vmoe.data.images import eval_crop
from vmoe.data.presets import AugmentSteps, resolve
from vmoe.sizes import ImageSize, as_size, height_and_width

_ASPECT = (3 / 4, 4 / 3)  # of a crop by scale, beside the results' own


class Augmenter:
    """Varies training images; the result is a pure function of (image, seed, epoch, index).

    No global random state is read or changed: neither the number of workers nor other random draws change a result.

    Args:
        config: preset and its parameters. A warning names a parameter that the preset does not use.
        image_size: side of the results in pixels, or (height, width).
        mean: of the channels, in [0, 1]: the colour that fills what is cut out or moved in from outside.
        flip: probability of a horizontal flip where the config leaves it to the data set.
        seed: not negative.
        crop: how images of another shape are fitted, as in `DataConfig`.
    """

    def __init__(
        self,
        config: AugmentConfig,
        image_size: ImageSize,
        mean: Colour,
        flip: float,
        seed: int,
        crop: Crop = "centre",
    ) -> None:
        self.image_size, self.crop = image_size, crop
        self.seed = seed
        self._sides = height_and_width(image_size)
        steps = resolve(config, image_size, flip)
        self._crops_by_scale = steps.crop_scale is not None
        fill = tuple(round(255 * value) for value in mean)
        transforms = _crop_and_flip(steps, self._sides) + _colour_and_erase(steps, fill)
        self._transform = A.Compose(transforms, is_check_shapes=False) if transforms else None
        self._share_generators()

    def _share_generators(self) -> None:
        """Makes the pair of generators that is re-seeded for each sample: new ones cost more than the augmentation."""
        self._random = random.Random()
        self._bits = np.random.Philox(key=self.seed)
        self._bits_state = self._bits.state
        if self._transform is not None:
            self._transform.set_random_state(np.random.Generator(self._bits), self._random)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As a spawned worker gets it: NumPy below 2 has given the transforms' generator a copy of the bits."""
        self.__dict__.update(state)
        self._share_generators()

    def __call__(self, image: np.ndarray, epoch: int, index: int) -> np.ndarray:
        """Varies one image.

        Args:
            image: (H, W, 3) uint8 of any size; not changed.
            epoch: not negative.
            index: of the image in its set.

        Returns:
            (height, width, 3) uint8.
        """
        if not self._crops_by_scale:
            image = eval_crop(image, self.image_size, self.crop)
        elif self.crop != "centre":  # the shape is changed first, with some pixels to spare for the crop
            image = eval_crop(image, as_size(*(round(side * 8 / 7) for side in self._sides)), self.crop)
        if self._transform is None:
            return image
        self._random.seed(self.seed << 128 | epoch << 64 | index)
        self._bits_state["state"]["counter"][:] = (0, 0, epoch, index)  # the first two count the draws of a sample
        self._bits.state = self._bits_state
        return self._transform(image=image)["image"]


def _crop_and_flip(steps: AugmentSteps, size: tuple[int, int]) -> list[A.BasicTransform]:
    height, width = size
    transforms: list[A.BasicTransform] = []
    if steps.crop_scale is not None:
        ratio = tuple(each * (width / height) for each in _ASPECT)
        transforms = [A.RandomResizedCrop(size=size, scale=steps.crop_scale, ratio=ratio, area_for_downscale="image")]
    elif steps.crop_padding is not None:
        transforms = [A.Pad(padding=steps.crop_padding), A.RandomCrop(height, width)]
    return [*transforms, A.HorizontalFlip(p=steps.flip)] if steps.flip else transforms


def _colour_and_erase(steps: AugmentSteps, fill: tuple[int, ...]) -> list[A.BasicTransform]:
    transforms: list[A.BasicTransform] = []
    if steps.randaugment_ops:
        transforms.append(_RandAugment(steps.randaugment_ops, steps.randaugment_magnitude, fill))
    if steps.color_jitter:
        change = (1 - steps.color_jitter, 1 + steps.color_jitter)
        transforms.append(A.ColorJitter(brightness=change, contrast=change, saturation=change, hue=(0, 0), p=1))
    if steps.erasing:
        transforms.append(A.Erasing(p=steps.erasing, fill=fill))
    return transforms


class _RandAugment(A.ImageOnlyTransform):
    """torchvision's RandAugment as a step of albumentations, which has none. It draws from torch's global generator.

    Args:
        operations: an image.
        magnitudes: lowest and highest; between them each operation draws its own.
        fill: the colour moved in from outside.
    """

    def __init__(self, operations: int, magnitudes: tuple[int, int], fill: tuple[int, ...]) -> None:
        super().__init__(p=1)
        low, high = magnitudes
        choices = [v2.RandAugment(1, magnitude, fill=list(fill)) for magnitude in range(low, high + 1)]
        # With one magnitude RandomChoice would still draw, which would shift the draws of the operations.
        operation = v2.RandomChoice(choices) if len(choices) > 1 else choices[0]
        self.operations = v2.Compose([operation] * operations)

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
