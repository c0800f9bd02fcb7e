"""Reads pictures with any number of channels at the depth of their files, for `data.channels`.

Such a picture is (H, W, C) float32, with values divided by white and not clipped. Sources are the formats of `FORMATS`,
TIFF with any number of bands, and arrays in .npy files.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from vmoe.data.deep_images import ALL_OF_16, ORIENTATION, deep_image, raw_mode, to_rgb, without_no_data
from vmoe.extras import require_module
from vmoe.text import counted

if TYPE_CHECKING:
    import torch

_LUMINANCE = (0.299, 0.587, 0.114)  # weights of red, green and blue in Pillow's gray
_GRAY_OR_RGB = (1, 3)  # gray and colours, which are converted to each other
_NPY = b"\x93NUMPY"  # the first bytes of such a file
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # first bytes of a file; the last two are BigTIFF
_DISPLAYED = (1, 99)  # percentiles that become black and white


class WrongChannelsError(ValueError):
    """A picture has another number of channels than needed."""

    def __init__(self, found: int | tuple[int, ...], channels: int) -> None:
        known = f"is of shape {found}" if isinstance(found, tuple) else f"has {counted(found, 'channel')}"
        super().__init__(f"{known}, but data.channels={channels}; give pictures with {counted(channels, 'channel')}")


@dataclass(frozen=True)
class Stored:
    """What a file holds: values (H, W, C) of any type, upright; black and white, where the file says them itself; and
    the opacity (H, W) of each pixel in [0, 1], where the last channel is none of its own.
    """

    values: np.ndarray
    own_range: tuple[float, float] | None = None
    opacity: np.ndarray | None = None

    def fractions(self, channels: int, bit_depth: int | None) -> np.ndarray:
        """(H, W, channels) float32.

        Raises:
            WrongChannelsError: The file has another number of channels, not gray or colours.
        """
        low, high = self.own_range or (0, white_of(self.values.dtype, bit_depth))
        values = without_no_data(self.values).astype(np.float32)
        values = (values - np.float32(low)) / np.float32(high - low)
        if self.opacity is not None:
            seen = self.opacity[..., None].astype(np.float32)
            values = values * seen + (1 - seen)
        found = values.shape[2]
        if found != channels:
            if found not in _GRAY_OR_RGB or channels not in _GRAY_OR_RGB:
                raise WrongChannelsError(found, channels)
            values = np.repeat(values, 3, 2) if found == 1 else values @ np.array(_LUMINANCE, np.float32)[:, None]
        return np.ascontiguousarray(values)


def white_of(kind: "np.dtype[Any]", bit_depth: int | None) -> float:
    """The value of white for files or arrays of a type that do not declare it."""
    if kind == np.uint8:
        return 255
    if kind == np.bool_:
        return 1
    return float(2 ** (bit_depth or (1 if kind.kind == "f" else 16)) - 1)


def stored_in(source: BinaryIO, channels: int, formats: Sequence[str] | None = None) -> Stored:
    """Reads a file of Pillow's `formats` (or any), a TIFF with other numbers of bands, or a single array.

    Raises:
        ValueError: It cannot be decoded. Pillow raises other types for damaged files.
        MissingExtraError: It needs a package that is not installed.
    """
    if _beginning(source, 6) == _NPY:
        return of_array(np.lib.format.read_array(source, allow_pickle=False), channels)
    if is_tiff(source) and (formats is None or "TIFF" in formats):
        try:
            stored = _by_pillow(source, channels, formats) if channels in _GRAY_OR_RGB else None
        except Image.UnidentifiedImageError:
            stored = None
        source.seek(0)
        return stored or _by_tifffile(source, channels)
    return _by_pillow(source, channels, formats)


def is_tiff(source: BinaryIO) -> bool:
    """Whether a file starts like a TIFF. The file is then back at its start."""
    return _beginning(source, 4) in _TIFF


def _beginning(source: BinaryIO, size: int) -> bytes:
    source.seek(0)
    head = source.read(size)
    source.seek(0)
    return head


def of_array(array: np.ndarray, channels: int) -> Stored:
    """An array (height, width, channels), (channels, height, width) or (height, width) of numbers.

    Raises:
        ValueError: It has another shape.
    """
    if array.ndim not in (2, 3) or array.dtype.kind not in "biuf" or 0 in array.shape:
        raise ValueError(f"an array of {array.dtype} of shape {array.shape}: must be numbers of (height, width, C)")
    if array.ndim == 2:
        return Stored(array[..., None])
    wanted = [(channels,), *([_GRAY_OR_RGB] if channels in _GRAY_OR_RGB else [])]
    for numbers in wanted:
        if array.shape[2] in numbers:
            return Stored(array)
        if array.shape[0] in numbers:
            return Stored(np.moveaxis(array, 0, 2))
    raise WrongChannelsError(array.shape, channels)


def of_image(image: Image.Image, channels: int, stored: str = "") -> Stored:
    """The stored values of an upright Pillow image with at most 8 bits. `stored` is its raw mode if it is of a file."""
    if channels not in _GRAY_OR_RGB:
        return Stored(np.atleast_3d(np.array(image)))
    if channels == 1 and image.mode == "L" and "transparency" not in image.info:
        return Stored(np.array(image)[..., None])
    return Stored(to_rgb(image, stored))


def count_values(source: BinaryIO, channels: int, formats: Sequence[str] | None = None) -> int:
    """The number of values of an image with `channels` channels. It reads only the file's header.

    Raises:
        ValueError: It is damaged. Pillow raises other types.
    """
    if _beginning(source, 6) == _NPY:
        version = np.lib.format.read_magic(source)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return math.prod(read(source)[0])
    try:
        with Image.open(source, formats=formats) as image:
            return image.width * image.height * channels
    except Image.UnidentifiedImageError:
        if not is_tiff(source):
            raise
    require_module("tifffile")
    import tifffile

    with tifffile.TiffFile(source) as file:
        return math.prod(file.series[0].shape)


def _by_pillow(source: BinaryIO, channels: int, formats: Sequence[str] | None) -> Stored:
    with Image.open(source, formats=formats) as image:
        deep = deep_image(image, source)
        if deep is None:
            stored = raw_mode(image)
            ImageOps.exif_transpose(image, in_place=True)
            return of_image(image, channels, stored)
        orientation = None if deep.is_gray else image.getexif().get(ORIENTATION)
        own_range, values = deep.own_range, deep.values()
        if deep.is_gray:  # after loading, since Pillow then has turned a TIFF
            orientation = image.getexif().get(ORIENTATION)
        opacity = None
        if channels in _GRAY_OR_RGB:
            seen = deep.opacity(values, own_range[1] if own_range else ALL_OF_16[1])
            opacity = None if seen is None else upright(seen / np.float32(255), orientation)
            values = values if deep.is_gray else values[..., :3]
        return Stored(upright(np.atleast_3d(values), orientation), own_range, opacity)


def _by_tifffile(source: BinaryIO, channels: int) -> Stored:
    require_module("tifffile")
    import tifffile

    with tifffile.TiffFile(source) as file:
        orientation = file.pages.first.tags.valueof(ORIENTATION)
        stored = of_array(file.asarray(), channels)
    return Stored(upright(stored.values, orientation))


def upright(values: np.ndarray, orientation: Any) -> np.ndarray:
    """Turns an array (H, W, ...) by EXIF's orientation, 1 to 8."""
    if orientation not in range(2, 9):
        return values
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    down = -1 if orientation in (3, 4, 7, 8) else 1
    across = -1 if orientation in (2, 3, 6, 7) else 1
    return values[::down, ::across]


