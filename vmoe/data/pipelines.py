"""A user's own augmentation pipelines, in albumentations' saved form of plain types, which a config can hold."""

import json
import os
from pathlib import Path
from typing import Any

import yaml

from vmoe.config_values import to_plain

_WRITTEN = "give a .yaml or .json file that albumentations' A.save wrote"


def read_pipeline(given: Any) -> dict[str, Any]:
    """A pipeline in the form of `A.to_dict`, in plain types.

    Args:
        given: Such a dict, its file, or an `A.Compose`.

    Raises:
        ValueError: It is none of these, or the pipeline has steps that cannot be saved.
    """
    if isinstance(given, str | os.PathLike):
        content = _read_content(Path(given).expanduser())
    elif isinstance(given, dict):
        content = given
    else:
        content = _in_memory(given)
    steps = content.get("transform") if isinstance(content, dict) else None
    if not isinstance(steps, dict) or "__class_fullname__" not in steps:
        what = given if isinstance(given, str | os.PathLike) else type(given).__name__
        raise ValueError(f"albumentations={str(what)!r}: holds no pipeline of albumentations; {_WRITTEN}")
    if unsaved := _unsaved(steps):
        raise ValueError(f"albumentations: its step {unsaved} cannot be saved, so no run could repeat it; leave it out")
    plain: dict[str, Any] = to_plain(content)
    return plain


def _read_content(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or f"is damaged or of another form: {type(error).__name__}"
        raise ValueError(f"albumentations={str(path)!r}: cannot be read ({reason}); {_WRITTEN}") from error


def _in_memory(pipeline: Any) -> Any:
    """The result of `A.to_dict` for a pipeline in memory."""
    try:
        import albumentations as A
    except ModuleNotFoundError:
        return None
    if not isinstance(pipeline, A.BaseCompose | A.BasicTransform):
        return None
    try:
        return A.to_dict(pipeline)
    except Exception as error:  # some steps cannot be described
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"albumentations: the pipeline cannot be saved, so no run could repeat it ({reason})"
        ) from error


def _unsaved(steps: dict[str, Any]) -> str | None:
    """The first step that runs a user's code, of which only the name was saved."""
    name = str(steps.get("__class_fullname__"))
    if name.rpartition(".")[2] == "Lambda":
        return name
    inside = steps.get("transforms", [])
    return next((found for step in inside if isinstance(step, dict) and (found := _unsaved(step))), None)
