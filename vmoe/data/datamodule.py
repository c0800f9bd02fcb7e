"""The LightningDataModule of a DataConfig, the entry point of the data room."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from os import PathLike
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer

from vmoe.data.augment import Augmenter
from vmoe.data.batch_augment import BatchAugmenter
from vmoe.data.channels import displayed, mean_and_std
from vmoe.data.checking import damaged_images
from vmoe.data.config import DEFAULTS, Colour, DataConfig, data_config
from vmoe.data.datasets import download, load_splits
from vmoe.data.images import eval_crop
from vmoe.data.imageset import ImageSet, Splits
from vmoe.data.loading import (
    Batch,
    CorruptedImages,
    EvalImages,
    ImageLoader,
    TrainImages,
    UnvariedTrainImages,
    read_or_next,
)
from vmoe.data.mixing import make_mixer
from vmoe.data.resident import (
    MadeImages,
    ResidentEvalLoader,
    ResidentImages,
    ResidentTrainLoader,
    check_room,
    is_made,
    make_resident,
)
from vmoe.data.samplers import Balanced, Blocks, EpochBatchSampler
from vmoe.data.shards import ShardedImages
from vmoe.data.sharing import FilledLoader, OrderedLoader, part_of_batches
from vmoe.errors import UserError
from vmoe.sizes import ImageSize, size_text
from vmoe.text import counted

_MEASURED = 64  # training images, for the mean and the standard deviation of their channels
EvalLoader = ImageLoader | ResidentEvalLoader | FilledLoader
_AFTER_SETUP = {
    *("num_classes", "class_names", "patch_names", "notes", "image_size", "bit_depth", "mean", "std", "is_endless"),
    *("has_validation", "train_sampler", "multi_label"),
}


class ImageDataModule(LightningDataModule):
    """Training, validation and test batches of a data set.

    It works with any `lightning.Trainer`, with one rank or several. Lightning does not replace its samplers.

        data = vmoe.ImageDataModule("photos/", batch_size=128)
        model = vmoe.create_model("vit_tiny_patch16_224", vmoe.MoeConfig(), num_classes=data.num_classes)

    Order and augmentation in training are functions of (seed, epoch, index) alone. The number of workers, a resume and
    other random draws do not change them. Validation and test keep the set's order. All loaders yield `Batch`. Batches
    are mixed in `on_after_batch_transfer`: a Trainer calls it, and a custom loop must call it.

    Args:
        data: A folder of class folders or of tar shards, an .npz file, the name of a set such as "cifar10", or a
            `DataConfig`.
        seed: Seed of order, augmentation and mixing, from 0 to 2**32 - 1. Splits and subsets use `config.split_seed`.
        device: The training device, on which the pipeline "device" keeps images and images are mixed. None takes the
            Trainer's, else the CPU.
        part: This rank: it gets a contiguous part of every training batch, and every `parts`-th batch of validation and
            test. None takes the Trainer's rank.
        parts: Number of ranks that share the data. `batch_size` is for all of them together. None takes the Trainer's
            world size.
        **options: Fields of `DataConfig` to set, such as `batch_size`, `image_size`, `workers` and `val_fraction`.
        in_step: With the pipeline "device", training batches hold only keys, and `made` makes their images. A step that
            is captured as a CUDA graph can then include this.

    Raises:
        UserError: There is no such folder, file or set, or a value is not allowed.

    Attributes (their first use calls `setup`, as that of a loader does):
        config: The `DataConfig`.
        num_classes: Number of classes.
        multi_label: Whether an image may have several classes, or none. Then labels are (B, classes) int8 of 0 and 1.
        class_names: Names of the classes, in the order of the labels.
        patch_names: Names of the patch labels, or None.
        notes: Lines on the set to print, such as on ignored files.
        image_size: Side of the images in pixels, or (height, width).
        bit_depth: Bit depth of files with more than 8 bits per channel, given or measured; None without such files.
        channels: Number of channels of the images, if the config gives it; None for RGB of 8 bits.
        mean: Mean of the channels in [0, 1].
        std: Standard deviation of the channels.
        is_endless: Whether every pass over the training set has new images.
        has_validation: Whether there are validation images. Without them the loaders of "val" raise `UserError`.
        train_sampler: The `EpochBatchSampler` of every training loader.
    """

    def __init__(
        self,
        data: DataConfig | str | PathLike[str],
        seed: int = 0,
        device: torch.device | str | None = None,
        part: int | None = None,
        parts: int | None = None,
        in_step: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if not 0 <= seed < 2**32:
            raise UserError(f"seed={seed}: must be from 0 to {2**32 - 1}")
        self.config = data_config(data, **options)
        self.seed = seed
        self.device = torch.device(device or "cpu")
        self.part, self.parts = part or 0, parts or 1
        self.in_step = in_step
        self._finds_device, self._finds_ranks = device is None, parts is None
        self._made_for: tuple[torch.device, int, int] | None = None
        self._loaded: Splits | None = None
        self._resident: dict[str, ResidentImages] = {}

    @property
    def channels(self) -> int | None:
        """The number of channels of the images; None for RGB of 8 bits."""
        return self.config.channels

    @property
    def batch_size(self) -> int:
        """Images per training batch of all ranks. Lightning's `Tuner.scale_batch_size` sets it."""
        return self.config.batch_size

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        self.config = replace(self.config, batch_size=size)
        if self._made_for is not None:
            self._make()

    def prepare_data(self) -> None:
        """Downloads the set if needed. Lightning calls it in one process only."""
        if self._loaded is None:
            download(self.config)

    def setup(self, stage: str | None = None) -> None:
        """Loads all splits, once, at any stage. With "test" and "validate" there may be no training images.

        Raises:
            UserError: Data are missing or malformed, the subset cannot be made, or the set does not fit on the device.
        """
        if self._loaded is None:
            self._load(stage)
        if self.trainer is not None:
            self._ask(self.trainer)
        if self._made_for != (self.device, self.part, self.parts):
            self._make()
            self._made_for = self.device, self.part, self.parts

    @property
    def _splits(self) -> Splits:
        if self._loaded is None:
            self._load_at_first_use()
        return self._loaded

    def _load_at_first_use(self) -> None:
        self.prepare_data()
        self.setup("fit")

    def __getattr__(self, name: str) -> Any:
        if name not in _AFTER_SETUP or self.__dict__.get("_loaded", self) is not None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        self._load_at_first_use()
        return getattr(self, name)

    def _ask(self, trainer: Trainer) -> None:
        """Takes device and ranks from a Trainer, if they were not given.

        Raises:
            UserError: Its ranks cannot share a batch.
        """
        if self._finds_device:
            self.device = trainer.strategy.root_device
        if self._finds_ranks:
            self.part, self.parts = trainer.global_rank, trainer.world_size
            if self.config.batch_size % self.parts:
                raise UserError(
                    f"batch_size={self.config.batch_size}: must be a multiple of {self.parts}, the number of ranks, "
                    "which share each batch"
                )

    def _load(self, stage: str | None) -> None:
        """Opens the set and reads its properties."""
        config, defaults = self.config, DEFAULTS[self.config.name]
        self._loaded = load_splits(config, for_training=stage not in ("test", "validate"))
        self.has_validation = self._splits.val is not None
        self.is_endless = self._splits.train.pass_step > 0
        self.class_names = self._splits.class_names
        self.num_classes = len(self.class_names)
        self.multi_label: bool = self._splits.train.is_multi_label
        self.patch_names = self._splits.patch_names
        self.notes = list(self._splits.notes)
        self.image_size: ImageSize = config.image_size or defaults.image_size or self._splits.image_size
        self.bit_depth = self._splits.bit_depth
        mean, std = (defaults.mean, defaults.std) if config.channels is None else self._measured_colours()
        self.mean: Colour = tuple(config.mean or mean)
        self.std: Colour = tuple(config.std or std)

    def _measured_colours(self) -> tuple[Colour, Colour]:
        """Mean and standard deviation of the channels of a sample of training images, with a note on them."""
        config, train = self.config, self._splits.train
        if config.mean and config.std:
            return config.mean, config.std
        if not len(train):
            raise UserError("data.mean: must be given with data.channels where there are no training images to measure")
        sample = np.random.default_rng(config.split_seed).permutation(len(train))[:_MEASURED].tolist()
        pictures = (read_or_next(train, index, [])[0] for index in sample)
        mean, std = mean_and_std(eval_crop(picture, self.image_size, config.crop) for picture in pictures)
        values = " ".join(
            f"--data.{name} '[{','.join(f'{each:.4g}' for each in found)}]'"
            for name, found in (("mean", mean), ("std", std))
        )
        self.notes.append(f"{config.root}: measured on {counted(len(sample), 'training image')}: {values}")
        return tuple(mean), tuple(std)

    def _make(self) -> None:
        """Makes the parts that depend on the device and the rank: the order of batches, and the loaders' sources.

        Raises:
            UserError: The set does not fit on the device.
        """
        config, defaults = self.config, DEFAULTS[self.config.name]
        self._resident.clear()
        self.__dict__.pop("_device_loader", None)
        train, groups = self._splits.train, None
        if isinstance(train.images, ShardedImages):
            groups = Blocks(train.images.shards[train.positions], config.shards_at_once)
        elif config.sampler == "class_balanced":
            groups = Balanced(train.labels)
        self.train_sampler = EpochBatchSampler(
            len(train),
            config.batch_size,
            self.seed,
            repeat=config.repeat,
            part=self.part,
            parts=self.parts,
            groups=groups,
            epoch_images=self._splits.epoch_images,
        )
        self._mixer = make_mixer(config.mix, self.num_classes, self.seed, self.device)
        if config.pipeline == "workers":
            self._augmenter = Augmenter(
                config.augment,
                self.image_size,
                self.mean,
                defaults.flip,
                self.seed,
                config.crop,
                config.channels,
            )
            if config.augment.albumentations is not None and len(train):  # finds mistakes at once
                self._augmenter(read_or_next(train, 0, [])[0], 0, 0)
            return
        self._batch_augmenter = BatchAugmenter(
            config.augment, self.image_size, self.mean, self.std, defaults.flip, self.seed, self.device
        )
        self._sides = {"train": self._batch_augmenter.storage_size(self._splits.train.images.side)}
        self._sides |= {"test": self.image_size}
        if self.has_validation and self._splits.val is not self._splits.test:
            self._sides |= {"val": self.image_size}
        kept = [split for split in self._sides if split != "train" or not is_made(train)]
        check_room([(self._images(split), self._sides[split]) for split in kept], self.device, self.parts)

    @cached_property
    def fingerprint(self) -> str:
        """A text that changes with the training images and their labels, after `setup`."""
        return self._splits.train.fingerprint()

    def images_of_classes(self, split: str) -> list[int]:
        """The number of images of each class in "train", "val" or "test", after `setup`."""
        return self._images(split).class_counts(self.num_classes).tolist()

    def number_of_images(self, split: str) -> int:
        """The number of images in "train", "val" or "test", after `setup`."""
        return len(self._images(split))

    def training_pictures(self, label: int, most: int) -> list[np.ndarray]:
        """Training images of a class as the first epoch varies them, by the pipeline "workers", to be looked at.

        Args:
            label: The class.
            most: The largest number of images, chosen at random by the seed alone.

        Returns:
            (height, width, 3) uint8 each.
        """
        train = self._splits.train
        chosen = np.random.default_rng([self.seed, label]).permutation(np.flatnonzero(_has_class(train, label)))[:most]
        varied = (self._augmenter(read_or_next(train, index, [])[0], 0, index) for index in chosen.tolist())
        return [displayed(picture) for picture in varied]

    def image_sets(self) -> dict[str, ImageSet]:
        """The images of "train", "val" and "test", after `setup`. "val" is missing if it is not the set's own."""
        sets = {"train": self._splits.train, "val": self._splits.val, "test": self._splits.test}
        if sets["val"] is sets["test"]:
            del sets["val"]
        return {name: images for name, images in sets.items() if images is not None}

    @property
    def files(self) -> int:
        """The number of images of all splits that are read one by one and not held in memory."""
        return sum(len(images) for images in self._splits_of_files().values())

    def damaged_files(self, threads: int) -> dict[str, list[str]]:
        """Opens every image that is read one by one. Returns for each split a line on each unreadable image.

        Each rank opens a part of them.
        """
        splits = self._splits_of_files().items()
        return {name: damaged_images(images, threads, self.part, self.parts) for name, images in splits}

    def _splits_of_files(self) -> dict[str, ImageSet]:
        return {name: images for name, images in self.image_sets().items() if images.images.side is None}

    def train_dataloader(self) -> ImageLoader | ResidentTrainLoader | OrderedLoader:
        """Shuffled, augmented batches, without an incomplete last one."""
        if self.config.pipeline == "device":
            return self._device_loader
        dataset = TrainImages(self._splits.train, self._augmenter, self.mean, self.std)
        loader = ImageLoader(dataset, num_workers=self.config.workers, batch_sampler=self.train_sampler)
        return OrderedLoader(loader) if self._finds_ranks and self.parts > 1 else loader

    @cached_property
    def _device_loader(self) -> ResidentTrainLoader:
        train = self._splits.train
        images = MadeImages(train, self.device) if is_made(train) else self._on_device("train")
        return ResidentTrainLoader(images, self._batch_augmenter, self.train_sampler, self.in_step)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Mixes a training batch on the device, if the config has mixing."""
        return batch if batch.images is None else self._mixed(batch)

    @torch.no_grad()
    def made(self, batch: Batch) -> Batch:
        """A mixed training batch with its images. If `in_step` left them out, it makes them on the device."""
        if batch.images is not None:
            return batch
        return self._mixed(batch._replace(images=self._device_loader.images_of(batch.keys)))

    def _mixed(self, batch: Batch) -> Batch:
        if self._mixer is None or batch.keys is None:
            return batch
        images, targets = self._mixer(batch.images, batch.labels, batch.keys, self._mixed_passes())
        return batch._replace(images=images, targets=targets)

    def val_dataloader(self) -> EvalLoader | list[Batch]:
        """The validation split in order, for choosing a checkpoint. Without images a Trainer gets no batches."""
        return [] if self.trainer is not None and not self.has_validation else self._eval_loader("val")

    def test_dataloader(self) -> EvalLoader:
        """The test split in order. Never use it to choose a checkpoint."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> OrderedLoader:
        """The test split in order."""
        return OrderedLoader(self._eval_loader("test"))

    def train_eval_dataloader(self, most: int | None = 10_000) -> EvalLoader:
        """Training images prepared as in evaluation: at most `most`, drawn by `config.split_seed`; None for all."""
        train = self._splits.train
        if not len(train):
            raise UserError(f"data.root={self.config.root}: there are no training images, which this needs")
        dataset = UnvariedTrainImages(train, self.image_size, self.mean, self.std, self.config.crop)
        sample = np.sort(np.random.default_rng(self.config.split_seed).permutation(len(dataset))[:most])
        if self.config.pipeline == "device" and is_made(train):  # making them one at a time would take long
            resident = self._made_resident(train.take(sample), "train")
            return self._in_parts(list(range(len(sample))), lambda own: self._resident_loader(resident, own))
        return self._in_parts(sample.tolist(), lambda order: self._image_loader(dataset, order))

    def corrupted_dataloader(self, split: str, name: str, severity: int) -> EvalLoader:
        """The "val" or "test" split in order, corrupted (see `vmoe.data.corruptions`), by `config.split_seed` alone."""
        if self.config.channels is not None:
            raise UserError(
                f"corruptions: change the colours of RGB, and these images are read by data.channels="
                f"{self.config.channels}; leave them out"
            )
        if not isinstance(self.image_size, int):
            raise UserError(
                f"corruptions: are made for square images, and these are {size_text(self.image_size)}; measure a model "
                "of square images"
            )
        images, how = self._images(split), (name, severity, self.config.split_seed, self.config.crop)
        dataset = CorruptedImages(images, self.image_size, self.mean, self.std, *how)
        return self._in_parts(list(range(len(images))), lambda order: self._image_loader(dataset, order))

    def random_dataloader(self, split: str, seed: int) -> EvalLoader:
        """The "val" or "test" split prepared as in evaluation, in a random order by `seed` alone."""
        order = np.random.default_rng(seed).permutation(len(self._images(split)))
        return self._eval_loader(split, order.tolist())

    def _eval_loader(self, split: str, order: list[int] | None = None) -> EvalLoader:
        images = self._images(split)
        order = list(range(len(images))) if order is None else order
        if self.config.pipeline == "device":
            resident = self._on_device(split)
            return self._in_parts(order, lambda own: self._resident_loader(resident, own))
        dataset = EvalImages(images, self.image_size, self.mean, self.std, self.config.crop)
        return self._in_parts(order, lambda own: self._image_loader(dataset, own))

    def _resident_loader(self, images: ResidentImages, order: list[int]) -> ResidentEvalLoader:
        return ResidentEvalLoader(images, self._eval_batch_size, self.mean, self.std, order)

    def _image_loader(self, dataset: EvalImages, order: list[int]) -> ImageLoader:
        return ImageLoader(dataset, num_workers=self.config.workers, batch_size=self._eval_batch_size, sampler=order)

    def _in_parts(self, order: list[int], loader_of: Callable[[list[int]], EvalLoader]) -> EvalLoader:
        """This rank's part of the batches of images in that order."""
        if self.parts == 1:
            return loader_of(order)
        own, counted = part_of_batches(order, self._eval_batch_size, self.part, self.parts)
        return FilledLoader(loader_of(own), counted)

    @property
    def _eval_batch_size(self) -> int:
        return self.config.eval_batch_size or self.config.batch_size

    def _on_device(self, split: str) -> ResidentImages:
        """A split on the device. It is read at its first use, and only once if validation and test are the same."""
        if self._images(split) is self._splits.test:
            split = "test"
        if split not in self._resident:
            self._resident[split] = self._made_resident(self._images(split), split)
        return self._resident[split]

    def _made_resident(self, images: ImageSet, split: str) -> ResidentImages:
        where = (self._sides[split], self.device, self.config.workers, self.config.crop)
        return make_resident(images, *where, replace_damaged=split == "train")

    def _images(self, split: str) -> ImageSet:
        images = getattr(self._splits, split)
        if images is None:
            raise UserError("data.val_fraction=0: there are no images for validation; take the test split")
        return images

    def _mixed_passes(self) -> float:
        """The number of first passes over the training set with mixing."""
        until = self.config.mix.until
        if until == 1:
            return float("inf")
        if self.trainer is None or not self.trainer.max_epochs or self.trainer.max_epochs < 0:
            raise UserError(f"data.mix.until={until}: needs a trainer that knows its number of epochs; leave it at 1")
        return until * self.trainer.max_epochs * (self.train_sampler.epoch_images / self.train_sampler.length)


def _has_class(images: ImageSet, label: int) -> np.ndarray:
    """(n,) bool."""
    return images.labels[:, label] > 0 if images.is_multi_label else images.labels == label
