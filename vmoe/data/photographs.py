"""The sample photographs: two of scikit-learn's, which needs no download."""

from collections.abc import Sequence

import numpy as np

_AUTHORS = {"china.jpg": "danielbuechele", "flower.jpg": "vultilion"}
PHOTOGRAPHS = tuple(_AUTHORS)


def load_photograph(name: str) -> np.ndarray:
    """One of `PHOTOGRAPHS`: (427, 640, 3) uint8."""
    from sklearn.datasets import load_sample_image  # here, since it brings SciPy along

    return np.array(load_sample_image(name))


def credit(names: Sequence[str] = PHOTOGRAPHS) -> str:
    """Who made these photographs, as their licence asks for."""
    what = "photographs" if len(names) > 1 else "photograph"
    return f"{what} by {' and '.join(_AUTHORS[name] for name in names)} (Flickr), CC BY 2.0, from scikit-learn"
