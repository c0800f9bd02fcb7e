"""Makes batches from splits: the datasets that worker processes run, and the loader around them."""

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
    """Images ready for the model, on the CPU or on the training device."""

    images: torch.Tensor | None  # (B, C, H, W) float32, normalised; None until `ImageDataModule.made`
    labels: torch.Tensor | None  # (B,) int64, or (B, classes) int8 of 0 and 1; None without labels
    damaged: list[str]  # unreadable training images, which the next ones have replaced
    patch_labels: torch.Tensor | None = None  # (B, rows, columns) int64, labels of patches, if known
    keys: torch.Tensor | None = None  # (B, 2) int64, epoch and index of training images; None in evaluation
    targets: torch.Tensor | None = None  # (B, classes) float32 of mixed images; None to use `labels`

    @classmethod
    def of(cls, batch: Any, multi_label: bool = False) -> "Batch":
        """Converts a batch of any loader.

        Args:
            batch: A `Batch`, or (images (B, 3, H, W), labels): labels (B,) int64, or (B, C) shares of the classes.
            multi_label: Whether labels (B, C) are 0 or 1 per class instead of shares.

        Raises:
            UserError: `batch` is something else.
        """
        if isinstance(batch, Batch):
            return batch
        is_pair = isinstance(batch, list | tuple) and len(batch) >= 2
        if not (is_pair and all(isinstance(each, torch.Tensor) for each in batch[:2])):
            raise UserError(f"a batch of type {type(batch).__name__}: must be (images, labels), two tensors")
        images, labels = batch[:2]
        if multi_label and labels.dim() != 2:
            shape = tuple(labels.shape)
            raise UserError(f"a batch of labels of shape {shape}: with multi_label they must be (B, C) of 0 and 1")
        if labels.dim() == 2 and not multi_label:
            return cls(images, labels.argmax(1), [], targets=labels)
        return cls(images, labels, [])


class TrainImages(Dataset):
    """Augmented training images. A batch is a function of its (epoch, index) keys.

    Args:
        images: The training split.
        augmenter: Augments an image by its key.
        mean: Mean of the channels.
        std: Standard deviation of the channels.
    """

    def __init__(self, images: ImageSet, augmenter: Augmenter, mean: Colour, std: Colour) -> None:
        self.images, self.augmenter, self.mean, self.std = images, augmenter, mean, std

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[Key]) -> Batch:
        """The batch of these keys. The next readable image of the set replaces a damaged one."""
        pictures, labels, damaged = [], [], []
        for epoch, index in keys:
            image, index = read_or_next(self.images, index, damaged, epoch)
            pictures.append(self.augmenter(image, epoch, index))
            labels.append(self.images.labels[index])
        images = normalise(pictures, self.mean, self.std)
        return Batch(images, torch.from_numpy(np.array(labels)), damaged, keys=torch.from_numpy(np.array(keys)))


def read_or_next(images: ImageSet, index: int, damaged: list[str], number_of_pass: int = 0) -> tuple[np.ndarray, int]:
    """Image `index`, (H, W, 3) uint8 or (H, W, C) float32, or the next readable one, and its index.

    Args:
        images: The training split.
        index: Index of the image.
        damaged: Receives the paths of unreadable images.
        number_of_pass: Number of the pass over the training set.

    Raises:
        UserError: No image can be read, or the network fails.
    """
    for step in range(len(images)):
        candidate = (index + step) % len(images)
        try:
            return images.read(candidate, number_of_pass), candidate
        except UnreachableError:  # all other images would be unreachable too
            raise
        except UserError:
            damaged.append(images.place(candidate))
    raise UserError(f"{images.place(index)}: neither this nor any other training image can be read")


class EvalImages(Dataset):
    """Images prepared as in evaluation. A damaged one raises an error with its name.

    Args:
        images: A validation or test split.
        image_size: Side in pixels, or (height, width).
        mean: Mean of the channels.
        std: Standard deviation of the channels.
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
    """Corrupted images, prepared as in evaluation. The draws are a function of (seed, name, severity, index).

    Args:
        images: A validation or test split.
        image_size: Side in pixels.
        mean: Mean of the channels.
        std: Standard deviation of the channels.
        name: A key of `vmoe.data.corruptions.CORRUPTIONS`.
        severity: 1 to 5.
        seed: Seed of the corruption.
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
    """The patch labels of some images, (B, rows, columns) int64, or None."""
    patches = [images.patch_labels(index) for index in indices]
    return None if any(part is None for part in patches) else torch.from_numpy(np.stack(patches))


