"""Common corruptions of images at five severities, made on the fly, as in ImageNet-C and CIFAR-C (Hendrycks and
Dietterich 2019, https://arxiv.org/abs/1903.12261).

Operations and severities are those of the authors' scripts: CIFAR-C's, made for 32 pixels, for images up to 64 pixels,
else ImageNet-C's, made for 224. Lengths in pixels do not scale with the image, except elastic ones. The draws differ,
and motion blur computes ImageMagick's kernel without ImageMagick, so images are similar but not equal bit for bit.
Frost is missing: it overlays photographs of frost.

An image here is (H, W, 3) float32 in [0, 1], H = W. `level` is a severity's entry in the tables.
"""

import io
import math
import zlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

SEVERITIES = (1, 2, 3, 4, 5)
SMALL_SIDE = 64  # images up to this side in pixels use CIFAR-C's severities
_SLIP = 244 / 224  # ImageNet-C's elastic lengths are shares of 244 pixels, a slip for 224


class Corruption(NamedTuple):
    """An operation `apply(image, level, rng)` and its level at each severity, for small and for large images."""

    apply: Callable[[np.ndarray, object, np.random.Generator], np.ndarray]
    small: tuple
    large: tuple


def corrupt(image: np.ndarray, name: str, severity: int, seed: int, index: int) -> np.ndarray:
    """A corrupted copy of an image, as a pure function of the arguments.

    Args:
        image: (H, H, 3) uint8, a model's input.
        name: A key of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: The seed, not negative.
        index: Index of the image in its set, so that every image has its own draws.

    Returns:
        (H, H, 3) uint8.
    """
    corruption = CORRUPTIONS[name]
    levels = corruption.small if image.shape[0] <= SMALL_SIDE else corruption.large
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), severity, index])
    changed = corruption.apply(image.astype(np.float32) / 255, levels[severity - 1], rng)
    return (np.clip(changed, 0, 1) * 255).round().astype(np.uint8)


