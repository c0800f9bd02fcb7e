"""Augmentation of a whole batch on the device that trains, every image by parameters of its own.

The presets of `Augmenter`, with these differences from it:
- a crop by scale is cut from a square of 8/7 of the image size, the centre of the picture, by bilinear interpolation
  without anti-aliasing (the ratio is at most 8/7); its shape is drawn so that it fits, not drawn again until it does;
- the motions of a crop, the flip and RandAugment are one affine map, sampled once: what one motion moves out of the
  picture the next may bring back, and motions come before operations on colours, which also change the filling;
- the colour jitter changes brightness, contrast, saturation in this order, and rounds once, at its end.

Shapes: B images, S pixels a side of a result, Q pixels a side of a stored image, n stored images.
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

_ASPECT = (3 / 4, 4 / 3)  # of a crop by scale
_ERASED_AREA, _ERASED_ASPECT = (0.02, 0.33), (0.3, 3.3)
# Which draw is for what; RandAugment's come last: a kind and a sign for each operation, then the magnitudes of all.
_CROP, _FLIP, _JITTER, _ERASING, _RANDAUGMENT = 0, 4, 5, 8, 13


class BatchAugmenter:
    """Varies and normalises training images; a result is a function of (stored image, seed, epoch, index) alone.

    The device is never waited for. On a GPU the whole is compiled into few kernels.

    Args:
        config: preset and its parameters. A parameter that the preset does not use is warned about.
        image_size: S.
        mean: of the channels, in [0, 1]; also what fills what is erased or moved in from outside.
        std: of the channels, in [0, 1].
        flip: probability of a horizontal flip where the config leaves it to the data set.
        seed: not negative.
        device: where the images are.
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
        self.plan = resolve(config, image_size, flip)
        self.image_size = image_size
        self.seed = seed
        self._mean = 255 * torch.tensor(mean, device=device).view(3, 1, 1)
        self._std = 255 * torch.tensor(std, device=device).view(3, 1, 1)
        self._fill = self._mean.round()
        self._places = torch.arange(image_size, device=device) + (0.5 - image_size / 2)  # of pixels, from the centre
        self._tables = randaugment.RandAugmentTables(image_size, device)
        self._numbers = draw_numbers(_RANDAUGMENT + 3 * self.plan.randaugment_ops, device=device)
        self._augment = Fused(self._one_by_one)

    def storage_size(self, own: int | None) -> int:
        """Q, the side of images to be stored: S, or for crops by scale about 8/7 of it, but not more than their own.

        Args:
            own: the shorter side of all images, where they have the same.
        """
        if self.plan.crop_scale is None:
            return self.image_size
        return min(round(self.image_size * 8 / 7), own or math.inf)

    def __call__(self, stored: Tensor, keys: Tensor, places: Tensor | None = None) -> Tensor:
        """The batch of these keys.

        Args:
            stored: (n, 3, Q, Q) uint8.
            keys: (B, 2) int64, epoch and index of each image.
            places: (B,) int64, of the images in `stored`; None: their indices.

        Returns:
            (B, 3, S, S) float32, normalised.
        """
        return self._augment(stored, keys, keys[:, 1] if places is None else places)

    def _one_by_one(self, stored: Tensor, keys: Tensor, places: Tensor) -> Tensor:
        plan = self.plan
        draws = uniforms(self.seed, keys, self._numbers).unbind()
        images = stored[places].float()
        codes = self._codes(draws[_RANDAUGMENT:])
        if plan.crop_padding is not None or plan.crop_scale is not None:
            images = self._move(images, draws, codes)
        for code in codes:
            images = randaugment.colour(images, code, self._tables)
        if plan.color_jitter:
            images = self._jitter(images, draws[_JITTER:_ERASING])
        if plan.erasing:
            images = self._erase(images, draws[_ERASING:_RANDAUGMENT])
        return (images - self._mean) / self._std

    def _codes(self, draws: tuple[Tensor, ...]) -> list[Tensor]:
        """The code of each of RandAugment's operations, (B,) int64 each."""
        low, high = self.plan.randaugment_magnitude
        kinds_end = 2 * self.plan.randaugment_ops
        return [
            (low + (magnitude * (high - low + 1)).long()) * randaugment.KINDS
            + 2 * (kind * len(randaugment.OPERATIONS)).long()
            + (sign < 0.5).long()
            for kind, sign, magnitude in zip(draws[:kinds_end:2], draws[1:kinds_end:2], draws[kinds_end:], strict=True)
        ]

    def _move(self, images: Tensor, draws: tuple[Tensor, ...], codes: list[Tensor]) -> Tensor:
        """Crops, flips and applies RandAugment's motions by sampling once, at x = a u + b v + x0 and y likewise."""
        size, stored_size = self.image_size, images.shape[3]
        scale_x, scale_y, shift_x, shift_y = self._window(draws[_CROP:_FLIP], stored_size)
        scale_x = torch.where(draws[_FLIP] < self.plan.flip, -scale_x, scale_x)
        x = self._places.expand(len(images), size, size)
        y = self._places[:, None].expand(len(images), size, size)
        if codes:
            a, b, x0, c, d, y0 = _composed([self._tables.motion(code)[:, :, None, None] for code in codes])
            x, y = a * x + b * y + x0, c * x + d * y + y0
            is_inside = torch.maximum(x.abs(), y.abs()) < size / 2
        unit = 2 / stored_size  # grid_sample counts from -1 to 1
        grid = torch.stack(
            [
                x * (scale_x * unit)[:, None, None] + (shift_x * unit)[:, None, None],
                y * (scale_y * unit)[:, None, None] + (shift_y * unit)[:, None, None],
            ],
            dim=3,
        )
        if self.plan.crop_padding is not None:  # whole pixels, and black around the picture
            images = F.grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)
        else:
            images = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False).round()
        return torch.where(is_inside[:, None], images, self._fill) if codes else images

    def _window(self, draws: tuple[Tensor, ...], stored_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The crop: stored pixels a pixel of the result in x and y, and how far its centre is from the picture's."""
        if self.plan.crop_padding is not None:
            padding = self.plan.crop_padding
            shifts = [(draw * (2 * padding + 1)).floor() - padding for draw in draws[:2]]
            return torch.ones_like(shifts[0]), torch.ones_like(shifts[0]), *shifts
        low, high = self.plan.crop_scale
        area = low + (high - low) * draws[0]
        # Wider than the area allows would not fit: width / S = sqrt(area * aspect) <= 1, height likewise.
        most = (-area.log()).clamp(max=math.log(_ASPECT[1]))
        aspect = ((2 * draws[1] - 1) * most).exp()
        width, height = (stored_size * share.sqrt() for share in (area * aspect, area / aspect))
        shift_x, shift_y = (
            (stored_size - side) * (draw - 0.5) for side, draw in zip((width, height), draws[2:], strict=True)
        )
        return width / self.image_size, height / self.image_size, shift_x, shift_y

    def _jitter(self, images: Tensor, draws: tuple[Tensor, ...]) -> Tensor:
        brightness, contrast, saturation = (
            (1 + self.plan.color_jitter * (2 * draw - 1))[:, None, None, None] for draw in draws
        )
        images = (images * brightness).clamp(0, 255)
        images = randaugment.blend(images, randaugment.mean_of(randaugment.gray_of(images)), contrast)
        return randaugment.blend(images, randaugment.gray_of(images), saturation).round()

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
        is_erased = columns[:, None, :] & rows[:, :, None] & (draws[0] < self.plan.erasing)[:, None, None]
        return torch.where(is_erased[:, None], self._fill, images)


def _composed(motions: list[Tensor]) -> tuple[Tensor, ...]:
    """From a pixel of the result through the inverse of the last motion back to the first's origin."""
    a, b, x, c, d, y = motions[-1]
    for e, f, u, g, h, v in reversed(motions[:-1]):
        a, b, x, c, d, y = (
            *(e * a + f * c, e * b + f * d, e * x + f * y + u),
            *(g * a + h * c, g * b + h * d, g * x + h * y + v),
        )
    return a, b, x, c, d, y
