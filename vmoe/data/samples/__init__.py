"""Sample data in the package: handwritten digits and two photographs. README.md names their authors."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

_FOLDER = Path(__file__).parent
_AUTHORS = {"china.jpg": "danielbuechele", "flower.jpg": "vultilion"}
PHOTOGRAPHS = tuple(_AUTHORS)


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """1,797 handwritten digits, in the order of scikit-learn's set of this name.

    Returns:
        Images (1797, 8, 8) uint8 of 17 levels, from 0 for paper to 16 for ink, and their digits (1797,) int64.
    """
    with np.load(_FOLDER / "digits.npz") as file:
        return file["images"], file["labels"].astype(np.int64)


def photograph_path(name: str) -> Path:
    """The file of one of `PHOTOGRAPHS`."""
    return _FOLDER / name


def load_photograph(name: str) -> np.ndarray:
    """One of `PHOTOGRAPHS`: (427, 640, 3) uint8."""
    with Image.open(photograph_path(name)) as image:
        return np.array(image)


def credit(names: Sequence[str] = PHOTOGRAPHS) -> str:
    """The authors of these photographs, whom their licence requires to be named."""
    what = "photographs" if len(names) > 1 else "photograph"
    return f"{what} by {' and '.join(_AUTHORS[name] for name in names)} (Flickr), CC BY 2.0"
