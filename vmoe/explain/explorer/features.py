"""Features of a patch's pixels: colour, brightness and edge strength, in a few bins each.

B images of H x W pixels; N = rows * columns positions of a layer's grid.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

COLOUR_NAMES = (
    *("dark grey", "grey", "light grey"),
    *("red", "orange", "lime", "green", "cyan", "blue", "violet", "magenta"),
)
LEVELS = 8  # number of bins of brightness and of edge strength
_CHROMA = 0.12  # below this difference between the largest and the smallest channel a patch counts as grey
_LUMA = (0.2126, 0.7152, 0.0722)  # ITU-R BT.709
_LONGEST_QUANTILE_INPUT = 1_000_000


class PatchFeatures(NamedTuple):
    """The features of each position of a grid."""

    colour: Tensor  # (B, N, 3) mean colour in [0, 1]
    brightness: Tensor  # (B, N) luma of the mean colour
    edges: Tensor  # (B, N) mean length of the gradient of the luma, per pixel


def patch_features(pixels: Tensor, grid: tuple[int, int]) -> PatchFeatures:
    """The features of every position of a grid over the images.

    Args:
        pixels: (B, 3, H, W) in [0, 1].
        grid: (rows, columns).
    """
    luma = (pixels * pixels.new_tensor(_LUMA)[:, None, None]).sum(1, keepdim=True)
    padded = F.pad(luma, (1, 1, 1, 1), mode="replicate")
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    right = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    slope = torch.hypot(down, right)
    colour = F.adaptive_avg_pool2d(pixels, grid).flatten(2).transpose(1, 2)
    return PatchFeatures(colour, colour @ pixels.new_tensor(_LUMA), F.adaptive_avg_pool2d(slope, grid).flatten(1))


def colour_bins(colour: Tensor) -> Tensor:
    """The index in `COLOUR_NAMES` of colours (..., 3) in [0, 1]: three greys by luma, or one of eight hues."""
    largest, smallest = colour.amax(-1), colour.amin(-1)
    chroma = largest - smallest
    grey = (colour @ colour.new_tensor(_LUMA) * 3).long().clamp(0, 2)
    red, green, blue = colour.unbind(-1)
    safe = chroma.clamp_min(1e-6)
    sixths = torch.where(
        largest == red,
        (green - blue) / safe,
        torch.where(largest == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    hue = (sixths * 8 / 6).round().long() % 8
    return torch.where(chroma < _CHROMA, grey, 3 + hue)


class Levels:
    """Splits a quantity into `LEVELS` bins of equal share, by the quantiles of the first batch."""

    def __init__(self) -> None:
        self.thresholds: Tensor | None = None  # (LEVELS - 1,)

    def __call__(self, values: Tensor) -> Tensor:
        """The level of each value, from 0 to LEVELS - 1."""
        if self.thresholds is None:
            some = values.flatten()[:: 1 + values.numel() // _LONGEST_QUANTILE_INPUT]
            self.thresholds = some.quantile(torch.arange(1, LEVELS, device=values.device, dtype=some.dtype) / LEVELS)
        return torch.bucketize(values, self.thresholds)
