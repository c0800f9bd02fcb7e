"""Draws a sheet of training images with a row for each class."""

import re
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vmoe.text import printable

_SMALLEST, _GAP, _MARGIN, _FONT, _LINE = 64, 4, 12, 15, 19  # pixels
_TEXT = 640  # least width of lines of text in pixels
_LONGEST = 24  # the most characters of a class name


def draw_sheet(title: str, rows: Sequence[tuple[str, Sequence[np.ndarray]]], lines: Sequence[str] = ()) -> Image.Image:
    """Draws images in rows. Small images are enlarged by integer factors.

    Args:
        title: A line above the images.
        rows: Names of classes and their images, (height, width, 3) uint8, of one size over the whole sheet.
        lines: Lines below the title, broken if they are too long.
    """
    font = ImageFont.load_default(_FONT)
    sides = next(image.shape[:2] for _, images in rows for image in images)
    factor = -(-_SMALLEST // min(sides))
    height, width = (side * factor for side in sides)
    names = [printable(name) for name, _ in rows]
    names = [name if len(name) <= _LONGEST else f"{name[: _LONGEST - 3]}..." for name in names]
    left = _MARGIN + _GAP + round(max(font.getlength(name) for name in names))
    columns = max(len(images) for _, images in rows)
    inner = max(left - _MARGIN + columns * (width + _GAP), round(font.getlength(title)), _TEXT * bool(lines))
    text = [title, *(part for line in lines for part in _broken(printable(line), font, inner))]
    top = 2 * _MARGIN + len(text) * _LINE - (_LINE - _FONT)
    sheet = Image.new("RGB", (inner + 2 * _MARGIN, top + len(rows) * (height + _GAP) + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(text):
        draw.text((_MARGIN, _MARGIN + number * _LINE), line, "black", font)
    for number, (name, (_, images)) in enumerate(zip(names, rows, strict=True)):
        y = top + number * (height + _GAP)
        draw.text((left - _GAP, y + height // 2), name, "black", font, anchor="rm")
        for column, image in enumerate(images):
            enlarged = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left + column * (width + _GAP), y))
    return sheet


def _broken(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Breaks a line into lines of at most `width` pixels, between words or after commas if possible."""
    parts = [""]
    for piece in re.findall(r"[^ ,]*(?:,| +|$)", line):
        if parts[-1] and font.getlength((parts[-1] + piece).rstrip()) > width:
            parts.append(piece)
        else:
            parts[-1] += piece
    return [part.rstrip() for part in parts]
