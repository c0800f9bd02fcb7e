"""Resolves models of a folder, a hub or a publisher, such as hf-hub:OWNER/NAME, to names that timm registers."""

import json
from pathlib import Path
from typing import Any

import timm
from timm.models import load_model_config_from_hf

from vmoe.errors import UserError
from vmoe.models.registry import ON_BACKBONE
from vmoe.models.released import RELEASED, full_name, is_released

_HUB, _FOLDER, _TIMM = "hf-hub:", "local-dir:", "timm/"
# Arguments that the data and `moe` decide
_OTHERS = ("num_classes", "img_size", "in_chans", "moe")


def with_source(name: str) -> str:
    """A model's name for timm. timm/NAME becomes NAME, or that hub repository if timm does not know NAME."""
    if not name.startswith(_TIMM):
        return name
    own = name.removeprefix(_TIMM)
    return own if timm.is_model(own) else _HUB + name


def architecture_of(name: str, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The registered name and the arguments of a model, to build it without the folder or the hub.

    Args:
        name: The value of `model.name`.
        kwargs: The value of `model.kwargs`. They override the source's.

    Raises:
        UserError: The source cannot be read, or describes no model of timm.
    """
    name = with_source(name)
    if name.startswith(_HUB):
        try:
            _, architecture, found = load_model_config_from_hf(name.removeprefix(_HUB))
        except Exception as error:  # the hub's client may raise any type
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"model.name={name}: its config.json cannot be fetched ({reason})") from error
    elif name.startswith(_FOLDER):
        path = Path(name.removeprefix(_FOLDER)).expanduser() / "config.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            architecture, found = content["architecture"], content.get("model_args") or {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"model.name={name}: {path} is not there or describes no model of timm; give the folder of one"
            ) from error
    elif is_released(name):  # whose table may be another in another version of this package
        backbone, arguments = RELEASED[full_name(name)].backbone
        return backbone, arguments | kwargs
    else:
        return name, kwargs
    if architecture == ON_BACKBONE:
        architecture = found.get("backbone")
        found = {key: value for key, value in found.items() if key != "backbone"}
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise UserError(f"model.name={name}: describes the model {architecture!r}, which timm does not know")
    return architecture, {key: value for key, value in found.items() if key not in _OTHERS} | kwargs
