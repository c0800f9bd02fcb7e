"""Reads one image from a file, fits it to the image size as in evaluation, and normalises it to a tensor."""

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from vmoe.data.channels import Stored, WrongChannelsError, is_tiff, of_array, of_image, stored_in
from vmoe.data.config import Crop
from vmoe.data.deep_images import ALL_OF_16, deep_image, raw_mode, to_rgb
from vmoe.data.image_files import require_regular
from vmoe.data.resizing import resize
from vmoe.errors import UserError
from vmoe.extras import MissingExtraError
from vmoe.sizes import ImageSize, height_and_width

if TYPE_CHECKING:  # the process of `vmoe serve` that decodes uploads works without torch
    import torch

_BESIDE = 127  # level beside the picture in a letterbox


def load_image(path: str | Path, bit_depth: int | None = None, channels: int | None = None) -> np.ndarray:
    """Reads an image file as RGB of 8 bits, or with its channels at its own depth; upright by its EXIF orientation.

    It accepts any mode of Pillow: grayscale, palette, CMYK, more than 8 bits (scaled to 8). Transparent pixels are
    shown over white. An animation gives its first frame.

    Args:
        path: The path of the file.
        bit_depth: Number of bits in files with more than 8 bits per channel that do not declare it: white is
            2**bit_depth - 1. None takes all stored bits.
        channels: As `data.channels`; None for RGB of 8 bits.

    Returns:
        (H, W, 3) uint8 array with its own memory; with `channels` (H, W, channels) float32, with white at 1.

    Raises:
        UserError: The file is missing, damaged, no image or no regular file, has another number of channels, or holds
            fractions and neither it nor `bit_depth` gives white. The message names the file.
    """
    require_regular(path)
    try:
        # not opened by Pillow: it would map the file, and then turn an uncompressed gray TIFF wrongly
        with open(path, "rb") as file:
            return decode_image(file, str(path), bit_depth=bit_depth, channels=channels)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such image file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); replace or remove the file") from error


def decode_image(
    source: BinaryIO,
    place: str,
    formats: Sequence[str] | None = None,
    bit_depth: int | None = None,
    channels: int | None = None,
) -> np.ndarray:
    """Like `load_image`, for a file's content in one of Pillow's `formats` (or any). `place` names it in errors."""
    try:
        if channels is not None:
            return stored_in(source, channels, formats).fractions(channels, bit_depth)
        with Image.open(source, formats=formats) as image:
            deep = deep_image(image, source)
            if deep is not None and not (deep.pillow_does_it and deep.range(bit_depth) == ALL_OF_16):
                return deep.to_rgb(bit_depth)
            stored = raw_mode(image)
            ImageOps.exif_transpose(image, in_place=True)  # a copy would double the memory
            return to_rgb(image, stored)
    except MissingExtraError as error:
        raise MissingExtraError(f"{place}: {error}") from error
    except WrongChannelsError as error:
        raise UserError(f"{place}: {error}") from error
    except Exception as error:  # on damaged files Pillow's decoders raise nearly any type
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "no known image format"
            if is_tiff(source) and channels is None:
                reason = "no known form of TIFF; one of other channels than gray and RGB needs data.channels"
        raise UserError(f"{place}: cannot be read as an image ({reason}); replace or remove the file") from error


def to_pixels(
    picture: "str | Path | Image.Image | np.ndarray", bit_depth: int | None = None, channels: int | None = None
) -> np.ndarray:
    """Converts a picture of any kind to RGB, or keeps its channels.

    Args:
        picture: The path of an image file, as `load_image` reads it; an image of Pillow, of any mode; or an array
            (height, width, 3), or (height, width) for gray, uint8; with `channels` (height, width, channels) or
            (channels, height, width) of any number type.
        bit_depth: As for `load_image`; with `channels` also for arrays.
        channels: As for `load_image`.

    Returns:
        (height, width, 3) uint8; with `channels` (height, width, channels) float32, with white at 1.

    Raises:
        UserError: The picture has another type, or it cannot be read.
    """
    if isinstance(picture, Image.Image):
        if picture.mode[0] in "IF":  # more than 8 bits: converted as from a file
            content = io.BytesIO()
            picture.save(content, "TIFF")
            return decode_image(content, "this image", bit_depth=bit_depth, channels=channels)
        upright = ImageOps.exif_transpose(picture)
        if channels is None:
            return to_rgb(upright, "")
        return _by_channels(lambda: of_image(upright, channels), channels, bit_depth)
    if isinstance(picture, np.ndarray):
        if channels is not None:
            return _by_channels(lambda: of_array(picture, channels), channels, bit_depth)
        is_gray = picture.ndim == 2
        if picture.dtype != np.uint8 or not (is_gray or (picture.ndim == 3 and picture.shape[2] == 3)):
            raise UserError(
                f"an array of {picture.dtype} of shape {picture.shape}: must be uint8 of (height, width, 3), or of "
                "(height, width) for gray"
            )
        if 0 in picture.shape:
            raise UserError(f"an array of shape {picture.shape}: holds no pixel")
        return np.repeat(picture[..., None], 3, 2) if is_gray else picture
    if isinstance(picture, str | os.PathLike):
        return load_image(picture, bit_depth, channels)
    raise UserError(
        f"{type(picture).__name__}: is no picture; give a path, an image of Pillow or an array (height, width, 3) uint8"
    )


