"""Images in: data sets, subsets, augmentation, batches."""

from typing import TYPE_CHECKING, Any

from vmoe.data.config import AugmentConfig, DataConfig, MixConfig, SubsetConfig
from vmoe.data.images import eval_crop, eval_transform, load_image, normalise
from vmoe.data.loading import Batch
from vmoe.data.samplers import EpochBatchSampler

if TYPE_CHECKING:
    from vmoe.data.datamodule import ImageDataModule
else:  # hidden from type checkers, which would take any name for one of this module's

    def __getattr__(name: str) -> Any:
        """ImageDataModule when it is asked for: it brings Lightning, seconds of import that no prediction needs."""
        if name != "ImageDataModule":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from vmoe.data.datamodule import ImageDataModule

        return ImageDataModule


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
