"""Reads and checks requests to `vmoe serve`: an image as a form's file or in JSON, with options."""

import base64
import json
from dataclasses import dataclass
from io import BytesIO
from typing import Any
from urllib.parse import unquote

import numpy as np
from anyio import CapacityLimiter, to_thread
from fastapi import HTTPException, Request
from PIL import Image
from starlette.datastructures import UploadFile

from vmoe.data.bit_depth import depth_of_content
from vmoe.data.channels import count_values
from vmoe.data.config import Crop
from vmoe.data.image_files import FORMATS
from vmoe.data.images import decode_image, eval_crop
from vmoe.errors import UserError
from vmoe.sizes import ImageSize

MAX_PIXELS = 64_000_000  # about 1 GiB while it is decoded and converted to RGB
_DECODERS = 4  # images decoded at a time
_LARGE = 16_000_000  # pixels; only one image larger than this is decoded at a time
_BYTES = 4  # of a value of an image with other channels than RGB
_TRUTH = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True)
class Upload:
    """A checked request.

    Attributes:
        pixels: (height, width, 3) uint8, the image prepared for the model. If the model has channels, (height, width,
            channels) float32 with white at 1.
        top: Number of classes to return.
        routing: Whether to return the experts of the patches.
    """

    pixels: np.ndarray
    top: int
    routing: bool


class UploadReader:
    """Reads requests. A bad one gets a status and a line here and never reaches the model.

    Args:
        image_size: Side of the model's input in pixels, or (height, width).
        crop: How pictures are fitted to that size, as in `eval_crop`.
        classes: The model's number of classes.
        bit_depth: Bit depth of images with more than 8 bits per channel that do not declare it, as in `load_image`.
            None measures it on each such image.
        why_no_routing: The refusal of requests for routing; None if the model can report its routing.
        channels: Number of channels of the images, as in `load_image`.
    """

    def __init__(
        self,
        image_size: ImageSize,
        crop: Crop,
        classes: int,
        bit_depth: int | None,
        why_no_routing: str | None,
        channels: int | None = None,
    ) -> None:
        self.image_size, self.crop, self.classes, self.why_no_routing = image_size, crop, classes, why_no_routing
        self.bit_depth, self.channels = bit_depth, channels
        self._decoders, self._large_decoder = CapacityLimiter(_DECODERS), CapacityLimiter(1)

    async def __call__(self, request: Request) -> Upload:
        """Reads one request.

        Raises:
            HTTPException: 400 for a malformed request, 413 for an image with too many pixels, 415 for a file of none of
                `FORMATS`, 422 for a damaged image.
        """
        fields, content = await _read(request)
        top, routing = self._top(fields.get("top", 5)), self._routing(fields.get("routing", False))
        count = await to_thread.run_sync(_count_pixels, content, self.channels, limiter=self._decoders)
        decoder = self._large_decoder if count > _LARGE else self._decoders
        return Upload(await to_thread.run_sync(self._decode, content, limiter=decoder), top, routing)

    def _decode(self, content: bytes) -> np.ndarray:
        bit_depth = self.bit_depth
        if bit_depth is None:  # as `vmoe predict` does for a model without a bit depth
            bit_depth = depth_of_content(BytesIO(content), self.channels)
        try:
            image = decode_image(BytesIO(content), "image", tuple(FORMATS), bit_depth, self.channels)
            return np.ascontiguousarray(eval_crop(image, self.image_size, self.crop))
        except UserError as error:
            raise HTTPException(422, str(error)) from error

    def _top(self, value: Any) -> int:
        text = str(value)
        if isinstance(value, bool) or not (text.isdecimal() and len(text) < 9 and int(text) > 0):
            raise HTTPException(400, f"top={text[:20]!r}: must be a whole number above 0")
        return min(int(text), self.classes)

    def _routing(self, value: Any) -> bool:
        wanted = _TRUTH.get(str(value).lower())
        if wanted is None:
            raise HTTPException(400, f"routing={str(value)[:20]!r}: must be true or false")
        if wanted and self.why_no_routing is not None:
            raise HTTPException(400, f"routing: {self.why_no_routing}")
        return wanted


def _count_pixels(content: bytes, channels: int | None) -> int:
    """The number of pixels in an image's header. Nothing else of the file is read.

    With `channels` it is the number of RGB pixels that take the same memory.

    Raises:
        HTTPException: There are too many, or the file has none of `FORMATS`.
    """
    try:
        if channels is None:
            with Image.open(BytesIO(content), formats=tuple(FORMATS)) as image:
                count = image.width * image.height
        else:
            count = count_values(BytesIO(content), channels, tuple(FORMATS)) * _BYTES // 3
    except Image.DecompressionBombError:
        count = MAX_PIXELS + 1
    except Image.UnidentifiedImageError as error:
        known = [*FORMATS, *([] if channels is None else ["npy"])]
        raise HTTPException(415, f"image: no image of a known format; send one of {', '.join(known)}") from error
    except Exception as error:  # for damaged files Pillow's decoders raise nearly any type
        raise HTTPException(422, "image: its header is damaged; send it again") from error
    if count > MAX_PIXELS:
        raise HTTPException(413, f"image: too many pixels; send at most {MAX_PIXELS:,}")
    return count


async def read_upload(request: Request) -> Upload:
    """Reads a request with the app's `UploadReader`; FastAPI calls it as a dependency."""
    return await request.app.state.uploads(request)


async def _read(request: Request) -> tuple[dict[str, Any], bytes]:
    """The fields of a request, and the content of its image."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        async with request.form(max_files=1, max_fields=8) as form:
            image = form.get("image")
            if not isinstance(image, UploadFile):
                raise HTTPException(400, "image: missing; send the file as the form's field `image`")
            return dict(form), await image.read()
    if kind != "application/json":
        raise HTTPException(415, f"Content-Type {kind[:40]!r}: must be multipart/form-data or application/json")
    try:
        fields = json.loads(await request.body())
        return fields, _decoded(fields["image"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        line = 'the body must be JSON such as {"image": "its bytes in base64, or a data URL of them"}'
        raise HTTPException(400, line) from error


def _decoded(text: str) -> bytes:
    """The bytes of an image in base64, alone or in a data URL, as browsers make them: data:image/png;base64,..."""
    head, found, rest = text.partition(",")
    if found and head.lower().startswith("data:"):
        if not head.lower().endswith(";base64"):
            raise ValueError("a data URL of text")
        text = unquote(rest)
    return base64.b64decode(text, validate=True)
