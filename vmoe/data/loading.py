"""From splits to batches: what the worker processes run, and the loader around them."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from vmoe.data.addresses import UnreachableError
from vmoe.data.augment import Augmenter
from vmoe.data.config import Colour, Crop
from vmoe.data.corruptions import corrupt
from vmoe.data.datasets import ImageSet
from vmoe.data.images import eval_crop, load_image, normalise
from vmoe.data.samplers import Key
from vmoe.errors import UserError
from vmoe.sizes import ImageSize

_SMALL_SHARED_MEMORY = (
    "shared memory (/dev/shm) is full, so batches come from the workers through pipes, which is slower; "
    "start a container with --shm-size 1g"
)


class Batch(NamedTuple):
    """Images ready for the model, on the CPU or on the device that trains."""

    images: torch.Tensor | None  # (B, C, H, W) float32, normalised; None where `ImageDataModule.made` makes them
    labels: torch.Tensor | None  # (B,) int64, or (B, classes) int8 of 0 and 1; None where nobody labelled the images
    damaged: list[str]  # training images that could not be read and were replaced by the next one
    patch_labels: torch.Tensor | None = None  # (B, rows, columns) int64, what each patch shows, where that is known
    keys: torch.Tensor | None = None  # (B, 2) int64, epoch and index of training images; None in evaluation
    targets: torch.Tensor | None = None  # (B, classes) float32 of mixed images; None: labels count


class TrainImages(Dataset):
    """Augmented training images; a batch is a function of its (epoch, index) keys.

    Args:
        images: The training split.
        augmenter: Varies an image by its key.
        mean: Of the channels.
        std: Of the channels.
    """

    def __init__(self, images: ImageSet, augmenter: Augmenter, mean: Colour, std: Colour) -> None:
        self.images, self.augmenter, self.mean, self.std = images, augmenter, mean, std

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[Key]) -> Batch:
        """The batch of these keys. A damaged image is replaced by the next readable one of the set."""
        pictures, labels, damaged = [], [], []
        for epoch, index in keys:
            image, index = read_or_next(self.images, index, damaged, epoch)
            pictures.append(self.augmenter(image, epoch, index))
            labels.append(self.images.labels[index])
        images = normalise(pictures, self.mean, self.std)
        return Batch(images, torch.from_numpy(np.array(labels)), damaged, keys=torch.from_numpy(np.array(keys)))


def read_or_next(images: ImageSet, index: int, damaged: list[str], number_of_pass: int = 0) -> tuple[np.ndarray, int]:
    """Image `index`, (H, W, 3) uint8 or (H, W, C) float32, or the next that can be read, and its index.

    Args:
        images: The training split.
        index: Of the image.
        damaged: Gets the places of those that cannot be read.
        number_of_pass: Over the training set.

    Raises:
        UserError: Not one image can be read, or the network fails.
    """
    for step in range(len(images)):
        candidate = (index + step) % len(images)
        try:
            return images.read(candidate, number_of_pass), candidate
        except UnreachableError:  # all others would be as unreachable
            raise
        except UserError:
            damaged.append(images.place(candidate))
    raise UserError(f"{images.place(index)}: neither this nor any other training image can be read")


class EvalImages(Dataset):
    """Images as evaluation sees them. A damaged one is an error that names it.

    Args:
        images: A validation or test split.
        image_size: Side in pixels, or (height, width).
        mean: Of the channels.
        std: Of the channels.
        crop: As in `eval_crop`.
    """

    def __init__(
        self, images: ImageSet, image_size: ImageSize, mean: Colour, std: Colour, crop: Crop = "centre"
    ) -> None:
        self.images, self.image_size, self.mean, self.std, self.crop = images, image_size, mean, std, crop

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> Batch:
        """The batch of these images."""
        pictures = [self.picture(index) for index in indices]
        labels = torch.from_numpy(self.images.labels[indices])
        return Batch(normalise(pictures, self.mean, self.std), labels, [], patch_labels_of(self.images, indices))

    def picture(self, index: int) -> np.ndarray:
        """Image `index`, (H, W, 3) uint8, before it is normalised."""
        return eval_crop(self.images.read(index), self.image_size, self.crop)


class CorruptedImages(EvalImages):
    """Images as evaluation sees them, corrupted; the draws are a function of (seed, name, severity, index).

    Args:
        images: A validation or test split.
        image_size: Side in pixels.
        mean: Of the channels.
        std: Of the channels.
        name: A key of `vmoe.data.corruptions.CORRUPTIONS`.
        severity: 1 to 5.
        seed: Of the corruption.
        crop: As in `eval_crop`.
    """

    def __init__(
        self,
        images: ImageSet,
        image_size: int,
        mean: Colour,
        std: Colour,
        name: str,
        severity: int,
        seed: int,
        crop: Crop = "centre",
    ) -> None:
        super().__init__(images, image_size, mean, std, crop)
        self.name, self.severity, self.seed = name, severity, seed

    def picture(self, index: int) -> np.ndarray:
        """Image `index`, (H, W, 3) uint8, before it is normalised."""
        return corrupt(super().picture(index), self.name, self.severity, self.seed, index)


def patch_labels_of(images: ImageSet, indices: Sequence[int]) -> torch.Tensor | None:
    """What each patch of some images shows, (B, rows, columns) int64; None where that is not known."""
    patches = [images.patch_labels(index) for index in indices]
    return None if any(part is None for part in patches) else torch.from_numpy(np.stack(patches))


class UnvariedTrainImages(EvalImages):
    """Training images as evaluation sees them. A damaged one is replaced by the next readable one, as in training."""

    def __getitems__(self, indices: list[int]) -> Batch:
        """The batch of these images."""
        pictures, labels, damaged = [], [], []
        for index in indices:
            image, index = read_or_next(self.images, index, damaged)
            pictures.append(eval_crop(image, self.image_size, self.crop))
            labels.append(self.images.labels[index])
        return Batch(normalise(pictures, self.mean, self.std), torch.from_numpy(np.array(labels)), damaged)


class UnlabelledImages(Dataset):
    """Image files as evaluation sees them, without labels. A damaged one is an error that names it.

    Args:
        paths: Of the files.
        image_size: Side in pixels, or (height, width).
        mean: Of the channels.
        std: Of the channels.
        bit_depth: Of files with more than 8 bits per channel, as in `load_image`.
        crop: As in `eval_crop`.
        channels: As in `load_image`.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        image_size: ImageSize,
        mean: Colour,
        std: Colour,
        bit_depth: int | None = None,
        crop: Crop = "centre",
        channels: int | None = None,
    ) -> None:
        self.paths, self.image_size, self.mean, self.std = paths, image_size, mean, std
        self.bit_depth, self.crop, self.channels = bit_depth, crop, channels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, indices: list[int]) -> Batch:
        """The batch of these images; its labels are None."""
        pictures = [
            eval_crop(load_image(self.paths[index], self.bit_depth, self.channels), self.image_size, self.crop)
            for index in indices
        ]
        return Batch(normalise(pictures, self.mean, self.std), None, [])


