"""Augments a whole batch on the training device, with separate parameters for every image.

It has the presets of `Augmenter`, with these differences:
- A crop by scale is cut from the central square of 8/7 of the image size, by bilinear interpolation without
  anti-aliasing (the ratio is at most 8/7). Its shape is drawn within the square, without rejection.
- The crop, the flip and RandAugment's motions are one affine map with one sampling. So a motion may bring back what an
  earlier one moved out. Motions come before operations on colours, which also change the filling.
- The colour jitter changes brightness, contrast, saturation in this order, and rounds once at the end.

Shapes: B images, S pixels per side of a result, Q pixels per side of a stored image, n stored images.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vmoe.data import randaugment
from vmoe.data.config import AugmentConfig, Colour
from vmoe.data.draws import draw_numbers, uniforms
from vmoe.data.fusing import Fused
from vmoe.data.presets import resolve

_ASPECT = (3 / 4, 4 / 3)  # range of a crop by scale
_ERASED_AREA, _ERASED_ASPECT = (0.02, 0.33), (0.3, 3.3)
# The number of each draw. RandAugment's come last: a kind and a sign for each operation, then the magnitudes of all.
_CROP, _FLIP, _JITTER, _ERASING, _RANDAUGMENT = 0, 4, 5, 8, 13


class BatchAugmenter:
    """Augments and normalises training images. A result is a function of (stored image, seed, epoch, index) alone.

    The host never synchronises with the device. On a GPU everything is compiled into few kernels.

    Args:
        config: The preset and its parameters. A warning names parameters that the preset does not use.
        image_size: S.
        mean: Mean of the channels, in [0, 1]; also the colour that fills erased and empty areas.
        std: Standard deviation of the channels, in [0, 1].
        flip: Probability of a horizontal flip if the config leaves it to the data set.
        seed: The seed, not negative.
        device: The device of the images.
    """

    def __init__(
        self,
        config: AugmentConfig,
        image_size: int,
        mean: Colour,
        std: Colour,
        flip: float,
        seed: int,
        device: torch.device,
    ) -> None:
        self.steps = resolve(config, image_size, flip)
        self.image_size = image_size
        self.seed = seed
        self._mean = 255 * torch.tensor(mean, device=device).view(3, 1, 1)
        self._std = 255 * torch.tensor(std, device=device).view(3, 1, 1)
        self._fill = self._mean.round()
        self._places = torch.arange(image_size, device=device) + (0.5 - image_size / 2)  # pixels from the centre
        self._tables = randaugment.RandAugmentTables(image_size, device)
        self._numbers = draw_numbers(_RANDAUGMENT + 3 * self.steps.randaugment_ops, device=device)
        self._augment = Fused(self._one_by_one)

    def storage_size(self, own: int | None) -> int:
        """Q, the side of stored images: S, or for crops by scale about 8/7 of it, but at most their own side.

        Args:
            own: The shorter side of all images, if they have the same.
        """
        if self.steps.crop_scale is None:
            return self.image_size
        return min(round(self.image_size * 8 / 7), own or math.inf)

    def __call__(self, stored: Tensor, keys: Tensor, places: Tensor | None = None) -> Tensor:
        """Augments the batch of these keys.

        Args:
            stored: (n, 3, Q, Q) uint8.
            keys: (B, 2) int64, epoch and index of each image.
            places: (B,) int64, positions of the images in `stored`; None for their indices.

        Returns:
            (B, 3, S, S) float32, normalised.
        """
        return self._augment(stored, keys, keys[:, 1] if places is None else places)

    def _one_by_one(self, stored: Tensor, keys: Tensor, places: Tensor) -> Tensor:
        steps = self.steps
        draws = uniforms(self.seed, keys, self._numbers).unbind()
        images = stored[places].float()
        codes = self._codes(draws[_RANDAUGMENT:])
        if steps.crop_padding is not None or steps.crop_scale is not None:
            images = self._move(images, draws, codes)
        for code in codes:
            images = randaugment.colour(images, code, self._tables)
        if steps.color_jitter:
            images = self._jitter(images, draws[_JITTER:_ERASING])
        if steps.erasing:
            images = self._erase(images, draws[_ERASING:_RANDAUGMENT])
        return (images - self._mean) / self._std

    def _codes(self, draws: tuple[Tensor, ...]) -> list[Tensor]:
        """The code of each of RandAugment's operations, (B,) int64 each."""
        low, high = self.steps.randaugment_magnitude
        kinds_end = 2 * self.steps.randaugment_ops
        return [
            (low + (magnitude * (high - low + 1)).long()) * randaugment.KINDS
            + 2 * (kind * len(randaugment.OPERATIONS)).long()
            + (sign < 0.5).long()
            for kind, sign, magnitude in zip(draws[:kinds_end:2], draws[1:kinds_end:2], draws[kinds_end:], strict=True)
        ]

    def _move(self, images: Tensor, draws: tuple[Tensor, ...], codes: list[Tensor]) -> Tensor:
        """Crops, flips and applies RandAugment's motions with a single sampling."""
        size = self.image_size
        rows, columns = torch.meshgrid(self._places, self._places, indexing="ij")
        points = torch.stack([columns, rows], dim=2).expand(len(images), size, size, 2)
        if codes:
            points = _moved(points, _composed([self._tables.motions[code] for code in codes]))
            is_inside = points.abs().amax(dim=3) < size / 2
        grid = _moved(points, self._window(draws, images.shape[3]))
        if self.steps.crop_padding is not None:  # whole pixels, and black around the picture
            images = F.grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)
        else:
            images = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False).round()
        return torch.where(is_inside[:, None], images, self._fill) if codes else images

    def _window(self, draws: tuple[Tensor, ...], stored_size: int) -> Tensor:
        """The crop and the flip, (B, 3, 3): matrices from points of the result to points of the stored image.

        Points of the result are in pixels from the centre. Those of the stored image go from -1 to 1, as for
        `grid_sample`.
        """
        place = draws[_CROP:_FLIP]
        if self.steps.crop_padding is not None:
            padding = self.steps.crop_padding
            shift_x, shift_y = ((draw * (2 * padding + 1)).floor() - padding for draw in place[:2])
            scale_x = scale_y = torch.ones_like(shift_x)
        else:
            low, high = self.steps.crop_scale
            area = low + (high - low) * place[0]
            # bounds the aspect so that the crop fits: width / S = sqrt(area * aspect) must be at most 1, and so must
            # the height
            most = (-area.log()).clamp(max=math.log(_ASPECT[1]))
            aspect = ((2 * place[1] - 1) * most).exp()
            width, height = (stored_size * share.sqrt() for share in (area * aspect, area / aspect))
            shift_x, shift_y = (
                (stored_size - side) * (draw - 0.5) for side, draw in zip((width, height), place[2:], strict=True)
            )
            scale_x, scale_y = width / self.image_size, height / self.image_size
        scale_x = torch.where(draws[_FLIP] < self.steps.flip, -scale_x, scale_x)
        unit, zero = 2 / stored_size, torch.zeros_like(scale_x)
        rows = (
            (scale_x * unit, zero, shift_x * unit),
            (zero, scale_y * unit, shift_y * unit),
            (zero, zero, zero + 1),
        )
        return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)

    def _jitter(self, images: Tensor, draws: tuple[Tensor, ...]) -> Tensor:
        brightness, contrast, saturation = (
            (1 + self.steps.color_jitter * (2 * draw - 1))[:, None, None, None] for draw in draws
        )
        images = (images * brightness).clamp(0, 255)
        images = randaugment.blend_levels(images, randaugment.mean_of(randaugment.gray_of(images)), contrast)
        return randaugment.blend_levels(images, randaugment.gray_of(images), saturation).round()

    def _erase(self, images: Tensor, draws: tuple[Tensor, ...]) -> Tensor:
        size = self.image_size
        low, high = _ERASED_AREA
        area = low + (high - low) * draws[1]
        narrowest, widest = area.clamp(min=_ERASED_ASPECT[0]), (1 / area).clamp(max=_ERASED_ASPECT[1])
        aspect = narrowest + (widest - narrowest) * draws[2]
        place = self._places + (size / 2 - 0.5)
        inside = []
        for share, draw in ((area * aspect, draws[3]), (area / aspect, draws[4])):
            side = (size * share.sqrt()).round()
            start = (draw * (size - side + 1)).floor()[:, None]
            inside.append((place >= start) & (place < start + side[:, None]))
        columns, rows = inside
        is_erased = columns[:, None, :] & rows[:, :, None] & (draws[0] < self.steps.erasing)[:, None, None]
        return torch.where(is_erased[:, None], self._fill, images)


def _composed(motions: list[Tensor]) -> Tensor:
    """Composes inverse motions (B, 3, 3) of successive operations, from a result's point to its point in the source.

    The last operation is undone first. The product avoids `@`, which may round to TF32 and move points by a pixel.
    """
    product = motions[-1]
    for motion in reversed(motions[:-1]):
        product = (motion[:, :, :, None] * product[:, None]).sum(dim=2)
    return product


def _moved(points: Tensor, motion: Tensor) -> Tensor:
    """Applies motions (B, 3, 3) to the points (B, S, S, 2), x and y."""
    x, y = points.unbind(dim=3)
    first, second, _ = motion[:, :, :, None, None].unbind(dim=1)  # rows, (B, 3, 1, 1)
    return torch.stack([row[:, 0] * x + row[:, 1] * y + row[:, 2] for row in (first, second)], dim=3)
