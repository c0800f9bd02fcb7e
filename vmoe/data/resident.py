"""The device pipeline: whole splits as bytes on the training device, or made there, and loaders of their batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vmoe.data.batch_augment import BatchAugmenter
from vmoe.data.config import Colour, Crop
from vmoe.data.fractals import FractalImages
from vmoe.data.images import eval_crop
from vmoe.data.imageset import ImageSet
from vmoe.data.loading import Batch, ImageLoader, patch_labels_of, read_or_next
from vmoe.data.samplers import EpochBatchSampler
from vmoe.errors import UserError
from vmoe.memory import host_memory

_READ_AT_ONCE = 64  # images
_SHARE = 0.5  # the largest share of the memory


@dataclass(frozen=True)
class ResidentImages:
    """A split on the device.

    Attributes:
        pixels: (n, 3, Q, Q) uint8.
        labels: (n,) int64.
        patch_labels: (n, rows, columns) patch labels, or None.
        damaged: The paths of unreadable images, by the index at which the next image replaces them.
    """

    pixels: Tensor
    labels: Tensor
    patch_labels: Tensor | None
    damaged: dict[int, list[str]]

    def stored(self, keys: Tensor) -> tuple[Tensor, Tensor | None]:
        """All stored images. Those of the keys are at the keys' indices."""
        return self.pixels, None


class MadeImages:
    """Training images that are made batch by batch, with the interface of `ResidentImages`.

    Args:
        images: The split of fractals.
        device: The device.

    Attributes:
        labels: (n,) int64.
        damaged: Empty, as in `ResidentImages`.
    """

    def __init__(self, images: ImageSet, device: torch.device) -> None:
        self.damaged: dict[int, list[str]] = {}
        self._make = images.images.on(device, fused=True)
        self._pass_step = images.pass_step
        self._positions = torch.from_numpy(images.positions).to(device)
        self.labels = torch.from_numpy(images.labels).to(device)

    def stored(self, keys: Tensor) -> tuple[Tensor, Tensor | None]:
        """The images of the keys (B, 2), (B, 3, Q, Q) uint8, and their positions there, (B,) int64."""
        passes, indices = keys.unbind(1)
        images = self._make(self._positions[indices] + passes * self._pass_step)
        return images, torch.arange(len(keys), device=keys.device)


def is_made(images: ImageSet) -> bool:
    """Whether images are generated and not read: they need no memory, and none is damaged."""
    return isinstance(images.images, FractalImages)


def check_room(parts: Sequence[tuple[ImageSet, int]], device: torch.device, sharers: int = 1) -> None:
    """Refuses splits that would take more than half of a GPU's free memory, or of a CPU's whole memory.

    Args:
        parts: Splits, each with the side at which it would be stored.
        device: The device.
        sharers: Number of processes that each hold the splits. They share the memory of a CPU, but have their own GPUs.

    Raises:
        UserError: They are too large. The message has both sizes.
    """
    needed = sum(3 * side**2 * len(images) for images, side in parts)
    room = int(_SHARE * _memory(device) / (1 if device.type == "cuda" else sharers))
    if needed > room:
        count = sum(len(images) for images, _ in parts)
        raise UserError(
            f"data.pipeline=device: {count:,} images take {needed / 2**30:,.1f} GiB on {device}, where "
            f"{room / 2**30:,.1f} GiB may be used; take data.pipeline=workers, a smaller data.image_size or data.subset"
        )


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return host_memory()