class ImageLoader(DataLoader):
    """A DataLoader of whole batches that raises a worker's UserError as it was.

    PyTorch would raise it with the worker's traceback for a message. Iterating starts with the first batch asked for,
    when the sampler knows its epoch, and not with `iter()`. No global random state is drawn from. Where shared memory
    is full, as a container's 64 MiB soon are, batches come through a pipe, with a warning: PyTorch would wait for ever.

    Args:
        dataset: Its `__getitems__` gives a batch.
        workers: Number of processes.
        **options: DataLoader's.
    """

    def __init__(self, dataset: Dataset, *, workers: int, **options: Any) -> None:
        super().__init__(
            _ErrorsAsValues(dataset),
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_uncollated,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
            **options,
        )

    def __iter__(self) -> Iterator[Batch]:
        if self.num_workers:
            # A forked worker would wait for ever for OpenCV's threads, which stay behind in this process.
            cv2.setNumThreads(0)
        is_warned = False
        for batch in super().__iter__():
            if isinstance(batch, _ThroughPipe):
                if not is_warned:
                    warnings.warn(_SMALL_SHARED_MEMORY, stacklevel=1)  # those of the caller, Lightning, are hidden
                    is_warned = True
                batch = batch.taken(self.pin_memory)
            if isinstance(batch, UserError):
                try:
                    raise batch
                finally:
                    del batch  # else the error holds this frame, which holds the error, and the workers live on
            yield batch


class _ThroughPipe:
    """A batch of a worker with arrays in place of tensors: they need no shared memory.

    Args:
        batch: A tuple; some of its items are tensors.
    """

    def __init__(self, batch: tuple) -> None:
        self._type, self._items = type(batch), [each.numpy() if isinstance(each, Tensor) else each for each in batch]

    def taken(self, pinned: bool) -> tuple:
        """The batch, in pinned memory if it must be."""
        items = [torch.from_numpy(each) if isinstance(each, np.ndarray) else each for each in self._items]
        items = [each.pin_memory() if pinned and isinstance(each, Tensor) else each for each in items]
        return self._type(*items) if issubclass(self._type, Batch) else self._type(items)


class _ErrorsAsValues(Dataset):
    """What a worker hands over to the main process, where `ImageLoader` takes it: batches, and a UserError as a value.

    Tensors are put into shared memory here: where that fails later, the batch is lost in a thread of the worker.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list) -> tuple | UserError | _ThroughPipe:
        try:
            batch = self.dataset.__getitems__(keys)
        except UserError as error:
            return UserError(str(error))
        if get_worker_info() is not None:
            try:
                for each in batch:
                    if isinstance(each, Tensor):
                        each.share_memory_()
            except RuntimeError:  # what torch makes of a full /dev/shm
                return _ThroughPipe(batch)
        return batch


def _uncollated(batch: Any) -> Any:
    return batch  # the dataset has made a batch of it already
