"""The data room's front door: a LightningDataModule made from a DataConfig."""

import numpy as np
from lightning.pytorch import LightningDataModule

from vmoe.data.augment import Augmenter
from vmoe.data.config import DEFAULTS, Colour, DataConfig
from vmoe.data.datasets import download, load_splits
from vmoe.data.loading import EvalImages, ImageLoader, TrainImages
from vmoe.data.samplers import EpochBatchSampler
from vmoe.errors import UserError


class ImageDataModule(LightningDataModule):
    """Training, validation and test batches of a data set.

    Training's order and augmentation are functions of (seed, epoch, index) alone: neither the number of workers nor a
    resume nor other random draws change them. Validation and test keep the set's order. All loaders yield `Batch`.

    Args:
        config: which data, how split, resized, varied and batched.
        seed: of order and augmentation, from 0 to 2**32 - 1; splits and subsets have `config.split_seed`.

    Attributes (after `setup`):
        num_classes: number of classes.
        class_names: their names, in the order of the labels.
        patch_names: names of what patches show, where that is known; else None.
        image_size: side of the images in pixels.
        mean: of the channels in [0, 1], as used.
        std: of the channels, as used.
        train_sampler: the `EpochBatchSampler` of the latest training loader (after `train_dataloader`).
    """

    def __init__(self, config: DataConfig, seed: int) -> None:
        super().__init__()
        if not 0 <= seed < 2**32:
            raise UserError(f"seed={seed}: must be from 0 to {2**32 - 1}")
        self.config = config
        self.seed = seed
        self._splits = None

    def prepare_data(self) -> None:
        """Downloads the set where that is needed; Lightning calls it in one process only."""
        download(self.config)

    def setup(self, stage: str | None = None) -> None:
        """Loads all splits, once, whatever the stage.

        Raises:
            UserError: data are missing or malformed, or the subset cannot be made; the line says what to do.
        """
        if self._splits is not None:
            return
        config, defaults = self.config, DEFAULTS[self.config.name]
        self._splits = load_splits(config)
        self.class_names = self._splits.class_names
        self.num_classes = len(self.class_names)
        self.patch_names = self._splits.patch_names
        self.image_size: int = config.image_size or defaults.image_size or self._splits.image_size
        self.mean: Colour = tuple(config.mean or defaults.mean)
        self.std: Colour = tuple(config.std or defaults.std)
        self._augmenter = Augmenter(config.augment, self.image_size, self.mean, defaults.flip, self.seed)

    def train_dataloader(self) -> ImageLoader:
        """Shuffled, augmented batches; an incomplete last one is left out."""
        dataset = TrainImages(self._splits.train, self._augmenter, self.mean, self.std)
        self.train_sampler = EpochBatchSampler(len(dataset), self.config.batch_size, self.seed)
        return ImageLoader(dataset, workers=self.config.workers, batch_sampler=self.train_sampler)

    def val_dataloader(self) -> ImageLoader:
        """The validation split in order: for choosing a checkpoint."""
        return self._eval_loader("val")

    def test_dataloader(self) -> ImageLoader:
        """The test split in order: never for choosing."""
        return self._eval_loader("test")

    def random_dataloader(self, split: str, seed: int) -> ImageLoader:
        """The "val" or "test" split as evaluation sees it, in a random order that is a function of `seed` alone."""
        order = np.random.default_rng(seed).permutation(len(getattr(self._splits, split)))
        return self._eval_loader(split, sampler=order.tolist())

    def _eval_loader(self, split: str, sampler: list[int] | None = None) -> ImageLoader:
        dataset = EvalImages(getattr(self._splits, split), self.image_size, self.mean, self.std)
        size = self.config.eval_batch_size or self.config.batch_size
        return ImageLoader(dataset, workers=self.config.workers, batch_size=size, sampler=sampler)
