"""torchvision's own pipeline from a folder of images to batches, for comparison with ours."""

from pathlib import Path

import torch
from torch.utils.data import ConcatDataset, DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from vmoe.data import DataConfig, ImageDataModule
from vmoe.data.config import DEFAULTS
from vmoe.data.folders import find_split_folders
from vmoe.data.presets import AugmentSteps, resolve
from vmoe.errors import UserError

_NOT_DONE = "--torchvision: crops by scale and flips, and data.augment does otherwise; give --data.augment.preset light"


def torchvision_plan(config: DataConfig) -> AugmentSteps:
    """The crops and flips of a config, for torchvision's loader.

    Raises:
        UserError: The set is no folder, or there are other steps than a crop by scale and a flip.
    """
    if config.name != "folder":
        raise UserError(f"--torchvision: data.name is {config.name}; it reads a folder of images, --data.name folder")
    defaults = DEFAULTS[config.name]
    if config.augment.albumentations is not None:
        raise UserError(_NOT_DONE)
    if config.channels is not None:
        raise UserError(f"--torchvision: reads RGB alone, and these images are read by data.channels={config.channels}")
    plan = resolve(config.augment, config.image_size or defaults.image_size, defaults.flip)
    if plan.crop_scale is None or plan.randaugment_ops or plan.color_jitter or plan.erasing or plan.policy:
        raise UserError(_NOT_DONE)
    return plan


def torchvision_loader(module: ImageDataModule, workers: int) -> DataLoader:
    """A DataLoader of torchvision's ImageFolder and transforms, with the crops and flips of the module's config.

    Args:
        module: A datamodule after `setup`, of a folder of images (`data.name` folder) with the preset light.
        workers: Number of loading processes.

    Returns:
        Shuffled batches of all images in the folder's `train` (without splits: of all images). As with ours an epoch
        repeats them `config.repeat` times. Images are (B, 3, H, W) float32, normalised; labels (B,).

    Raises:
        UserError: As `torchvision_plan`.
    """
    config, plan = module.config, torchvision_plan(module.config)
    transform = v2.Compose([
        v2.RandomResizedCrop(module.image_size, plan.crop_scale),
        v2.RandomHorizontalFlip(plan.flip),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(module.mean, module.std),
    ])  # fmt: skip
    root = Path(config.root)
    images = ImageFolder(find_split_folders(root).get("train", root), transform)
    return DataLoader(
        ConcatDataset([images] * config.repeat), config.batch_size, shuffle=True, num_workers=workers,
        pin_memory=torch.cuda.is_available(), drop_last=True, persistent_workers=workers > 0,
    )  # fmt: skip
