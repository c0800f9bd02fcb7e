"""The description of `vmoe serve` at /openapi.json, which /docs shows as a page."""

from typing import Any

from vmoe.data.image_files import FORMATS
from vmoe.sizes import ImageSize, size_text
from vmoe.text import counted
from vmoe.version import __version__

_STATUS = {
    "400": "A malformed request.",
    "401": "No key in the header X-API-Key, or a wrong one.",
    "413": "More bytes or pixels than the server takes.",
    "415": "No image of a known format, or another content type.",
    "422": "A damaged image.",
    "503": "Too many connections at a time.",
}
_FAILED = {"type": "object", "required": ["detail"], "properties": {"detail": {"type": "string"}}}
_OPTIONS = {
    "top": {"type": "integer", "minimum": 1, "default": 5, "description": "How many classes to name."},
    "routing": {
        "type": "boolean",
        "default": False,
        "description": "Tell which experts the patches go to; not for dense models and programs.",
    },
}


_HOW_FITTED = {
    "centre": "its largest central part of the model's shape is resized to",
    "squash": "it is resized, whatever its shape, to",
    "letterbox": "it is resized to fit, between stripes of grey, into",
}


def describe_api(
    classes: list[str], image_size: ImageSize, crop: str, max_bytes: int, channels: int | None
) -> dict[str, Any]:
    """An OpenAPI document.

    Args:
        classes: The model's classes.
        image_size: Side of its images in pixels, or (height, width).
        crop: How pictures are fitted to that size.
        max_bytes: The most bytes of a request.
        channels: Number of channels of the pictures. None for RGB of 8 bits.
    """
    of_channels = "" if channels is None else f" and {counted(channels, 'channel')} at the depth of its file"
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "vmoe serve",
            "version": __version__,
            "description": f"Names which of {len(classes):,} classes a picture shows. It has any size"
            f"{of_channels}: "
            f"{_HOW_FITTED[crop]} {size_text(image_size)} pixels.",
        },
        "paths": {
            "/predict": {"post": _predict(classes, max_bytes, channels)},
            "/health": {
                "get": {
                    "summary": "Whether the model is ready",
                    "security": [],
                    "responses": {
                        "200": {"description": "Ready.", "content": {"text/plain": {"example": "ok"}}},
                        "503": {"description": "Not ready."},
                    },
                }
            },
            "/info": {
                "get": {
                    "summary": "The model's classes and image size, and the server's settings",
                    "responses": {"200": _json("Both.", {"type": "object"}), "401": _failure("401")},
                }
            },
        },
        "components": {"securitySchemes": {"key": {"type": "apiKey", "in": "header", "name": "X-API-Key"}}},
        "security": [{"key": []}, {}],  # the key is only required if the server has one
    }


def _predict(classes: list[str], max_bytes: int, channels: int | None) -> dict[str, Any]:
    formats = [*FORMATS, *([] if channels is None else ["npy"])]
    file = {"type": "string", "format": "binary", "description": f"One of {', '.join(formats)}."}
    text = {"type": "string", "description": "The file's bytes in base64, or a data URL of them."}
    return {
        "summary": "The most probable classes of a picture",
        "description": f"A request has at most {max_bytes:,} bytes.",
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {"schema": _fields(file)},
                "application/json": {"schema": _fields(text)},
            },
        },
        "responses": {
            "200": _json("The answer, best class first.", _answer(classes)),
            **{status: _failure(status) for status in _STATUS},
        },
    }


def _fields(image: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": ["image"], "properties": {"image": image, **_OPTIONS}}


def _answer(classes: list[str]) -> dict[str, Any]:
    whole = {"type": "array", "items": {"type": "integer"}}
    layer = {
        "grid": whole | {"description": "Rows and columns of patches."},
        "choice_share": {
            "type": "array",
            "items": {"type": "number"},
            "description": "Of each expert, among the choices of all patches.",
        },
        "first_choice": {"type": "array", "items": whole, "description": "Of each patch: the expert it goes to first."},
    }
    one = {"class": {"type": "string", "examples": classes[:3]}, "probability": {"type": "number"}}
    routing = {
        "type": "object",
        "description": "Only where it was asked for: of each MoE layer, by its name.",
        "additionalProperties": {"type": "object", "properties": layer},
    }
    labels = {
        "type": "array",
        "items": {"type": "string"},
        "description": "Only of a model for several classes per picture: those that reach their threshold.",
    }
    predictions = {"type": "array", "items": {"type": "object", "required": [*one], "properties": one}}
    return {
        "type": "object",
        "required": ["predictions"],
        "properties": {"predictions": predictions, "labels": labels, "routing": routing},
    }


def _json(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _failure(status: str) -> dict[str, Any]:
    return _json(_STATUS[status], _FAILED)
