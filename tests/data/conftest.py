"""Small generated pictures for the data room's tests."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def image_tree(tmp_path):
    """Makes ROOT/<split>/<class>/<number>.png with `count` images a class and returns ROOT.

    Each image has its own gray level, so that it can be told in a batch.
    """

    def make(splits=("train", "val"), classes=("ant", "bee", "cow"), count=6, size=8):
        level = 0
        for split in splits:
            for name in classes:
                folder = tmp_path / "tree" / split / name
                folder.mkdir(parents=True)
                for number in range(count):
                    level += 1
                    Image.new("RGB", (size, size), (level, level, level)).save(folder / f"{number}.png")
        return tmp_path / "tree"

    return make


@pytest.fixture
def npz(tmp_path):
    """Writes an .npz data set with 3 classes; arrays given by name replace its own, None removes one."""

    def make(train=60, test=15, size=8, **arrays):
        rng = np.random.default_rng(0)
        content = {
            "train_x": rng.integers(0, 256, (train, size, size, 3), dtype=np.uint8),
            "train_y": np.arange(train) % 3,
            "test_x": rng.integers(0, 256, (test, size, size, 3), dtype=np.uint8),
            "test_y": np.arange(test) % 3,
        } | arrays
        path = tmp_path / "set.npz"
        np.savez(path, **{name: array for name, array in content.items() if array is not None})
        return path

    return make
