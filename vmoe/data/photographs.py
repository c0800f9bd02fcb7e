"""The sample photographs: two of scikit-learn's, which needs no download."""

import numpy as np

PHOTOGRAPHS = ("china.jpg", "flower.jpg")
CREDIT = "photographs by danielbuechele and vultilion (Flickr), CC BY 2.0, from scikit-learn"


def load_photograph(name: str) -> np.ndarray:
    """One of `PHOTOGRAPHS`: (427, 640, 3) uint8."""
    from sklearn.datasets import load_sample_image  # here, since it brings SciPy along

    return np.array(load_sample_image(name))
