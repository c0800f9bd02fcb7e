"""Measures the bit depth of a set's deep files, once on a sample, if neither the files nor the user give it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from vmoe.data.channels import Stored, stored_in
from vmoe.data.deep_images import deep_image, without_no_data
from vmoe.data.huggingface import HuggingFaceImages
from vmoe.data.image_files import ARRAY_SUFFIX, FORMATS
from vmoe.data.imageset import ArrayImages, FileImages, ImageSet
from vmoe.data.shards import ShardedImages
from vmoe.errors import UserError

_DEEP_SUFFIXES = (*FORMATS["PNG"], *FORMATS["PPM"], *FORMATS["TIFF"], ARRAY_SUFFIX)
_LOOKED_FOR, _OPENED, _DECODED = 1000, 200, 64  # limits on numbers of images
_USUAL = (8, 10, 12, 14, 16)
_MOST_BITS = 32  # as in DataConfig
_SEEN = 32  # the most images for the brightest level
_DIM = 64  # of 255


class Measured(NamedTuple):
    """The values of some deep files that do not declare their range."""

    smallest: float
    largest: float
    bits: int  # bits of the largest value
    most_bits: int  # bits that are enough for 9 of 10 files


class _FileValues(NamedTuple):
    smallest: float
    largest: float
    has_fractions: bool


def measure_bit_depth(
    images: ArrayImages | FileImages | ShardedImages | HuggingFaceImages, positions: Sequence[int]
) -> Measured | None:
    """The bit depth of the deep files among some images, from an evenly spread sample.

    Returns:
        None if the sample has no deep file, only files that declare their range, or fractions below 0. Bits are 1 for
        fractions up to 1, else 8, 10, 12, 14, 16, or as many as the largest value needs. If the images are read by
        channels, they are 1 for fractions below 0, too: these stay as they are.
    """
    candidates = _evenly_spread(positions, _LOOKED_FOR)
    if isinstance(images, FileImages | ShardedImages):  # these name files by their format
        candidates = [each for each in candidates if images.place(each).lower().endswith(_DEEP_SUFFIXES)]
    found: list[_FileValues] = []
    for position in _evenly_spread(candidates, _OPENED):
        if len(found) == _DECODED:
            break
        try:
            if isinstance(images, ArrayImages):
                values = _values_of(Stored(images.array[position]))
            else:
                with images.open(position) as file:
                    values = _file_values(file, images.channels)
        except Exception:  # a damaged file: whoever uses it reports it
            continue
        if values is not None:
            found.append(values)
    return _measured_of_files(found, images.channels)


def depth_of_files(paths: Sequence[str | Path], channels: int | None = None) -> Measured | None:
    """`measure_bit_depth` of image files, read as `load_image` reads them."""
    return measure_bit_depth(FileImages([str(path) for path in paths], channels=channels), range(len(paths)))


def depth_of_content(content: BinaryIO, channels: int | None = None) -> int | None:
    """The bit depth of a single image file, as by `measure_bit_depth`; None for a damaged file."""
    try:
        values = _file_values(content, channels)
    except Exception:  # on damaged files Pillow's decoders raise nearly any type
        return None
    measured = None if values is None else _measured_of_files([values], channels)
    return None if measured is None else measured.bits


def _values_of(stored: Stored) -> _FileValues | None:
    values = without_no_data(stored.values)
    if stored.own_range is not None or values.dtype in (np.uint8, np.bool_):
        return None
    return _FileValues(float(values.min()), float(values.max()), values.dtype.kind == "f")


def _file_values(file: BinaryIO, channels: int | None) -> _FileValues | None:
    """The values of a deep file that does not declare its range; None for others."""
    if channels is not None:
        return _values_of(stored_in(file, channels, tuple(FORMATS)))
    with Image.open(file, formats=tuple(FORMATS)) as image:
        deep = deep_image(image, file)
        if deep is None or deep.own_range is not None:
            return None
        has_fractions, values = deep.has_fractions, deep.values()
    colours = values[..., :3] if values.ndim == 3 else values
    return _FileValues(float(colours.min()), float(colours.max()), has_fractions)


def _measured_of_files(found: Sequence[_FileValues], channels: int | None) -> Measured | None:
    if not found:
        return None
    has_fractions = any(each.has_fractions for each in found)
    smallest, largest = min(each.smallest for each in found), max(each.largest for each in found)
    if has_fractions and smallest < 0:  # which have no black and white
        return None if channels is None else Measured(smallest, largest, 1, 1)
    most = sorted(each.largest for each in found)[math.ceil(0.9 * len(found)) - 1]
    return Measured(smallest, largest, _bits(largest, has_fractions), _bits(most, has_fractions))


def brightest_level(images: ImageSet) -> int | None:
    """The brightest level, 0 to 255, of an evenly spread sample; None if no image can be read."""
    levels = []
    for index in _evenly_spread(range(len(images)), _SEEN):
        try:
            levels.append(int(images.read(index).max()))
        except UserError:  # a damaged file: whoever uses it reports it
            continue
    return max(levels, default=None)


def depth_lines(root: str, given: int | None, measured: Measured | None, brightest: int | None) -> list[str]:
    """The notes on a set's bit depth: the measured one, and a warning if the images look wrongly scaled."""
    lines = []
    needed = None  # bits of nearly all files, if a few have larger values
    if measured is not None and given is None:
        if measured.most_bits < measured.bits:
            needed = measured.most_bits
        if measured.bits != 16 or needed is not None:
            white = f"white is {2**measured.bits - 1} (data.bit_depth={measured.bits})"
            if needed is not None:
                white += (
                    f"; 9 of 10 files have no values above {2**needed - 1}: give data.bit_depth={needed} if the others "
                    "are outliers"
                )
            lines.append(f"{root}: files of more than 8 bits, with values up to {measured.largest:g}: {white}")
    if measured is not None:
        lines += clipped_lines(root, measured.bits if given is None else given, measured)
    if brightest is not None and brightest < _DIM:
        lines.append(
            f"warning: {root}: the brightest level of a sample of images is {brightest} of 255, so they look wrongly "
            f"scaled; give data.bit_depth{'' if needed is None else f'={needed}'} for files of more than 8 bits, or "
            "spread the levels of others over 0 to 255"
        )
    return lines


def clipped_lines(place: str, depth: int, measured: Measured) -> list[str]:
    """Warns of values in `place` that become black or white when files are read with this bit depth."""
    lines = []
    if (measured.bits > depth or depth == _MOST_BITS) and measured.largest > 2**depth - 1:
        advice = f"train with data.bit_depth={measured.bits} to see them"
        lines.append(
            f"warning: data.bit_depth={depth}: {place} has values up to {measured.largest:g}, and all above "
            f"{2**depth - 1} is white; {advice if depth < _MOST_BITS else 'save smaller ones'}"
        )
    if measured.smallest < 0:
        lines.append(
            f"warning: {place}: has values down to {measured.smallest:g}, and all below 0 is black; save the files "
            "with values from 0 on"
        )
    return lines


def _evenly_spread(items: Sequence[int], most: int) -> list[int]:
    """At most `most` of the items, evenly spread."""
    if len(items) <= most:
        return list(items)
    return [items[int(place)] for place in np.linspace(0, len(items) - 1, most)]


def _bits(largest: float, has_fractions: bool) -> int:
    tolerance = 1.1 if has_fractions else 1  # resampling may overshoot
    usual = (1, *_USUAL) if has_fractions else _USUAL
    needed = math.ceil(math.log2(max(largest, 1) + 1))
    return next((bits for bits in usual if largest <= (2**bits - 1) * tolerance), min(needed, _MOST_BITS))
