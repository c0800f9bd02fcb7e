"""Resizing without OpenCV: the same pixels as with it."""

import cv2
import numpy as np
import pytest

from vmoe.data import resizing

# From and to a side: whole factors, 2 among them, that OpenCV treats apart; nearly none; far; to one pixel
SHRUNK = [(427, 224), (448, 224), (96, 32), (33, 32), (500, 299), (100, 7), (50, 1), (3, 2)]
GROWN = [(32, 224), (8, 32), (1, 5), (2, 3), (223, 224)]
SQUARES = [((side, side), (size, size)) for side, size in (*SHRUNK, *GROWN)]
# Along one side alone, or along both by other factors
OTHERS = [((60, 90), (30, 30)), ((60, 90), (60, 30)), ((64, 96), (32, 48)), ((45, 30), (45, 64)), ((20, 31), (64, 48))]


@pytest.mark.parametrize(("shape", "size"), [*SQUARES, *OTHERS])
def test_numpy_gives_opencvs_pixels(shape, size, monkeypatch):
    picture = np.random.default_rng(shape[0]).integers(0, 256, (*shape, 3), dtype=np.uint8)
    how = cv2.INTER_AREA if sum(shape) > sum(size) else cv2.INTER_LINEAR
    by_opencv = cv2.resize(picture, size[::-1], interpolation=how)
    assert np.array_equal(resizing.resize(picture, *size), by_opencv)
    monkeypatch.setattr(resizing, "cv2", None)
    assert np.array_equal(resizing.resize(picture, *size), by_opencv)


def test_a_part_of_a_picture_is_resized_without_opencv_too(monkeypatch):
    """Such as the central square: an array that is not contiguous; here it shrinks along one side and then grows."""
    picture = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    with_opencv = [resizing.resize(picture[:, 15:75], *size) for size in ((33, 33), (33, 77), (77, 33))]
    monkeypatch.setattr(resizing, "cv2", None)
    for size, expected in zip(((33, 33), (33, 77), (77, 33)), with_opencv, strict=True):
        assert expected.shape[:2] == size
        assert np.array_equal(resizing.resize(picture[:, 15:75], *size), expected)