def _gaussian_noise(image: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:
    return image + rng.normal(scale=level, size=image.shape)


def _shot_noise(image: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:
    return rng.poisson(image * level) / level


def _impulse_noise(image: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:
    """Salt and pepper in equal parts. `level` is the probability per value of a channel."""
    hit, salt = rng.random(image.shape) < level, rng.random(image.shape) < 0.5
    return np.where(hit, salt, image)


def _defocus_blur(image: np.ndarray, level: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """`level`: radius of the disk, and sigma of the blur of its edge."""
    radius, edge = level
    reach = 8 if radius <= 8 else math.ceil(radius)
    along = np.arange(-reach, reach + 1)
    disk = (along[:, None] ** 2 + along**2 <= radius**2).astype(np.float32)
    size = (3, 3) if radius <= 8 else (5, 5)
    return cv2.filter2D(image, -1, cv2.GaussianBlur(disk / disk.sum(), size, edge))


def _glass_blur(image: np.ndarray, level: tuple[float, int, int], rng: np.random.Generator) -> np.ndarray:
    """`level`: sigma of the blur, how far pixels move, and how often."""
    sigma, reach, rounds = level
    side = image.shape[0]
    source = list(range(side * side))
    rows = np.arange(side - reach, reach, -1)
    for _ in range(rounds):
        moves = rng.integers(-reach, reach, size=(len(rows), len(rows), 2))
        here = rows[:, None] * side + rows
        there = here + moves[..., 1] * side + moves[..., 0]
        # the authors intend to swap two pixels, but their code copies one over the other
        for target, origin in zip(here.ravel().tolist(), there.ravel().tolist(), strict=True):
            source[target] = source[origin]
    return _blur(_blur(image, sigma).reshape(side * side, 3)[source].reshape(image.shape), sigma)


def _motion_blur(image: np.ndarray, level: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """`level`: radius and sigma."""
    return _motion_blurred(image, *level, rng.uniform(-45, 45))


def _zoom_blur(image: np.ndarray, level: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """The mean of the image and its enlargements. `level`: largest factor (exclusive) and step."""
    factors = np.arange(1, *level)
    return (image + sum(_zoomed(image, factor) for factor in factors)) / (len(factors) + 1)


def _snow(image: np.ndarray, level: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    """`level`: mean and deviation of the noise, size, threshold, radius and sigma of motion, unwhitened share."""
    mean, deviation, size, threshold, radius, sigma, kept = level
    flakes = _zoomed(rng.normal(mean, deviation, image.shape[:2]).astype(np.float32), size)
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1).astype(np.float32)
    flakes = _motion_blurred(flakes, radius, sigma, rng.uniform(-135, -45))[..., None]
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
    return kept * image + (1 - kept) * np.maximum(image, 1.5 * gray + 0.5) + flakes + np.rot90(flakes, 2)


def _fog(image: np.ndarray, level: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """`level`: density, and the decay of finer detail of the fog."""
    density, decay = level
    side, brightest = image.shape[0], image.max()
    foggy = image + density * _plasma(side, decay, rng)[..., None]
    return foggy * brightest / (brightest + density)


def _brightness(image: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:
    colours = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    colours[..., 2] = np.clip(colours[..., 2] + level, 0, 1)
    return cv2.cvtColor(colours, cv2.COLOR_HSV2RGB)


def _contrast(image: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:
    mean = image.mean((0, 1))
    return mean + level * (image - mean)


def _elastic_transform(image: np.ndarray, level: tuple[float, float, float], rng: np.random.Generator) -> np.ndarray:
    """`level`, as shares of the side: length and smoothness of local shifts, largest shift of the affine corners."""
    side = image.shape[0]
    length, smoothness, shift = (side * share for share in level)
    centre, arm = side // 2, side // 3
    corners = np.float32([[centre + arm, centre + arm], [centre + arm, centre - arm], [centre - arm, centre - arm]])
    affine = cv2.getAffineTransform(corners, corners + rng.uniform(-shift, shift, (3, 2)).astype(np.float32))
    image = cv2.warpAffine(image, affine, (side, side), borderMode=cv2.BORDER_REFLECT_101)
    shifts = [rng.uniform(-1, 1, (side, side)) for _ in range(2)]
    across, down = (length * gaussian_filter(part, smoothness, mode="reflect", truncate=3) for part in shifts)
    columns, rows = np.meshgrid(np.arange(side), np.arange(side))
    places = ((columns + across).astype(np.float32), (rows + down).astype(np.float32))
    return cv2.remap(image, *places, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def _pixelate(image: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:
    side = image.shape[0]
    coarse = _picture(image).resize((max(1, int(side * level)),) * 2, Image.Resampling.BOX)
    return _floats(coarse.resize((side, side), Image.Resampling.BOX))


def _jpeg_compression(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    file = io.BytesIO()
    _picture(image).save(file, "JPEG", quality=level)
    return _floats(Image.open(file))


def _picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray((image * 255).round().astype(np.uint8))


def _floats(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, dtype=np.float32) / 255


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    side = 2 * int(4 * sigma + 0.5) + 1
    return cv2.GaussianBlur(image, (side, side), sigma, borderType=cv2.BORDER_REPLICATE)


def _zoomed(image: np.ndarray, factor: float) -> np.ndarray:
    """The central part of a square image, enlarged to its size."""
    side = image.shape[0]
    part = math.ceil(side / factor)
    start = (side - part) // 2
    enlarged = max(side, round(part * factor))
    image = cv2.resize(image[start : start + part, start : start + part], (enlarged, enlarged))
    trim = (enlarged - side) // 2
    return image[trim : trim + side, trim : trim + side]


def _motion_blurred(image: np.ndarray, radius: float, sigma: float, degrees: float) -> np.ndarray:
    """ImageMagick's motion blur: half a Gaussian along a line from each pixel."""
    reach = 2 * math.ceil(radius)
    angle = math.radians(degrees)
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1), dtype=np.float32)
    for step in range(reach + 1):
        column, row = round(step * math.cos(angle)), round(step * math.sin(angle))
        kernel[reach + row, reach + column] += math.exp(-(step**2) / (2 * sigma**2))
    return cv2.filter2D(image, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REPLICATE)


def _plasma(side: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """A cloud (side, side) in [0, 1] by the diamond-square algorithm on a torus (Fournier et al. 1982,
    https://doi.org/10.1145/358523.358553); noise gets weaker by decay**2 with every halving of the step.
    """
    size = 1 << max(1, (side - 1).bit_length())
    cloud = np.zeros((size, size))
    step, strength = size, 100.0
    while step >= 2:
        half = step // 2
        varied = partial(_mean_of_four, strength**2, rng)
        corners = cloud[::step, ::step]
        pairs = corners + np.roll(corners, -1, 0)
        cloud[half::step, half::step] = varied(pairs + np.roll(pairs, -1, 1))
        centres = cloud[half::step, half::step]
        cloud[::step, half::step] = varied(centres + np.roll(centres, 1, 0) + corners + np.roll(corners, -1, 1))
        cloud[half::step, ::step] = varied(centres + np.roll(centres, 1, 1) + corners + np.roll(corners, -1, 0))
        step, strength = half, strength / decay
    cloud -= cloud.min()
    return (cloud / cloud.max())[:side, :side]


def _mean_of_four(strength: float, rng: np.random.Generator, total: np.ndarray) -> np.ndarray:
    return total / 4 + strength * rng.uniform(-1, 1, total.shape)


# fmt: off
CORRUPTIONS = {
    "gaussian_noise": Corruption(_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": Corruption(_shot_noise, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": Corruption(_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": Corruption(
        _defocus_blur,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "glass_blur": Corruption(
        _glass_blur,
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": Corruption(
        _motion_blur,
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    "zoom_blur": Corruption(
        _zoom_blur,
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    "snow": Corruption(
        _snow,
        ((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
         (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)),
        ((0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
         (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)),
    ),
    "fog": Corruption(
        _fog,
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": Corruption(_brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": Corruption(_contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": Corruption(
        _elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        tuple(tuple(_SLIP * share for share in level) for level in (
            (2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))),
    ),
    "pixelate": Corruption(_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": Corruption(_jpeg_compression, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}
# fmt: on
