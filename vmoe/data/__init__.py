"""Images in: data sets, subsets, augmentation, batches."""

from vmoe.data.config import AugmentConfig, DataConfig, MixConfig, SubsetConfig
from vmoe.data.datamodule import ImageDataModule
from vmoe.data.images import eval_crop, eval_transform, load_image, normalise
from vmoe.data.loading import Batch
from vmoe.data.samplers import EpochBatchSampler

__all__ = [
    "AugmentConfig",
    "Batch",
    "DataConfig",
    "EpochBatchSampler",
    "ImageDataModule",
    "MixConfig",
    "SubsetConfig",
    "eval_crop",
    "eval_transform",
    "load_image",
    "normalise",
]