class UnvariedTrainImages(EvalImages):
    """Training images prepared as in evaluation. The next readable image replaces a damaged one, as in training."""

    def __getitems__(self, indices: list[int]) -> Batch:
        """The batch of these images."""
        pictures, labels, damaged = [], [], []
        for index in indices:
            image, index = read_or_next(self.images, index, damaged)
            pictures.append(eval_crop(image, self.image_size, self.crop))
            labels.append(self.images.labels[index])
        return Batch(normalise(pictures, self.mean, self.std), torch.from_numpy(np.array(labels)), damaged)


class UnlabelledImages(Dataset):
    """Image files prepared as in evaluation, without labels. A damaged one raises an error with its name.

    Args:
        paths: The paths of the files.
        image_size: Side in pixels, or (height, width).
        mean: Mean of the channels.
        std: Standard deviation of the channels.
        bit_depth: Bit depth of files with more than 8 bits per channel, as in `load_image`.
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
        """The batch of these images, without labels."""
        pictures = [
            eval_crop(load_image(self.paths[index], self.bit_depth, self.channels), self.image_size, self.crop)
            for index in indices
        ]
        return Batch(normalise(pictures, self.mean, self.std), None, [])


class ImageLoader(DataLoader):
    """A DataLoader of whole batches that raises a worker's UserError unchanged.

    PyTorch would put the worker's traceback into the message. Iteration starts with the first requested batch, when the
    sampler knows its epoch, and not with `iter()`. It draws nothing from the global random state. If shared memory is
    full, as a container's 64 MiB soon are, batches come through a pipe, with a warning; PyTorch would wait forever.

    Args:
        dataset: A dataset with batches from `__getitems__`.
        num_workers: Number of processes.
        **options: Options of DataLoader. Lightning makes a loader again from another one's, to set its sampler.
    """

    def __init__(self, dataset: Dataset, *, num_workers: int = 0, **options: Any) -> None:
        ours = {
            "persistent_workers": num_workers > 0,
            "collate_fn": _uncollated,
            "pin_memory": torch.cuda.is_available(),
            "generator": torch.Generator(),
        }
        dataset = dataset if isinstance(dataset, _ErrorsAsValues) else _ErrorsAsValues(dataset)
        super().__init__(dataset, num_workers=num_workers, **ours | options)

    def __iter__(self) -> Iterator[Batch]:
        if self.num_workers:
            # a forked worker would wait forever for OpenCV's threads, which exist only in this process
            cv2.setNumThreads(0)
        is_warned = False
        for batch in super().__iter__():
            if isinstance(batch, _ThroughPipe):
                if not is_warned:
                    # level 1, since warnings of the caller, Lightning, are hidden
                    warnings.warn(_SMALL_SHARED_MEMORY, stacklevel=1)
                    is_warned = True
                batch = batch.taken(self.pin_memory)
            if isinstance(batch, UserError):
                try:
                    raise batch
                finally:
                    del batch  # else error and frame hold each other in a cycle, and the workers live on
            yield batch


class _ThroughPipe:
    """A worker's batch with arrays instead of tensors, which need no shared memory.

    Args:
        batch: A tuple with some tensors.
    """

    def __init__(self, batch: tuple) -> None:
        self._type, self._items = type(batch), [each.numpy() if isinstance(each, Tensor) else each for each in batch]

    def taken(self, pinned: bool) -> tuple:
        """The batch, in pinned memory if `pinned`."""
        items = [torch.from_numpy(each) if isinstance(each, np.ndarray) else each for each in self._items]
        items = [each.pin_memory() if pinned and isinstance(each, Tensor) else each for each in items]
        return self._type(*items) if issubclass(self._type, Batch) else self._type(items)


class _ErrorsAsValues(Dataset):
    """The dataset in a worker: returns batches, or a UserError as a value, for `ImageLoader` in the main process.

    It puts tensors into shared memory itself. If that failed later, the batch would be lost in a thread of the worker.
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
            except RuntimeError:  # torch raises it for a full /dev/shm
                return _ThroughPipe(batch)
        return batch


def _uncollated(batch: Any) -> Any:
    return batch  # the dataset has already made a batch
