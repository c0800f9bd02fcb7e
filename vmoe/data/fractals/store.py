"""Fractals as a data set: the numbers of pictures, and the splits."""

from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from vmoe.data.config import DEFAULTS, DataConfig, FractalConfig
from vmoe.data.fractals.pictures import PictureMaker
from vmoe.data.imageset import ImageSet, Splits

_STREAMS = {"train": 2**40, "val": 2**41, "test": 2**42}  # far above the epochs in augmentation's keys
_VAL_PART, _TEST_PART = 8, 4  # an epoch's training images over these numbers
_PIXELS_AT_ONCE = 256 * 32**2


class FractalImages:
    """The pictures of one split, made on demand. Picture `position` has the class `position` modulo C.

    Args:
        config: The classes and the strength of variations.
        size: S, side in pixels.
        split: "train", "val" or "test".
        seed: Seed of training pictures. Those of other splits are always the same.
        pass_step: If no training picture comes twice, the number of pictures per pass; then a picture's class is that
            of the same position in the first pass. 0 otherwise.
    """

    def __init__(self, config: FractalConfig, size: int, split: str, seed: int = 0, pass_step: int = 0) -> None:
        self.config, self.side, self.split, self.pass_step = config, size, split, pass_step
        self.seed = seed if split == "train" else 0

    def read(self, position: int) -> np.ndarray:
        """The picture as (S, S, 3) uint8."""
        return self._on_host(torch.tensor([position]))[0].permute(1, 2, 0).contiguous().numpy()

    def place(self, position: int) -> str:
        """The split and the picture's position."""
        return f"fractals {self.split}[{position}]"

    def patch_labels(self, position: int) -> None:
        """None: patches have no labels."""
        return None

    def on(self, device: torch.device, fused: bool = False) -> "FractalsOnDevice":
        """The maker of the pictures on a device. `fused` is as in `PictureMaker`."""
        return FractalsOnDevice(self, device, fused)

    @cached_property
    def _on_host(self) -> "FractalsOnDevice":
        return self.on(torch.device("cpu"))


class FractalsOnDevice:
    """Makes pictures of one split on a device.

    Args:
        images: The split.
        device: The device.
        fused: As in `PictureMaker`.
    """

    def __init__(self, images: FractalImages, device: torch.device, fused: bool) -> None:
        self.images = images
        self._make = PictureMaker(images.config, images.side, images.seed, _STREAMS[images.split], device, fused)

    def __call__(self, positions: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) uint8 of their positions (B,) int64."""
        in_pass = positions % self.images.pass_step if self.images.pass_step else positions
        return self._make(in_pass % self.images.config.classes, positions)

    def in_turn(self, positions: Tensor) -> Tensor:
        """The same for any number of pictures. It makes at most a few hundred at a time, fewer if they are large."""
        side = self.images.side
        at_once = max(1, _PIXELS_AT_ONCE // side**2)
        pictures = torch.empty(len(positions), 3, side, side, dtype=torch.uint8, device=positions.device)
        for target, part in zip(pictures.split(at_once), positions.split(at_once), strict=True):
            target.copy_(self(part))
        return pictures


def load_fractals(config: DataConfig) -> Splits:
    """The data set. Training pictures depend on `config.split_seed`; others are always the same."""
    known = config.fractals
    size = config.image_size or DEFAULTS["fractals"].image_size
    counts = {"val": known.epoch_images // _VAL_PART, "test": known.epoch_images // _TEST_PART}
    sets = {split: _set(FractalImages(known, size, split), count) for split, count in counts.items()}
    pass_step = 0 if config.images is not None else known.epoch_images
    images = FractalImages(known, size, "train", config.split_seed, pass_step)
    train = replace(_set(images, config.images or known.epoch_images), pass_step=pass_step)
    names = [str(number) for number in range(known.classes)]
    return Splits(train, sets["val"], sets["test"], names, epoch_images=known.epoch_images)


def _set(images: FractalImages, count: int) -> ImageSet:
    return ImageSet.all_of(images, np.arange(count) % images.config.classes)
