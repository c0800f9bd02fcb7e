"""The parts of a data set: stores of images, and labelled views of them."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Protocol

import numpy as np

from vmoe.data.channels import Stored
from vmoe.data.image_files import require_regular
from vmoe.data.images import load_image
from vmoe.errors import UserError


class ImageStore(Protocol):
    """A store of images that are read one at a time."""

    def read(self, position: int) -> np.ndarray:
        """The image as (H, W, 3) uint8, or with channels (H, W, C) float32. A damaged one raises a UserError."""

    def place(self, position: int) -> str:
        """The image's source: its path, or its array and row."""

    def patch_labels(self, position: int) -> np.ndarray | None:
        """The patch labels, (rows, columns) integers, or None."""
        return None

    @property
    def side(self) -> int | None:
        """The common shorter side of all images in pixels, or None."""
        return None


@dataclass(frozen=True)
class ArrayImages(ImageStore):
    """Images in memory: (n, H, W, 1 or 3) uint8, the array's name, and patch labels if there are any.

    With `channels` (n, H, W, C) of any number type. `channels` and `bit_depth` are as in `load_image`.
    """

    array: np.ndarray
    name: str
    patches: np.ndarray | None = None  # (n, rows, columns) integers
    bit_depth: int | None = None
    channels: int | None = None

    def read(self, position: int) -> np.ndarray:
        image = self.array[position]
        if self.channels is not None:
            return Stored(image).fractions(self.channels, self.bit_depth)
        return image if image.shape[2] == 3 else np.repeat(image, 3, axis=2)

    def place(self, position: int) -> str:
        return f"{self.name}[{position}]"

    def patch_labels(self, position: int) -> np.ndarray | None:
        return None if self.patches is None else self.patches[position]

    @property
    def side(self) -> int:
        return min(self.array.shape[1:3])


@dataclass(frozen=True)
class FileImages(ImageStore):
    """Images in files. `bit_depth` and `channels` are as in `load_image`."""

    paths: list[str]
    bit_depth: int | None = None
    channels: int | None = None

    def read(self, position: int) -> np.ndarray:
        return load_image(self.paths[position], self.bit_depth, self.channels)

    def open(self, position: int) -> BinaryIO:
        """The file of an image."""
        require_regular(self.paths[position])
        return open(self.paths[position], "rb")

    def place(self, position: int) -> str:
        return self.paths[position]


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one split: `positions` (n,) in a store, and their `labels`.

    Labels are (n,) int64 with one class per image, or (n, classes) int8 of 0 and 1 with several.

    If images never repeat, each pass over the split has new images with the same labels: positions are shifted by
    `pass_step` per pass.
    """

    images: ImageStore
    positions: np.ndarray
    labels: np.ndarray
    pass_step: int = 0

    @classmethod
    def all_of(cls, images: ImageStore, labels: Sequence[int] | np.ndarray) -> "ImageSet":
        labels = np.asarray(labels)
        labels = labels.astype(np.int8 if labels.ndim == 2 else np.int64)
        return cls(images, np.arange(len(labels)), labels)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int, number_of_pass: int = 0) -> np.ndarray:
        """Image `index` of this split, (H, W, 3) uint8 or (H, W, C) float32, in this pass over it."""
        return self.images.read(self.positions[index] + number_of_pass * self.pass_step)

    def place(self, index: int) -> str:
        """The source of image `index` of this split."""
        return self.images.place(self.positions[index])

    def patch_labels(self, index: int) -> np.ndarray | None:
        """The patch labels of image `index`, (rows, columns) integers, or None."""
        return self.images.patch_labels(self.positions[index])

    def fingerprint(self) -> str:
        """A text that changes with the images' files, labels and order, but not with the path of their folder."""
        digest = hashlib.sha256(self.labels.tobytes())
        if isinstance(self.images, FileImages):
            names = [os.path.basename(self.images.paths[position]) for position in self.positions]
            digest.update("\0".join(names).encode(errors="surrogateescape"))
        else:
            digest.update(self.positions.tobytes())
        return digest.hexdigest()[:16]

    def take(self, indices: np.ndarray) -> "ImageSet":
        """The images at `indices`, in that order."""
        return replace(self, positions=self.positions[indices], labels=self.labels[indices])

    @property
    def is_multi_label(self) -> bool:
        """Whether an image may have several classes, or none."""
        return self.labels.ndim == 2

    def class_counts(self, classes: int) -> np.ndarray:
        """The number of images of each class, (classes,) int64."""
        if self.is_multi_label:
            return self.labels.sum(0, dtype=np.int64)
        return np.bincount(self.labels, minlength=classes)

    def strata(self) -> np.ndarray:
        """The strata of images for stratified choices, (n,): the (rarest) class, or one number more without a class."""
        if not self.is_multi_label:
            return self.labels
        counts = self.class_counts(self.labels.shape[1])
        by_rarity = np.argsort(counts, kind="stable")
        first = self.labels[:, by_rarity].argmax(1)  # argmax takes the first among equals
        return np.where(self.labels.any(1), by_rarity[first], len(counts))

    def keep_classes(self, classes: Sequence[int]) -> "ImageSet":
        """The images of these classes, renumbered 0, 1, ... in the given order. With several labels all images stay."""
        if self.is_multi_label:
            return replace(self, labels=self.labels[:, list(classes)])
        kept = self.take(np.flatnonzero(np.isin(self.labels, classes)))
        number = {label: new for new, label in enumerate(classes)}
        return replace(kept, labels=np.array([number[label] for label in kept.labels], dtype=np.int64))


@dataclass(frozen=True)
class Splits:
    """A data set. `val` is None without a validation split, and `test` itself if one split is used for both."""

    train: ImageSet
    val: ImageSet | None
    test: ImageSet
    class_names: list[str]
    image_size: int | None = None  # the arrays' own, if the set has no fixed default
    patch_names: list[str] | None = None  # names of the patch labels
    bit_depth: int | None = None  # of deep files, given or measured
    notes: Sequence[str] = ()  # lines on the set to print, such as on ignored files
    epoch_images: int | None = None  # images per epoch, if not all of `train`


def flags_of(labels: Sequence[Iterable[Any]], classes: Sequence[Any]) -> np.ndarray:
    """Labels as (n, classes) int8 of 0 and 1, from a list of labels per image."""
    number = {each: index for index, each in enumerate(classes)}
    flags = np.zeros((len(labels), len(classes)), dtype=np.int8)
    for row, each in enumerate(labels):
        flags[row, [number[label] for label in each]] = 1
    return flags


def require_training_of_each(place: object, sets: Mapping[str, ImageSet], names: Sequence[str]) -> None:
    """Checks that each class of a split has a training image.

    Raises:
        UserError: A class has none. The message starts with `place` and names the class.
    """
    is_trained = sets["train"].class_counts(len(names)) > 0
    for split, part in sets.items():
        unknown = np.flatnonzero((part.class_counts(len(names)) > 0) & ~is_trained)
        if len(unknown):
            raise UserError(f"{place}: class {names[unknown[0]]!r} of {split} has no training picture; add one")
