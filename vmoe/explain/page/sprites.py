"""Packs pictures as tiles of a few sheets, each an image in a data URI."""

import base64
import io
import math
from typing import Any

import numpy as np
from PIL import Image

# Pixels of the longer side to try, largest first; None keeps the size
_SIDES_TO_TRY = (None, 192, 160, 128, 96, 64, 48, 32)
_SHEET = 2048  # the most pixels of a sheet's side, which every browser can decode
_LOSSLESS_UP_TO = 64  # pixels of the longer side: compression would blur the patches of smaller pictures


def tile(pixels: np.ndarray, budget: int) -> dict[str, Any]:
    """Makes sheets of pictures with at most `budget` characters, and shrinks the pictures if needed.

    Args:
        pixels: (n, height, width, 3) uint8.
        budget: Characters of all data URIs.

    Returns:
        "sheets" (data URIs), "columns" and "rows" of a sheet, "width" and "height" of a tile in pixels.
    """
    for side in _SIDES_TO_TRY:
        sheets = _sheets(_resized(pixels, side))
        if sum(map(len, sheets["sheets"])) <= budget:
            break
    return sheets


def _resized(pixels: np.ndarray, side: int | None) -> np.ndarray:
    height, width = pixels.shape[1:3]
    if side is None or max(height, width) <= side or not len(pixels):
        return pixels
    size = max(1, round(width * side / max(height, width))), max(1, round(height * side / max(height, width)))
    return np.stack([np.asarray(Image.fromarray(each).resize(size, Image.Resampling.LANCZOS)) for each in pixels])


def _sheets(pixels: np.ndarray) -> dict[str, Any]:
    count, height, width = pixels.shape[:3]
    side = math.ceil(math.sqrt(max(count, 1)))
    columns, rows = max(1, min(side, _SHEET // width)), max(1, min(side, _SHEET // height))
    lossless = max(height, width) <= _LOSSLESS_UP_TO
    sheets = []
    for start in range(0, count, columns * rows):
        tiles = pixels[start : start + columns * rows]
        sheet = np.zeros((columns * rows, height, width, 3), np.uint8)
        sheet[: len(tiles)] = tiles
        sheet = sheet.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)
        used = -(-len(tiles) // columns) * height
        data = io.BytesIO()
        Image.fromarray(sheet[:used]).save(data, "WEBP", lossless=lossless, quality=75 if lossless else 82, method=4)
        sheets.append("data:image/webp;base64," + base64.b64encode(data.getvalue()).decode("ascii"))
    return {"sheets": sheets, "columns": columns, "rows": rows, "width": width, "height": height}
