"""Mixup and CutMix on the device, with a share per image.

torchvision's v2.MixUp and v2.CutMix compute the same. But they draw one share per batch from the global generator and
pair images across the batch, so results change with the number of ranks and after a resume. Here the share is a
function of (seed, epoch, index), and partners are in one group of consecutive images, which stays on one rank.

Shapes: B images, S pixels per side, C classes.
"""

import warnings

import numpy as np
import torch
from scipy.stats import beta
from torch import Tensor

from vmoe.data.config import MixConfig
from vmoe.data.draws import draw_numbers, uniforms
from vmoe.data.fusing import Fused

GROUP = 8  # number of consecutive images per group
_FIRST_DRAW, _DRAWS = 1000, 5  # different from augmentation's draws
_QUANTILES = 4096


def make_mixer(config: MixConfig, classes: int, seed: int, device: torch.device) -> "Mixer | None":
    """The mixer of a config, or None if both alphas are 0. It warns of settings without effect."""
    if not config.is_on and config != MixConfig():
        warnings.warn("data.mix has no effect: mixup_alpha and cutmix_alpha are both 0", stacklevel=2)
    elif config.is_on and not config.has_both and config.switch_prob != MixConfig.switch_prob:
        warnings.warn(
            f"data.mix.switch_prob={config.switch_prob} has no effect: only one of mixup and CutMix is on", stacklevel=2
        )
    return Mixer(config, classes, seed, device) if config.is_on else None


class Mixer:
    """Mixes a batch of images, and returns their targets.

    Args:
        config: Shares and probabilities. At least one alpha is above 0.
        classes: C.
        seed: The seed, not negative.
        device: The device of the images.
    """

    def __init__(self, config: MixConfig, classes: int, seed: int, device: torch.device) -> None:
        self.config, self.classes, self.seed = config, classes, seed
        self._mixup, self._cutmix = (_quantiles(alpha, device) for alpha in (config.mixup_alpha, config.cutmix_alpha))
        self._switch = (
            config.switch_prob if config.mixup_alpha and config.cutmix_alpha else float(config.mixup_alpha == 0)
        )
        self._numbers = draw_numbers(_DRAWS, _FIRST_DRAW, device)
        self._mix = Fused(self._by_keys)

    def __call__(self, images: Tensor, labels: Tensor, keys: Tensor, epochs: float) -> tuple[Tensor, Tensor]:
        """Mixes each image with the one before it in its group, and the first with the last.

        Args:
            images: (B, 3, S, S) float32.
            labels: (B,) int64, or (B, C) of 0 and 1.
            keys: (B, 2) int64, epoch and index of each image.
            epochs: From this epoch on nothing is mixed, and targets are one-hot labels.

        Returns:
            The images, and targets (B, C) float32, which sum to 1 where each image has one label.
        """
        return self._mix(images, labels, keys, torch.full((), epochs, device=images.device))

    def _by_keys(self, images: Tensor, labels: Tensor, keys: Tensor, epochs: Tensor) -> tuple[Tensor, Tensor]:
        whether, which, share, x, y = uniforms(self.seed, keys, self._numbers)
        is_cutmix = which < self._switch
        is_on = (whether < self.config.prob) & (keys[:, 0] < epochs)
        shares = torch.where(is_cutmix, _look_up(self._cutmix, share), _look_up(self._mixup, share))
        return mix(images, labels, torch.where(is_on, shares, 1.0), is_cutmix, torch.stack([x, y]), self.classes)


def mix(
    images: Tensor, labels: Tensor, shares: Tensor, is_cutmix: Tensor, centres: Tensor, classes: int
) -> tuple[Tensor, Tensor]:
    """Mixes each image with the one before it in its group, with given parameters.

    Args:
        images: (B, 3, S, S).
        labels: (B,) int64, or (B, C) of 0 and 1.
        shares: (B,), the share that an image keeps of itself, 0 to 1; more with CutMix if its rectangle is cut off.
        is_cutmix: (B,) bool, whether to use CutMix instead of mixup.
        centres: (2, B), x and y of the rectangle's centre in [0, 1).
        classes: C.

    Returns:
        The images and targets (B, C) float32.
    """
    partners = _partners(len(images), images.device)
    height, width = images.shape[2:]
    (left, right), (top, bottom) = (
        _span(centre, shares, size) for centre, size in zip(centres, (width, height), strict=True)
    )
    columns, rows = torch.arange(width, device=images.device), torch.arange(height, device=images.device)
    is_in_columns = (columns >= left[:, None]) & (columns < right[:, None])
    is_in_rows = (rows >= top[:, None]) & (rows < bottom[:, None])
    outside = (~(is_in_rows[:, :, None] & is_in_columns[:, None, :])).float()
    kept = torch.where(is_cutmix[:, None, None], outside, shares[:, None, None])[:, None]
    area = (right - left) * (bottom - top)
    shares = torch.where(is_cutmix, 1 - area / (width * height), shares)[:, None]
    if labels.dim() == 1:
        labels = labels[:, None] == torch.arange(classes, device=labels.device)
    one_hot = labels.float()
    return torch.lerp(images[partners], images, kept), torch.lerp(one_hot[partners], one_hot, shares)


def _partners(count: int, device: torch.device) -> Tensor:
    """The index of each image's partner. An incomplete last group is a smaller circle."""
    places = torch.arange(count, device=device)
    inside = places % GROUP
    sizes = (count - places + inside).clamp(max=GROUP)
    return places - inside + (inside + sizes - 1) % sizes


def _span(centre: Tensor, shares: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The first pixel of CutMix's rectangle and the first pixel after it along one side, (B,) each."""
    middle = (centre * size).floor()
    half = (0.5 * (1 - shares).sqrt() * size).floor()
    return (middle - half).clamp(min=0), (middle + half).clamp(max=size)


def _quantiles(alpha: float, device: torch.device) -> Tensor:
    """Quantiles of Beta(alpha, alpha) at equal steps, for draws without rejection."""
    steps = np.linspace(0, 1, _QUANTILES + 1)
    return torch.tensor(beta.ppf(steps, alpha, alpha) if alpha else steps * 0 + 1, dtype=torch.float32, device=device)


def _look_up(quantiles: Tensor, draw: Tensor) -> Tensor:
    place = draw * _QUANTILES
    below = place.long()
    return torch.lerp(quantiles[below], quantiles[below + 1], place - below)
