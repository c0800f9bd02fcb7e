"""Patchwork: its labels say what is on the pictures."""

import numpy as np
import torch

from vmoe.data import DataConfig, ImageDataModule, SubsetConfig
from vmoe.data.patchwork import GRID, OBJECTS, PATCH_NAMES, PATCH_SIZE, TEXTURES, make_patchwork


def test_an_image_is_a_function_of_its_seed():
    one, again, other = make_patchwork(12, 3), make_patchwork(12, 3), make_patchwork(12, 4)
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not np.array_equal(one[0], other[0])


def test_the_class_is_the_object_that_stands_four_times():
    pixels, labels, patches = make_patchwork(60, 0)
    assert pixels.shape == (60, GRID * PATCH_SIZE, GRID * PATCH_SIZE, 3) and pixels.dtype == np.uint8
    assert np.bincount(labels).tolist() == [10] * len(OBJECTS)
    for label, shown in zip(labels, patches, strict=True):
        counts = np.bincount(shown.flatten(), minlength=len(PATCH_NAMES))[len(TEXTURES) :]
        assert counts[label] == 4 and sorted(counts) == [0, 0, 1, 1, 1, 4]


def test_patches_show_what_their_labels_say():
    pixels, _, patches = make_patchwork(50, 0)
    tiles = pixels.reshape(50, GRID, PATCH_SIZE, GRID, PATCH_SIZE, 3).swapaxes(2, 3).astype(float)
    down = np.abs(np.diff(tiles, axis=3)).mean((3, 4, 5))
    across = np.abs(np.diff(tiles, axis=4)).mean((3, 4, 5))
    kind = {name: patches == index for index, name in enumerate(PATCH_NAMES)}
    assert down[kind["plain"]].max() < 12 and across[kind["plain"]].max() < 12  # only the grain
    assert (down[kind["horizontal stripes"]] > 3 * across[kind["horizontal stripes"]]).all()
    assert (across[kind["vertical stripes"]] > 3 * down[kind["vertical stripes"]]).all()
    assert down[kind["disc"]].min() > 12


def test_no_texture_and_no_colour_tells_the_class():
    pixels, labels, patches = make_patchwork(3000, 5)
    for texture in range(len(TEXTURES)):
        share = (patches == texture).mean((1, 2))
        by_class = np.array([share[labels == label].mean() for label in range(len(OBJECTS))])
        assert np.ptp(by_class) < 0.05
    colour = np.array([pixels[labels == label].mean((0, 1, 2)) for label in range(len(OBJECTS))])
    assert np.ptp(colour, axis=0).max() < 8


def test_batches_bring_the_patch_labels_and_other_sets_none():
    data = ImageDataModule(DataConfig(name="patchwork", subset=SubsetConfig(classes=["ring", "disc"])), seed=0)
    data.setup()
    batch = next(iter(data.test_dataloader()))
    assert data.class_names == ["ring", "disc"] and data.image_size == GRID * PATCH_SIZE
    assert batch.patch_labels.shape == (len(batch.labels), GRID, GRID)
    ring = len(TEXTURES) + OBJECTS.index("ring")
    assert torch.equal((batch.patch_labels == ring).sum((1, 2)) == 4, batch.labels == 0)
    digits = ImageDataModule(DataConfig(), seed=0)
    digits.setup()
    assert next(iter(digits.test_dataloader())).patch_labels is None
