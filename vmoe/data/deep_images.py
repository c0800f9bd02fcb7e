"""Reads images with more than 8 bits per channel, or with fractions: finds their white value and converts to 8 bits.

A camera of 12 bits writes files of 16 bits with 4095 as their brightest value. Few files declare this. PNG's sBIT does
not: it gives the number of significant bits before the values were scaled to all 16.
"""

import struct
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from vmoe.extras import require_module

ALL_OF_16 = (0, 65535)
_MODES_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_SPREAD = {"L;2": 85, "L;4": 17}  # gray of 2 and 4 bits: the step between levels in 8 bits
ORIENTATION = 274  # EXIF tag
_NO_DATA = 3.4e38  # just below the largest float32
# TIFF tags
_BITS, _LARGEST, _SMALLEST_OF_ANY_TYPE, _LARGEST_OF_ANY_TYPE = 258, 281, 340, 341


@dataclass(frozen=True)
class DeepImage:
    """An image file with deep values: `image`, opened by Pillow but not loaded, and its `source`."""

    image: Image.Image
    source: BinaryIO

    @property
    def is_gray(self) -> bool:
        return self.image.mode[0] in "IF"

    @property
    def has_fractions(self) -> bool:
        return self.image.mode == "F"

    @property
    def pillow_does_it(self) -> bool:
        """Whether Pillow converts it to 8 bits correctly, with white 65535: colours without a transparent one."""
        return not self.is_gray and "transparency" not in self.image.info

    @property
    def own_range(self) -> tuple[float, float] | None:
        """The values of black and white that the file declares, or None."""
        image = self.image
        if image.format == "PPM" and image.mode == "I":  # Pillow has scaled it by the file's largest value
            return ALL_OF_16
        if image.format != "TIFF":
            return None
        tags = image.tag_v2
        low, high = (_tag_number(tags.get(tag)) for tag in (_SMALLEST_OF_ANY_TYPE, _LARGEST_OF_ANY_TYPE))
        if self.has_fractions:
            return (low or 0, high) if high is not None and high > (low or 0) else None
        bits = _tag_number(tags.get(_BITS)) or 16
        if 8 < bits < 16:
            return 0, 2**bits - 1
        # many programs write the brightest value of this image alone there, which does not hold for the set
        largest = {2**bits - 1 for bits in range(9, 17)}
        return next(((0, value) for value in (_tag_number(tags.get(_LARGEST)), high) if value in largest), None)

    def range(self, bit_depth: int | None) -> tuple[float, float]:
        """The values of black and white: the file's own, else by `bit_depth`, else the full 16 bits.

        Raises:
            ValueError: The file holds fractions, and neither it nor `bit_depth` gives white.
        """
        if (own := self.own_range) is not None:
            return own
        if bit_depth is not None:
            return 0, 2**bit_depth - 1
        if self.has_fractions:
            raise ValueError("fractions without a known range; save it with 8 or 16 bits")
        return ALL_OF_16

    def values(self) -> np.ndarray:
        """(H, W) for gray, else (H, W, 3 or 4) with red, green, blue and opacity, as stored in the file.

        Raises:
            ValueError: They cannot be decoded.
            MissingExtraError: They are colours, and OpenCV is not installed.
        """
        if self.is_gray:
            self.image.load()  # this also turns a TIFF upright
            return without_no_data(np.asarray(self.image))
        require_module("cv2")
        import cv2  # here: all other images need only Pillow

        self.source.seek(0)
        content = self.source.read()
        if self.image.format == "TIFF":
            content = _as_upright(content)
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
        if pixels is None or pixels.ndim != 3 or pixels.dtype != np.uint16:
            raise ValueError("its colours of 16 bits cannot be decoded")
        return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB if pixels.shape[2] == 3 else cv2.COLOR_BGRA2RGBA)

    def to_rgb(self, bit_depth: int | None) -> np.ndarray:
        """(H, W, 3) uint8, upright, with transparent pixels over white.

        Raises:
            ValueError: As `range` and `values`.
        """
        low, high = self.range(bit_depth)
        orientation = None if self.is_gray else self.image.getexif().get(ORIENTATION)
        values = self.values()
        if self.is_gray:  # after loading, since Pillow then has turned a TIFF
            orientation = self.image.getexif().get(ORIENTATION)
        colours = values[..., None] if self.is_gray else values[..., :3]
        if not self.has_fractions:
            colours = colours.astype(np.int64)
        seen = (np.clip(colours, low, high) - low) * 255 // (high - low)
        pixels = np.broadcast_to(seen.astype(np.uint8), (*values.shape[:2], 3))
        opacity = self.opacity(values, high)
        if opacity is not None:
            pixels = np.dstack([pixels, opacity])
        image = Image.fromarray(np.ascontiguousarray(pixels))
        if opacity is not None:
            image = over_white(image)
        if orientation is not None:
            image.getexif()[ORIENTATION] = orientation
            ImageOps.exif_transpose(image, in_place=True)
        return np.array(image)

    def opacity(self, values: np.ndarray, high: float) -> np.ndarray | None:
        """(H, W) uint8, or None if all is opaque. `values` are the file's, with white at `high`."""
        transparent = self.image.info.get("transparency")
        if isinstance(transparent, int | tuple):
            is_seen = values != transparent if self.is_gray else (values[..., :3] != transparent).any(-1)
            return np.where(is_seen, 255, 0).astype(np.uint8)
        if self.is_gray or values.shape[2] == 3:
            return None
        opacity = values[..., 3].astype(np.int64)
        opaque = high if opacity.max(initial=0) <= high else ALL_OF_16[1]
        return (opacity * 255 // int(opaque)).astype(np.uint8)


def without_no_data(values: np.ndarray) -> np.ndarray:
    """The values with 0 for NaN, infinity, and the number near them by which programs for maps mark missing data."""
    if values.dtype.kind != "f":
        return values
    return np.where(np.abs(values.astype(np.float64)) < _NO_DATA, values, values.dtype.type(0))


def deep_image(image: Image.Image, source: BinaryIO) -> DeepImage | None:
    """The deep image of an opened but not loaded image; None with 8 bits or fewer."""
    is_deep = image.mode[0] in "IF" or (image.mode in ("RGB", "RGBA", "LA") and ";16" in raw_mode(image))
    return DeepImage(image, source) if is_deep else None


def raw_mode(image: Image.Image) -> str:
    """Pillow's name for the stored pixel format of an image that is not loaded; "" if unknown."""
    if not image.tile:
        return ""
    how = image.tile[0][3]
    first = how if isinstance(how, str) else how[0] if isinstance(how, tuple) and how else ""
    return first if isinstance(first, str) else ""


def to_rgb(image: Image.Image, stored: str) -> np.ndarray:
    """An image of at most 8 bits as (H, W, 3) uint8, with transparent pixels over white. `stored` is its raw mode."""
    if image.mode in _MODES_WITH_ALPHA or "transparency" in image.info:
        if stored in _SPREAD and isinstance(image.info.get("transparency"), int):
            # Pillow scales the levels to 8 bits, but not the transparent level
            image.info["transparency"] *= _SPREAD[stored]
        image = over_white(image.convert("RGBA"))
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def over_white(image: Image.Image) -> Image.Image:
    """Puts an image with opacity (RGBA) over white."""
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _as_upright(content: bytes) -> bytes:
    """A TIFF without the orientation of its first image, since versions of OpenCV turn some and fail with others."""
    order = "<" if content[:2] == b"II" else ">"
    (start,) = struct.unpack_from(f"{order}I", content, 4)
    (count,) = struct.unpack_from(f"{order}H", content, start)
    changed = bytearray(content)
    for place in range(start + 2, start + 2 + 12 * count, 12):
        if struct.unpack_from(f"{order}H", content, place) == (ORIENTATION,):
            struct.pack_into(f"{order}H", changed, place + 8, 1)
    return bytes(changed)


def _tag_number(value: object) -> float | None:
    """A tag's number; the first one if there is one per channel."""
    first = value[0] if isinstance(value, tuple) and value else value
    return float(first) if isinstance(first, int | float) or hasattr(first, "__float__") else None
