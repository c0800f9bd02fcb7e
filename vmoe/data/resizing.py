"""Resizing a square picture as OpenCV does, to the last bit: by OpenCV where it is installed, else by NumPy.

OpenCV comes with the extra `train`. Without it a prediction takes longer, and its numbers are the same. The tests
compare both.
"""

import math

import numpy as np

try:
    import cv2
except ModuleNotFoundError:
    cv2 = None

_ONE = 2048  # the weights of bilinear interpolation are multiples of 1 / 2048


def resize_square(square: np.ndarray, size: int) -> np.ndarray:
    """Resizes a square picture: area averages down, bilinear up.

    Averages of areas avoid aliasing when a picture shrinks. When it grows, they would give blocks.

    Args:
        square: (S, S, 3) uint8.
        size: S of the result.

    Returns:
        (size, size, 3) uint8.
    """
    shrinks = len(square) > size
    if cv2 is not None:
        return cv2.resize(square, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return shrink_by_area(square, size) if shrinks else grow_bilinearly(square, size)


def shrink_by_area(square: np.ndarray, size: int) -> np.ndarray:
    """What OpenCV's INTER_AREA gives; arguments and result as in `resize_square`."""
    if len(square) % size == 0:
        factor = len(square) // size
        cells = square.reshape(size, factor, size, factor, 3)
        sums = cells.sum(1, dtype=np.int32).sum(2)
        if factor == 2:  # OpenCV rounds halves up here, and to even values elsewhere
            return ((sums + 2) >> 2).astype(np.uint8)
        return np.rint(sums.astype(np.float32) * np.float32(1 / factor**2)).astype(np.uint8)
    columns = np.ascontiguousarray(square.swapaxes(0, 1)).astype(np.float32)
    rows = np.ascontiguousarray(_average_cells(columns, size).swapaxes(0, 1))
    return np.clip(np.rint(_average_cells(rows, size)), 0, 255).astype(np.uint8)


def _average_cells(lines: np.ndarray, size: int) -> np.ndarray:
    """Averages lines (S, ...) float32 over cells of S / size lines; a line on an edge counts for its part in the cell.

    OpenCV adds one line after the other in float32, and so does this.
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


def grow_bilinearly(square: np.ndarray, size: int) -> np.ndarray:
    """What OpenCV's INTER_LINEAR gives, which computes in whole numbers; arguments and result as in `resize_square`."""
    length = len(square)
    places = ((np.arange(size) + 0.5) * (length / size) - 0.5).astype(np.float32)
    before = np.floor(places).astype(np.int64)
    shares = places - before.astype(np.float32)
    far, near = (np.rint(each * _ONE).astype(np.int32) for each in (shares, 1 - shares))
    is_outside = (before < 0) | (before >= length - 1)  # there OpenCV takes the outermost column alone, but both rows
    first, second = np.clip(before, 0, length - 1), np.clip(before + 1, 0, length - 1)
    pixels = square.astype(np.int32)
    lines = pixels[:, first] * np.where(is_outside, _ONE, near)[:, None]
    lines += pixels[:, second] * np.where(is_outside, 0, far)[:, None]
    lines >>= 4
    sums = (lines[first] * near[:, None, None] >> 16) + (lines[second] * far[:, None, None] >> 16)
    return np.clip((sums + 2) >> 2, 0, 255).astype(np.uint8)
