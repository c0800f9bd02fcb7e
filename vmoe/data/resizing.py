"""Resizes a picture as OpenCV does, bit for bit: with OpenCV if it is installed, else with NumPy.

OpenCV comes with the extra `train`. Without it a prediction takes longer, with the same numbers. Tests compare both.
"""

import math
from typing import NamedTuple

import numpy as np

from vmoe.extras import require_module

try:
    import cv2
except ModuleNotFoundError:
    cv2 = None

_CHANNELS_AT_ONCE = 4  # OpenCV averages at most this many channels over integer areas
_UNIT = 2048  # the weights of bilinear interpolation are multiples of 1 / 2048


def resize(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes a picture: area averages down, bilinear up.

    Area averages avoid aliasing when a picture shrinks, but would give blocks when it grows. If one side shrinks and
    the other grows, it shrinks first.

    Args:
        picture: (H, W, C) uint8 or float32.
        height: Height of the result in pixels.
        width: Width of the result in pixels.

    Returns:
        (height, width, C) of the same type; `picture` itself if it has that size.

    Raises:
        MissingExtraError: It is float32, and OpenCV is not installed.
    """
    rows, columns = picture.shape[:2]
    if (rows > height) != (columns > width) and rows != height and columns != width:
        picture = resize(picture, min(rows, height), min(columns, width))
        rows, columns = picture.shape[:2]
    if (rows, columns) == (height, width):
        return picture
    shrinks = rows > height or columns > width
    if picture.dtype != np.uint8:
        require_module("cv2")
    if cv2 is not None:
        how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        parts = [
            picture[..., start : start + _CHANNELS_AT_ONCE] for start in range(0, picture.shape[2], _CHANNELS_AT_ONCE)
        ]
        resized = [cv2.resize(part, (width, height), interpolation=how).reshape(height, width, -1) for part in parts]
        return resized[0] if len(resized) == 1 else np.concatenate(resized, 2)
    return shrink_by_area(picture, height, width) if shrinks else grow_bilinearly(picture, height, width)


def shrink_by_area(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Computes OpenCV's INTER_AREA. Arguments and result are as in `resize`."""
    rows, columns = picture.shape[:2]
    if rows % height == 0 and columns % width == 0:
        down, across = rows // height, columns // width
        cells = picture.reshape(height, down, width, across, -1)
        sums = cells.sum(1, dtype=np.int32).sum(2)
        if down == across == 2:  # here OpenCV rounds halves up, elsewhere to even
            return ((sums + 2) >> 2).astype(np.uint8)
        return np.rint(sums.astype(np.float32) * np.float32(1 / (down * across))).astype(np.uint8)
    turned = np.ascontiguousarray(picture.swapaxes(0, 1)).astype(np.float32)
    narrow = np.ascontiguousarray(_average_cells(turned, width).swapaxes(0, 1))
    return np.clip(np.rint(_average_cells(narrow, height)), 0, 255).astype(np.uint8)


def _average_cells(lines: np.ndarray, size: int) -> np.ndarray:
    """Averages lines (S, ...) float32 over cells of S / size lines. A line on an edge counts by its part in the cell.

    Like OpenCV it adds the lines one after the other in float32.
    """
    length = len(lines)
    scale = length / size
    result = np.empty((size, *lines.shape[1:]), np.float32)
    for cell in range(size):
        begin = cell * scale
        end = begin + scale
        width = min(scale, length - begin)
        last = min(math.floor(end), length - 1)
        first = min(math.ceil(begin), last)
        weights = [1.0] * (last - first)
        if first - begin > 1e-3:
            weights.insert(0, first - begin)
            first -= 1
        if end - last > 1e-3:
            weights.append(min(end - last, 1.0, width))
            last += 1
        shares = np.array([weight / width for weight in weights], np.float32)
        np.add.reduce(lines[first:last] * shares.reshape(-1, *[1] * (lines.ndim - 1)), axis=0, out=result[cell])
    return result


def grow_bilinearly(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Computes OpenCV's INTER_LINEAR, which uses integers. Arguments and result are as in `resize`."""
    rows, columns = _Neighbours.of(picture.shape[0], height), _Neighbours.of(picture.shape[1], width)
    pixels = picture.astype(np.int32)
    # at edges OpenCV takes only the outermost column, but both rows
    lines = pixels[:, columns.first] * np.where(columns.is_outside, _UNIT, columns.near)[:, None]
    lines += pixels[:, columns.second] * np.where(columns.is_outside, 0, columns.far)[:, None]
    lines >>= 4
    sums = (lines[rows.first] * rows.near[:, None, None] >> 16) + (lines[rows.second] * rows.far[:, None, None] >> 16)
    return np.clip((sums + 2) >> 2, 0, 255).astype(np.uint8)


class _Neighbours(NamedTuple):
    """The two source lines of each line of an enlarged picture, (size,) each, and their weights."""

    first: np.ndarray
    second: np.ndarray
    near: np.ndarray
    far: np.ndarray
    is_outside: np.ndarray

    @classmethod
    def of(cls, length: int, size: int) -> "_Neighbours":
        places = ((np.arange(size) + 0.5) * (length / size) - 0.5).astype(np.float32)
        before = np.floor(places).astype(np.int64)
        shares = places - before.astype(np.float32)
        far, near = (np.rint(each * _UNIT).astype(np.int32) for each in (shares, 1 - shares))
        is_outside = (before < 0) | (before >= length - 1)
        return cls(np.clip(before, 0, length - 1), np.clip(before + 1, 0, length - 1), near, far, is_outside)
