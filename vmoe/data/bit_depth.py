"""How many bits the values of a set's deep files use: measured once, on a sample, where nobody says it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vmoe.data.deep_images import deep_image
from vmoe.data.image_files import FORMATS
from vmoe.data.imageset import FileImages, ImageSet
from vmoe.data.shards import ShardedImages
from vmoe.errors import UserError

_DEEP_SUFFIXES = tuple(suffix for form in ("PNG", "PPM", "TIFF") for suffix in FORMATS[form])
_LOOKED_FOR, _OPENED, _DECODED = 1000, 200, 64  # images at most
_USUAL = (8, 10, 12, 14, 16)
_SEEN = 32  # images whose brightest level is looked at
_DIM = 64  # of 255


class Measured(NamedTuple):
    """The largest value of some deep files, which do not say it themselves, and the bits that hold it."""

    largest: float
    bits: int


def measure_bit_depth(images: FileImages | ShardedImages, positions: Sequence[int]) -> Measured | None:
    """The bits that the deep files among some images use, on an evenly spread sample.

    Returns:
        None where the sample has no deep file, or only files that say their range themselves or that hold values below
        0. Bits are 1 for fractions up to 1, else 8, 10, 12, 14, 16, or as many as the largest value needs.
    """
    candidates = [
        each for each in _spread(positions, _LOOKED_FOR) if images.place(each).lower().endswith(_DEEP_SUFFIXES)
    ]
    largest, has_fractions, decoded = -math.inf, False, 0
    for position in _spread(candidates, _OPENED):
        if decoded == _DECODED:
            break
        try:
            with images.open(position) as file, Image.open(file) as image:
                deep = deep_image(image, file)
                if deep is None or deep.own_range is not None:
                    continue
                has_fractions |= deep.has_fractions
                values = deep.values()
        except Exception:  # damaged, which is told where it is used
            continue
        if has_fractions and values.min() < 0:
            return None
        decoded += 1
        largest = max(largest, float(values[..., :3].max() if values.ndim == 3 else values.max()))
    return Measured(largest, _bits(largest, has_fractions)) if decoded else None


def depth_of_files(paths: Sequence[str | Path]) -> Measured | None:
    """`measure_bit_depth` of image files."""
    return measure_bit_depth(FileImages([str(path) for path in paths]), range(len(paths)))


def brightest_level(images: ImageSet) -> int | None:
    """The brightest level, 0 to 255, of an evenly spread sample; None where no image can be read."""
    levels = []
    for index in _spread(range(len(images)), _SEEN):
        try:
            levels.append(int(images.read(index).max()))
        except UserError:  # damaged, which is told where it is used
            continue
    return max(levels, default=None)


def depth_lines(root: str, given: int | None, measured: Measured | None, brightest: int | None) -> list[str]:
    """What there is to say about a set's depth: what was measured, and whether it looks wrongly scaled."""
    lines = []
    if measured is not None and given is None and measured.bits != 16:
        white = f"white is {2**measured.bits - 1} (data.bit_depth={measured.bits})"
        lines.append(f"{root}: files of more than 8 bits, with values up to {measured.largest:g}: {white}")
    if measured is not None and given is not None and measured.largest > 2**given - 1:
        lines.append(
            f"warning: data.bit_depth={given}: {root} has values up to {measured.largest:g}, and all above "
            f"{2**given - 1} is white; leave it out to have it measured"
        )
    if brightest is not None and brightest < _DIM:
        lines.append(
            f"warning: {root}: the brightest level of a sample of images is {brightest} of 255, so they look wrongly "
            "scaled; give data.bit_depth for files of more than 8 bits, or spread the levels of others over 0 to 255"
        )
    return lines


def _spread(items: Sequence[int], most: int) -> list[int]:
    """At most so many of the items, evenly spread."""
    if len(items) <= most:
        return list(items)
    return [items[int(place)] for place in np.linspace(0, len(items) - 1, most)]


def _bits(largest: float, has_fractions: bool) -> int:
    tolerance = 1.1 if has_fractions else 1  # resampling overshoots
    usual = (1, *_USUAL) if has_fractions else _USUAL
    return next(
        (bits for bits in usual if largest <= (2**bits - 1) * tolerance), math.ceil(math.log2(max(largest, 1) + 1))
    )
