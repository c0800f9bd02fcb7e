"""Patchwork: generated images with labelled patches, to test whether experts align with the content of patches.

An image of 48 pixels is a grid of 6 x 6 patches. Three regions have a texture each, in two random colours. Seven of the
patches have an object in random colours instead: four times the object of the image's class, and three others. So no
texture, colour or single patch shows the class.

Axis letters: n images, R and C rows and columns of patches.
"""

from functools import lru_cache

import numpy as np

from vmoe.data.imageset import ArrayImages, ImageSet, Splits

TEXTURES = ("plain", "horizontal stripes", "vertical stripes", "checks", "dots", "noise")
OBJECTS = ("disc", "ring", "square", "cross", "plus", "triangle")
PATCH_NAMES = (*TEXTURES, *OBJECTS)
PATCH_SIZE, GRID = 8, 6  # pixels per patch, and patches per side
TRAIN_IMAGES, TEST_IMAGES = 6000, 2000
_REGIONS, _TARGETS, _OTHERS, _JITTERS = 3, 4, 3, 4


@lru_cache(maxsize=1)
def load_patchwork() -> Splits:
    """The data set, always the same 8,000 images. The classes are `OBJECTS`; patch labels index `PATCH_NAMES`."""
    sets = []
    for name, count, seed in (("train", TRAIN_IMAGES, 0), ("test", TEST_IMAGES, 1)):
        pixels, labels, patches = make_patchwork(count, seed)
        sets.append(ImageSet.all_of(ArrayImages(pixels, f"patchwork {name}", patches), labels))
    return Splits(sets[0], None, sets[1], list(OBJECTS), patch_names=list(PATCH_NAMES))


def make_patchwork(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws images.

    Args:
        count: n.
        seed: Seed of all random numbers.

    Returns:
        Pixels (n, 48, 48, 3) uint8; labels (n,), indices of `OBJECTS` in equal numbers up to one; patch labels
        (n, R, C), indices of `PATCH_NAMES`.
    """
    random = np.random.default_rng(seed)
    labels = random.permutation(np.arange(count) % len(OBJECTS))
    regions = _regions(random, count)
    texture_of_region = random.permuted(np.tile(np.arange(len(TEXTURES)), (count, 1)), axis=1)[:, :_REGIONS]
    patches = np.take_along_axis(texture_of_region, regions, 1)
    cells, kinds = _objects(random, labels)
    np.put_along_axis(patches, cells, len(TEXTURES) + kinds, 1)

    colours = np.take_along_axis(_colour_pairs(random, count, _REGIONS), regions[:, :, None, None], 1)
    np.put_along_axis(colours, cells[:, :, None, None], _colour_pairs(random, count, cells.shape[1]), 1)
    cover = _templates()[patches, random.integers(_JITTERS, size=patches.shape)]  # (n, R * C, 8, 8)
    is_noise = patches == PATCH_NAMES.index("noise")
    cover[is_noise] = random.random((is_noise.sum(), PATCH_SIZE, PATCH_SIZE)) < 0.5
    behind, before = colours[:, :, None, None, 0], colours[:, :, None, None, 1]
    tiles = behind + cover[..., None] * (before - behind)
    tiles += 0.02 * random.standard_normal(size=tiles.shape, dtype=np.float32)
    tiles = tiles.reshape(count, GRID, GRID, PATCH_SIZE, PATCH_SIZE, 3).swapaxes(2, 3)
    pixels = (tiles.clip(0, 1) * 255).round().astype(np.uint8).reshape(count, GRID * PATCH_SIZE, GRID * PATCH_SIZE, 3)
    return pixels, labels, patches.reshape(count, GRID, GRID)


def _regions(random: np.random.Generator, count: int) -> np.ndarray:
    """The region of each patch (n, R * C), by the nearest of a few random points."""
    points = random.random((count, _REGIONS, 1, 2)) * GRID
    centres = np.stack(np.meshgrid(np.arange(GRID), np.arange(GRID), indexing="ij"), -1).reshape(-1, 2) + 0.5
    return np.square(points - centres).sum(-1).argmin(1)


def _objects(random: np.random.Generator, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The patches with objects and the objects, (n, 7) each. The three objects of other classes are distinct."""
    count = len(labels)
    anywhere = random.permuted(np.tile(np.arange(GRID * GRID), (count, 1)), axis=1)[:, : _TARGETS + _OTHERS]
    steps = random.permuted(np.tile(np.arange(1, len(OBJECTS)), (count, 1)), axis=1)[:, :_OTHERS]
    others = (labels[:, None] + steps) % len(OBJECTS)
    return anywhere, np.concatenate([np.tile(labels[:, None], (1, _TARGETS)), others], 1)


def _colour_pairs(random: np.random.Generator, count: int, pairs: int) -> np.ndarray:
    """A dark and a light colour in either order: (n, pairs, 2, 3) in [0, 1]."""
    shades = random.random((count, pairs, 2, 3), dtype=np.float32) * 0.4
    both = shades + np.array([[0], [0.6]], dtype=np.float32)
    return np.where(random.random((count, pairs, 1, 1)) < 0.5, both, both[:, :, ::-1])


@lru_cache(maxsize=1)
def _templates() -> np.ndarray:
    """The share of the second colour in each pixel: (kinds, jitters, 8, 8). "noise" is drawn per patch."""
    y, x = np.mgrid[:PATCH_SIZE, :PATCH_SIZE]
    v, u = y - 3.5, x - 3.5
    radius = np.hypot(u, v)
    shapes = {
        "plain": np.zeros_like(radius),
        "horizontal stripes": y % 4 < 2,
        "vertical stripes": x % 4 < 2,
        "checks": (y % 4 < 2) ^ (x % 4 < 2),
        "dots": (y % 4 == 1) & (x % 4 == 1),
        "noise": np.zeros_like(radius),
        "disc": radius < 3,
        "ring": (radius > 1.8) & (radius < 3.2),
        "square": np.maximum(abs(u), abs(v)) < 2.6,
        "cross": (abs(abs(u) - abs(v)) < 0.8) & (np.maximum(abs(u), abs(v)) < 3),
        "plus": (np.minimum(abs(u), abs(v)) < 1) & (np.maximum(abs(u), abs(v)) < 3),
        "triangle": (v > -3) & (v < 3) & (abs(u) < (v + 3.5) / 2),
    }
    shifts = [(0, 0), (0, 1), (1, 0), (1, 1)]
    return np.array(
        [[np.roll(shapes[name], shift, (0, 1)) for shift in shifts] for name in PATCH_NAMES], dtype=np.float32
    )
