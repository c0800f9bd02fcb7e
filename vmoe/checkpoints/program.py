"""What an exported program, such as an ONNX file, tells of its model in its metadata, as JSON."""

import json
from pathlib import Path
from typing import Any

from vmoe.checkpoints.entry import ModelFacts
from vmoe.errors import UserError

METADATA = "vmoe"  # the key of the metadata
_VERSION = 1  # raised when an older version of this package could not use what a newer one writes


def program_metadata(facts: ModelFacts) -> dict[str, Any]:
    """What a program's user must know: how images are prepared and what the logits mean."""
    return {
        "version": _VERSION,
        "model": facts.config["model"]["name"],
        "class_names": list(facts.class_names),
        "image_size": facts.image_size,
        "mean": list(facts.mean),
        "std": list(facts.std),
        "bit_depth": facts.bit_depth,
        "preprocessing": "central square of the RGB image, resized to image_size; (pixel / 255 - mean) / std",
    }


def facts_of_program(text: str, path: Path) -> ModelFacts:
    """The facts that a program's metadata hold; their `config` is empty.

    Args:
        text: The metadata.
        path: The program, for messages.

    Raises:
        UserError: they are damaged or of a newer version.
    """
    try:
        content = json.loads(text)
        version = int(content["version"])
        facts = ModelFacts(
            config={},
            class_names=[str(name) for name in content["class_names"]],
            image_size=int(content["image_size"]),
            mean=tuple(content["mean"]),
            std=tuple(content["std"]),
            bit_depth=content.get("bit_depth"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its metadata is damaged; write it again by `vmoe export --format onnx`") from error
    if version > _VERSION:
        raise UserError(f"{path}: written by a newer vmoe, in format {version}; this one knows {_VERSION}: update it")
    return facts
