"""Models that a folder or a hub describes, local-dir:DIR and hf-hub:OWNER/NAME, by names that timm registers."""

import json
from pathlib import Path
from typing import Any

import timm
from timm.models import load_model_config_from_hf

from vmoe.errors import UserError
from vmoe.models.registry import ON_BACKBONE

_HUB, _FOLDER, _TIMM = "hf-hub:", "local-dir:", "timm/"
# What the data and `moe` say of a run's model
_OTHERS = ("num_classes", "img_size", "in_chans", "moe")


def with_source(name: str) -> str:
    """A model's name as timm takes it: timm/NAME is NAME, or that repository of the hub where timm does not know it."""
    if not name.startswith(_TIMM):
        return name
    own = name.removeprefix(_TIMM)
    return own if timm.is_model(own) else _HUB + name


def architecture_of(name: str, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The registered name and the arguments of a model, by which it is built without the folder or the hub.

    Args:
        name: As `model.name` has it.
        kwargs: As `model.kwargs` has them, which come before the source's.

    Raises:
        UserError: the source cannot be read, or describes no model of timm.
    """
    name = with_source(name)
    if name.startswith(_HUB):
        try:
            _, architecture, found = load_model_config_from_hf(name.removeprefix(_HUB))
        except Exception as error:  # the hub's client raises any type
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
    else:
        return name, kwargs
    if architecture == ON_BACKBONE:
        architecture = found.get("backbone")
        found = {key: value for key, value in found.items() if key != "backbone"}
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise UserError(f"model.name={name}: describes the model {architecture!r}, which timm does not know")
    return architecture, {key: value for key, value in found.items() if key not in _OTHERS} | kwargs