def displayed(picture: np.ndarray) -> np.ndarray:
    """A picture for display: unchanged in 8 bits, else its first three channels, or with fewer the first one as gray.

    The values are scaled so that 1 % are black and 1 % white, since pictures of satellites and microscopes are often
    dark.

    Args:
        picture: (H, W, 3) uint8, or (H, W, C) float32.

    Returns:
        (H, W, 3) uint8.
    """
    if picture.dtype == np.uint8:
        return picture
    colours = picture[..., :3] if picture.shape[2] >= 3 else np.repeat(picture[..., :1], 3, 2)
    low, high = np.percentile(colours, _DISPLAYED)
    if high <= low:
        low, high = 0, 1
    return np.rint(np.clip((colours - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def displayed_line(channels: int) -> str:
    """A line on the channels that `displayed` shows."""
    if channels < 3:
        return "the first of 2 channels as gray" if channels == 2 else "the only channel as gray"
    return "red, green and blue" if channels == 3 else f"the first 3 of {channels} channels as red, green and blue"


def displayed_batch(images: "torch.Tensor") -> "torch.Tensor":
    """Applies `displayed` to each of the images (B, C, H, W): (B, 3, H, W) in [0, 1]."""
    import torch

    pictures = [displayed(each.permute(1, 2, 0).cpu().numpy()) for each in images.float()]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(images.device).float() / 255


class ChannelSums:
    """Sums over pictures, for the mean and the standard deviation of their channels."""

    def __init__(self) -> None:
        self.pixels = 0
        self._sums: np.ndarray | float = 0.0  # (2, C), sums of values and of their squares

    def add(self, picture: np.ndarray) -> None:
        """Adds a picture (H, W, C), uint8 or float32."""
        white = 255 if picture.dtype == np.uint8 else 1
        values = picture.reshape(-1, picture.shape[2]).astype(np.float64) / white
        self._sums = self._sums + np.stack([values.sum(0), (values**2).sum(0)])
        self.pixels += len(values)

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """The mean and standard deviation of each channel; for pictures in 8 bits in units of 255."""
        mean, squares = np.asarray(self._sums) / self.pixels
        std = np.sqrt(np.maximum(squares - mean**2, 1e-6))
        return [float(each) for each in mean], [float(each) for each in std]


def mean_and_std(pictures: Iterable[np.ndarray]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of some pictures (H, W, C)."""
    sums = ChannelSums()
    for picture in pictures:
        sums.add(picture)
    return sums.mean_and_std()
