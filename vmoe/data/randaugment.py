"""RandAugment (arXiv 1909.13719) of a batch with separate operations per image, with torchvision's set and magnitudes.

An operation has a code: `KINDS` times its magnitude, plus twice its index in `OPERATIONS`, plus 1 if its sign is
negative. All numbers of a code are constants in tables. So the host never synchronises with the device, and shapes do
not depend on the draws.

Shapes: B images, S pixels per side. Images are (B, 3, S, S) float32 of whole numbers from 0 to 255.
"""

import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

OPERATIONS = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
    *("Brightness", "Color", "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
)
KINDS = 2 * len(OPERATIONS)  # number of codes per magnitude
_STRONGEST = 30  # magnitudes are counted from 0 to this
_LEVELS = 256


class RandAugmentTables:
    """The constants of all codes, for magnitudes from 0 to 30.

    Args:
        image_size: S.
        device: The device of the images.
    """

    def __init__(self, image_size: int, device: torch.device) -> None:
        shares = [magnitude / _STRONGEST for magnitude in range(_STRONGEST + 1)]
        codes = list(itertools.product(shares, OPERATIONS, (1, -1)))
        motions = [_motion(name, sign, share, image_size) for share, name, sign in codes]
        # per code: maps a pixel of the result to its source, in pixels from the centre, x to the right and y down; the
        # identity for operations on colours
        self.motions = torch.tensor(motions, device=device)  # (codes, 3, 3)
        self.factors = torch.tensor([1 + 0.9 * share * sign for share, _, sign in codes], device=device)
        self.levels = torch.arange(_LEVELS, dtype=torch.float32, device=device)
        # posterize keeps 8 bits minus this many; Python and torch both round half to even
        grain = torch.tensor([2.0 ** round(4 * share) for share in shares], device=device)[:, None]
        self.posterized = (self.levels / grain).floor() * grain  # (magnitudes, 256), as the next
        bounds = torch.linspace(1.0, 0.0, _STRONGEST + 1).to(device)  # same bits for all devices
        threshold = 255 * bounds[:, None]
        self.solarized = torch.where(self.levels >= threshold, 255 - self.levels, self.levels)


def colour(images: Tensor, codes: Tensor, tables: RandAugmentTables) -> Tensor:
    """Applies the operations on colours. Other operations do not change an image.

    Args:
        images: (B, 3, S, S).
        codes: (B,) int64.
        tables: The tables of all codes.

    Returns:
        (B, 3, S, S), rounded down to integers as torchvision does.
    """
    magnitude, kind = codes // KINDS, codes % KINDS
    operation = (kind >> 1)[:, None, None]
    factor = tables.factors[codes][:, None, None]
    gray = gray_of(images)
    pixels = images.flatten(2).long()
    table = _level_tables(pixels, gray, operation, factor, magnitude, tables)
    looked_up = table.gather(2, pixels).view_as(images)
    # colour and sharpness need a pixel's other channels or its neighbours, so a table of levels is not enough
    is_colour, is_sharpness = (_is(operation[..., None], name) for name in ("Color", "Sharpness"))
    other = torch.where(is_colour, gray, _blurred(images))
    weight = torch.where(is_colour | is_sharpness, factor[..., None], 1.0)
    return blend_levels(looked_up, other, weight).floor()


def gray_of(images: Tensor) -> Tensor:
    """Luma of whole levels, (B, 1, S, S)."""
    red, green, blue = images.split(1, dim=1)
    return (red * 0.2989 + green * 0.587 + blue * 0.114).floor()


def mean_of(gray: Tensor) -> Tensor:
    """Mean level of each image, (B, 1, 1, 1). Sums of integers are exact, so the mean is the same in any batch."""
    total = gray.sum(dim=(1, 2, 3), keepdim=True, dtype=torch.float64)
    return (total / (gray.shape[2] * gray.shape[3])).float()


def blend_levels(images: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    """Blends `weight` of the images with 1 - `weight` of the other, clamped to 0 to 255. It may extrapolate."""
    return (images * weight + other * (1 - weight)).clamp(0, _LEVELS - 1)


def _level_tables(
    pixels: Tensor, gray: Tensor, operation: Tensor, factor: Tensor, magnitude: Tensor, tables: RandAugmentTables
) -> Tensor:
    """The new level of each level in each channel, (B, 3, 256)."""
    counts = torch.zeros(*pixels.shape[:2], _LEVELS, dtype=torch.int32, device=pixels.device)
    counts = counts.scatter_add(2, pixels, torch.ones_like(pixels, dtype=torch.int32))
    lowest, highest = torch.aminmax(pixels, dim=2, keepdim=True)
    mean = mean_of(gray)[..., 0]
    is_contrast = _is(operation, "Contrast")
    weight = torch.where(is_contrast | _is(operation, "Brightness"), factor, 1.0)
    table = blend_levels(tables.levels, torch.where(is_contrast, mean, 0.0), weight).floor()
    table = torch.where(_is(operation, "Posterize"), tables.posterized[magnitude][:, None], table)
    table = torch.where(_is(operation, "Solarize"), tables.solarized[magnitude][:, None], table)
    stretch = _is(operation, "AutoContrast") & (lowest < highest)
    unit = (highest - lowest).float() * (1 / 255)
    stretched = ((tables.levels - lowest) / torch.where(stretch, unit, 1.0)).clamp(0, _LEVELS - 1).floor()
    table = torch.where(stretch, stretched, table)
    # equalises as Pillow and torchvision do: the last occurring level does not count
    step = torch.div(pixels.shape[2] - counts.gather(2, highest), _LEVELS - 1, rounding_mode="floor")
    below = counts.cumsum(2) - counts
    equalized = torch.div(below + torch.div(step, 2, rounding_mode="floor"), step.clamp(min=1), rounding_mode="floor")
    return torch.where(_is(operation, "Equalize") & (step > 0), equalized.clamp(0, _LEVELS - 1).float(), table)


def _blurred(images: Tensor) -> Tensor:
    """The 3 x 3 smoothing that sharpness blends with, (B, 3, S, S). The outermost pixels stay."""
    if min(images.shape[2:]) < 3:
        return images
    inner = images[..., 1:-1, 1:-1]
    total = F.avg_pool2d(images, 3, stride=1, divisor_override=1) + 4 * inner
    result = images.clone()
    result[..., 1:-1, 1:-1] = (total / 13).round()
    return result


def _is(operation: Tensor, name: str) -> Tensor:
    return operation == OPERATIONS.index(name)


def _motion(name: str, sign: int, share: float, size: int) -> list[list[float]]:
    """The inverse of one geometric operation, as a 3x3 matrix for points (x, y, 1).

    Shears keep the upper left corner fixed, as torchvision's do.
    """
    shear = sign * 0.3 * share
    shift = float(sign * int(150 / 331 * size * share))
    angle = sign * math.radians(30 * share)
    matrix = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    if name == "ShearX":
        matrix[0] = [1.0, shear, shear * size / 2]
    elif name == "ShearY":
        matrix[1] = [shear, 1.0, shear * size / 2]
    elif name == "TranslateX":
        matrix[0] = [1.0, 0.0, -shift]
    elif name == "TranslateY":
        matrix[1] = [0.0, 1.0, -shift]
    elif name == "Rotate":
        matrix[:2] = [[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]]
    return matrix
