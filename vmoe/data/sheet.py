"""A sheet of training images, as a picture: a row for each class."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vmoe.text import printable

_SMALLEST, _GAP, _MARGIN, _FONT = 64, 4, 12, 15  # pixels
_LONGEST = 24  # characters of a class name


def draw_sheet(title: str, rows: Sequence[tuple[str, Sequence[np.ndarray]]]) -> Image.Image:
    """Draws images in rows; small ones are enlarged by whole factors.

    Args:
        title: A line above.
        rows: Names of classes, and images of them, (S, S, 3) uint8, of one size all over the sheet.
    """
    font = ImageFont.load_default(_FONT)
    side = next(len(image) for _, images in rows for image in images)
    cell = side * -(-_SMALLEST // side)
    names = [printable(name) for name, _ in rows]
    names = [name if len(name) <= _LONGEST else f"{name[: _LONGEST - 3]}..." for name in names]
    left = _MARGIN + _GAP + round(max(font.getlength(name) for name in names))
    top = 2 * _MARGIN + _FONT
    columns = max(len(images) for _, images in rows)
    width = max(left + columns * (cell + _GAP), _MARGIN + round(font.getlength(title))) + _MARGIN
    sheet = Image.new("RGB", (width, top + len(rows) * (cell + _GAP) + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), title, "black", font)
    for number, (name, (_, images)) in enumerate(zip(names, rows, strict=True)):
        y = top + number * (cell + _GAP)
        draw.text((left - _GAP, y + cell // 2), name, "black", font, anchor="rm")
        for column, image in enumerate(images):
            enlarged = Image.fromarray(image).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left + column * (cell + _GAP), y))
    return sheet
