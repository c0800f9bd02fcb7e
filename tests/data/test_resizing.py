"""Resizing without OpenCV: the same pixels as with it."""

import cv2
import numpy as np
import pytest

from vmoe.data import resizing

# From and to a side: whole factors, 2 among them, that OpenCV treats apart; nearly none; far; to one pixel
SHRUNK = [(427, 224), (448, 224), (96, 32), (33, 32), (500, 299), (100, 7), (50, 1), (3, 2)]
GROWN = [(32, 224), (8, 32), (1, 5), (2, 3), (223, 224)]


@pytest.mark.parametrize(("side", "size"), [*SHRUNK, *GROWN])
def test_numpy_gives_opencvs_pixels(side, size, monkeypatch):
    square = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    by_opencv = cv2.resize(square, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_LINEAR)
    assert np.array_equal(resizing.resize_square(square, size), by_opencv)
    monkeypatch.setattr(resizing, "cv2", None)
    assert np.array_equal(resizing.resize_square(square, size), by_opencv)


def test_a_part_of_a_picture_is_resized_without_opencv_too(monkeypatch):
    """Such as the central square: an array that is not contiguous."""
    picture = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    with_opencv = resizing.resize_square(picture[:, 15:75], 33)
    monkeypatch.setattr(resizing, "cv2", None)
    assert np.array_equal(resizing.resize_square(picture[:, 15:75], 33), with_opencv)