def make_resident(
    images: ImageSet,
    side: int,
    device: torch.device,
    workers: int,
    crop: Crop = "centre",
    *,
    replace_damaged: bool,
) -> ResidentImages:
    """Reads a whole split onto the device, each image as a square of `side` pixels.

    Args:
        images: The split.
        side: Q, the side of the stored images in pixels.
        device: The device.
        workers: Number of processes that read files. Images in memory need none.
        crop: How images become squares, as in `eval_crop`.
        replace_damaged: Whether the next image of the split replaces an unreadable one; else it is an error.

    Raises:
        UserError: An image cannot be read, or with `replace_damaged` none can.
    """
    if is_made(images):
        made, positions = images.images.on(device), torch.from_numpy(images.positions).to(device)
        return ResidentImages(made.in_turn(positions), torch.from_numpy(images.labels).to(device), None, {})
    pixels = torch.empty(len(images), 3, side, side, dtype=torch.uint8, device=device)
    sources: list[int] = []
    damaged: dict[int, list[str]] = {}
    reader = ImageLoader(
        _Squares(images, side, replace_damaged, crop),
        num_workers=workers if images.images.side is None else 0,
        batch_size=_READ_AT_ONCE,
    )
    for squares, of_squares, places in reader:
        for number, found in enumerate(places):
            if found:
                damaged[len(sources) + number] = found
        pixels[len(sources) : len(sources) + len(squares)] = squares.to(device)
        sources += of_squares
    patches = patch_labels_of(images, sources)
    return ResidentImages(
        pixels,
        torch.from_numpy(images.labels[sources]).to(device),
        None if patches is None else patches.to(device),
        damaged,
    )


class _Squares(Dataset):
    """Stored images: (b, 3, Q, Q) uint8, their indices, and the unreadable paths before each of them."""

    def __init__(self, images: ImageSet, side: int, replace_damaged: bool, crop: Crop) -> None:
        self.images, self.side, self.replace_damaged, self.crop = images, side, replace_damaged, crop

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, list[int], list[list[str]]]:
        squares, sources, places = [], [], []
        for index in indices:
            damaged: list[str] = []
            if self.replace_damaged:
                image, index = read_or_next(self.images, index, damaged)
            else:
                image = self.images.read(index)
            squares.append(torch.tensor(eval_crop(image, self.side, self.crop)).permute(2, 0, 1))
            sources.append(index)
            places.append(damaged)
        return torch.stack(squares), sources, places


class ResidentTrainLoader:
    """Shuffled, augmented batches, made on the device asynchronously.

    Args:
        images: The training split.
        augmenter: Augments and normalises a batch by its keys.
        batch_sampler: Yields the keys. Lightning sets its epoch.
        in_step: Whether batches come without images, which the training step makes by `images_of`.
    """

    def __init__(
        self,
        images: ResidentImages | MadeImages,
        augmenter: BatchAugmenter,
        batch_sampler: EpochBatchSampler,
        in_step: bool = False,
    ) -> None:
        self.images, self.augmenter, self.batch_sampler, self.in_step = images, augmenter, batch_sampler, in_step

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        known = self.images
        for keys in self.batch_sampler.arrays():
            asked = keys[:, 1].tolist() if known.damaged else []
            damaged = [place for index in asked for place in known.damaged.get(index, ())]
            on_host = torch.from_numpy(keys)
            if known.labels.is_cuda:
                on_host = on_host.pin_memory()  # otherwise the copy would synchronise with the device
            on_device = on_host.to(known.labels.device, non_blocking=True)
            images = None if self.in_step else self.images_of(on_device)
            yield Batch(images, known.labels[on_device[:, 1]], damaged, keys=on_device)

    def images_of(self, keys: Tensor) -> Tensor:
        """The augmented images of the keys (B, 2), (B, 3, S, S) float32."""
        stored, places = self.images.stored(keys)
        return self.augmenter(stored, keys, places)


class ResidentEvalLoader:
    """Batches prepared as in evaluation, normalised on the device.

    Args:
        images: A validation or test split, stored at the image size.
        batch_size: Images per batch; the last may have fewer.
        mean: Mean of the channels.
        std: Standard deviation of the channels.
        order: Indices of the images; None for the split's own order.
    """

    def __init__(
        self, images: ResidentImages, batch_size: int, mean: Colour, std: Colour, order: Sequence[int] | None = None
    ) -> None:
        self.images, self.batch_size = images, batch_size
        device = images.pixels.device
        self._mean = 255 * torch.tensor(mean, device=device).view(3, 1, 1)
        self._std = 255 * torch.tensor(std, device=device).view(3, 1, 1)
        self._order = torch.arange(len(images.labels)) if order is None else torch.tensor(order)
        self._order = self._order.to(device)

    def __len__(self) -> int:
        return -(-len(self._order) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        known = self.images
        for indices in self._order.split(self.batch_size):
            images = (known.pixels[indices].float() - self._mean) / self._std
            patches = None if known.patch_labels is None else known.patch_labels[indices]
            yield Batch(images, known.labels[indices], [], patches)
