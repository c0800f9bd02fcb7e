"""The metadata of an exported program, such as an ONNX file: the model's facts as JSON."""

import json
from pathlib import Path
from typing import Any

from vmoe.checkpoints.calibration import is_calibration
from vmoe.checkpoints.entry import ModelFacts
from vmoe.errors import UserError
from vmoe.sizes import ImageSize, as_size

METADATA = "vmoe"  # the key of the metadata
_VERSION = 2  # raised when older versions of this package cannot use what a newer one writes
_CROPS = {
    "centre": "the largest central part of the RGB image of the shape of image_size, resized to it",
    "squash": "the RGB image, resized to image_size whatever its shape",
    "letterbox": "the RGB image, resized to fit into image_size, between stripes of grey (127)",
}


def program_metadata(facts: ModelFacts) -> dict[str, Any]:
    """The metadata that a program's user needs: the preparation of images and the meaning of logits."""
    return {
        "version": 1 if facts.is_plain else _VERSION,
        "model": facts.config["model"]["name"],
        "class_names": list(facts.class_names),
        "image_size": facts.image_size if isinstance(facts.image_size, int) else list(facts.image_size),
        "crop": facts.crop,
        "mean": list(facts.mean),
        "std": list(facts.std),
        "bit_depth": facts.bit_depth,
        **({} if facts.calibration is None else {"calibration": facts.calibration}),
        "preprocessing": _preprocessing(facts),
        **({} if facts.channels is None else {"channels": facts.channels}),
        **({"multi_label": True, "thresholds": facts.thresholds} if facts.multi_label else {}),
    }


def _preprocessing(facts: ModelFacts) -> str:
    if facts.channels is None:
        return f"{_CROPS[facts.crop]}; (pixel / 255 - mean) / std"
    fitted = _CROPS[facts.crop].replace("RGB image", f"image of {facts.channels} channels")
    white = "255 for images of 8 bits, else 2**bit_depth - 1, where bit_depth is null 65535, or 1 for fractions"
    return f"{fitted}; (value / white - mean) / std, where white is {white}"


def _size_in(value: Any) -> ImageSize:
    if isinstance(value, list):
        height, width = value
        return as_size(int(height), int(width))
    return int(value)


def _crop(value: Any) -> str:
    if value not in _CROPS:
        raise ValueError(f"crop={value!r}")
    return str(value)


def _calibration(value: Any) -> dict[str, Any] | None:
    if not is_calibration(value):
        raise ValueError("calibration")
    return value


def facts_of_program(text: str, path: Path) -> ModelFacts:
    """The facts in a program's metadata. Their `config` is empty.

    Args:
        text: The metadata.
        path: The program, for messages.

    Raises:
        UserError: They are damaged or of a newer version.
    """
    try:
        content = json.loads(text)
        version = int(content["version"])
        facts = ModelFacts(
            config={},
            class_names=[str(name) for name in content["class_names"]],
            image_size=_size_in(content["image_size"]),
            mean=tuple(content["mean"]),
            std=tuple(content["std"]),
            bit_depth=content.get("bit_depth"),
            crop=_crop(content.get("crop", "centre")),
            multi_label=bool(content.get("multi_label", False)),
            thresholds=content.get("thresholds"),
            calibration=_calibration(content.get("calibration")),
            channels=None if content.get("channels") is None else int(content["channels"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its metadata is damaged; write it again by `vmoe export --format onnx`") from error
    if version > _VERSION:
        raise UserError(f"{path}: written by a newer vmoe, in format {version}; this one knows {_VERSION}: update it")
    return facts
