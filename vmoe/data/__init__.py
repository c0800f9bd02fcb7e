"""Data sets, subsets, augmentation and batches of images."""

from typing import TYPE_CHECKING

from vmoe.imports import names_on_demand

if TYPE_CHECKING:
    from vmoe.data.config import AugmentConfig, DataConfig, FractalConfig, MixConfig, SubsetConfig
    from vmoe.data.datamodule import ImageDataModule
    from vmoe.data.images import eval_crop, eval_transform, load_image, normalise, prepare_image
    from vmoe.data.inspection import inspect_images
    from vmoe.data.loading import Batch
    from vmoe.data.samplers import EpochBatchSampler
else:  # a config can be read without torch, an image without Lightning and albumentations
    __getattr__ = names_on_demand(
        __name__,
        {
            "vmoe.data.config": ["AugmentConfig", "DataConfig", "FractalConfig", "MixConfig", "SubsetConfig"],
            "vmoe.data.datamodule": ["ImageDataModule"],
            "vmoe.data.images": ["eval_crop", "eval_transform", "load_image", "normalise", "prepare_image"],
            "vmoe.data.inspection": ["inspect_images"],
            "vmoe.data.loading": ["Batch"],
            "vmoe.data.samplers": ["EpochBatchSampler"],
        },
    )

__all__ = [
    "AugmentConfig",
    "Batch",
    "DataConfig",
    "EpochBatchSampler",
    "FractalConfig",
    "ImageDataModule",
    "MixConfig",
    "SubsetConfig",
    "eval_crop",
    "eval_transform",
    "inspect_images",
    "load_image",
    "normalise",
    "prepare_image",
]