def _by_channels(read: Callable[[], Stored], channels: int, bit_depth: int | None) -> np.ndarray:
    try:
        return read().fractions(channels, bit_depth)
    except ValueError as error:
        raise UserError(f"this picture: {error}") from error


def prepare_image(
    picture: "str | Path | Image.Image | np.ndarray",
    image_size: ImageSize,
    mean: Sequence[float],
    std: Sequence[float],
    bit_depth: int | None = None,
    crop: Crop = "centre",
    channels: int | None = None,
) -> "torch.Tensor":
    """Prepares a picture for a model, as evaluation, `predict` and all tools do.

    The picture becomes upright RGB. It is fitted to the image size by `crop` (area averages down, bilinear up). Each
    channel is normalised: (pixel / 255 - mean) / std. With `channels` it keeps its channels and its depth, and values
    are divided by white instead of 255.

    Args:
        picture: The path of an image file, an image of Pillow, or an array (height, width, 3), or (height, width) for
            gray, uint8; with `channels` (height, width, channels) or (channels, height, width) of any number type.
        image_size: Side of the square in pixels, or (height, width), such as `model.image_size`.
        mean: Mean of the channels, in [0, 1], such as `model.mean`.
        std: Standard deviation of the channels, in [0, 1], such as `model.std`.
        bit_depth: Number of bits in pictures with more than 8 bits per channel, if the file does not declare it: white
            is 2**bit_depth - 1. None takes all stored bits.
        crop: How it is fitted, such as `model.crop`; see `eval_crop`.
        channels: Such as `model.channels`; None for RGB of 8 bits.

    Returns:
        (3, height, width) float32, or (channels, height, width).

    Raises:
        UserError: The picture is of no such kind, or it cannot be read.
    """
    return normalise([eval_crop(to_pixels(picture, bit_depth, channels), image_size, crop)], mean, std)[0]


def eval_crop(image: np.ndarray, image_size: ImageSize, crop: Crop = "centre") -> np.ndarray:
    """Fits a picture to the image size, as in evaluation.

    "centre" equals resizing the picture to cover the image size and cropping the centre, but without a large
    intermediate image.

    Args:
        image: (H, W, C) uint8 or float32.
        image_size: Side of the result in pixels, or (height, width).
        crop: "centre" cuts out the largest central part of the result's shape, "squash" changes the picture's shape,
            and "letterbox" keeps the whole picture between stripes of middle grey.

    Returns:
        (height, width, C) of the same type; `image` itself if it has that size.
    """
    height, width = height_and_width(image_size)
    rows, columns = image.shape[:2]
    if crop == "squash":
        return resize(image, height, width)
    if crop == "letterbox":
        return _letterbox(image, height, width)
    cut_rows = min(rows, max(1, columns * height // width))
    cut_columns = min(columns, max(1, rows * width // height))
    top, left = (rows - cut_rows) // 2, (columns - cut_columns) // 2
    return resize(image[top : top + cut_rows, left : left + cut_columns], height, width)


def _letterbox(image: np.ndarray, height: int, width: int) -> np.ndarray:
    scale = min(height / image.shape[0], width / image.shape[1])
    rows, columns = (max(1, round(side * scale)) for side in image.shape[:2])
    if (rows, columns) == (height, width):
        return resize(image, height, width)
    beside = _BESIDE if image.dtype == np.uint8 else _BESIDE / 255
    frame = np.full((height, width, image.shape[2]), beside, image.dtype)
    top, left = (height - rows) // 2, (width - columns) // 2
    frame[top : top + rows, left : left + columns] = resize(image, rows, columns)
    return frame


def normalise(images: Sequence[np.ndarray], mean: Sequence[float], std: Sequence[float]) -> "torch.Tensor":
    """Stacks images and normalises them by channel: (pixel / 255 - mean) / std.

    Args:
        images: B arrays (H, W, C) of one size, uint8, or float32 with white at 1.
        mean: Mean of the channels, in [0, 1].
        std: Standard deviation of the channels, in [0, 1].

    Returns:
        (B, C, H, W) float32, contiguous. A value does not depend on the other images of the batch.
    """
    import torch

    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    batch = torch.empty(pixels.shape, dtype=torch.float32).copy_(pixels)
    white = 255 if pixels.dtype == torch.uint8 else 1
    batch.sub_(white * torch.tensor(mean).view(-1, 1, 1))
    return batch.div_(white * torch.tensor(std).view(-1, 1, 1))


def eval_transform(
    image_size: ImageSize, mean: Sequence[float], std: Sequence[float], crop: Crop = "centre"
) -> "Callable[[np.ndarray], torch.Tensor]":
    """The preparation of an image in evaluation: `eval_crop`, then `normalise`.

    Returns:
        A function from (H, W, C) uint8 or float32 to (C, height, width) float32.
    """

    def transform(image: np.ndarray) -> "torch.Tensor":
        return normalise([eval_crop(image, image_size, crop)], mean, std)[0]

    return transform
