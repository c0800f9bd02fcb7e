"""Writes trained weights as one file to share."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmoe.checkpoints.entry import ENTRY, check_entry, facts_of
from vmoe.checkpoints.loading import SCALE, find_checkpoint, read_checkpoint, trained_weights
from vmoe.checkpoints.writing import write_weights
from vmoe.errors import UserError
from vmoe.moe.int8 import quantise

_EXPERT_WEIGHT = re.compile(r"\.experts\.fc[12]\.weight$")


def write_safetensors(
    path: str | Path, source: str | Path, dtype: torch.dtype | None = None, int8: bool = False
) -> None:
    """Writes a checkpoint's trained weights and facts as one safetensors file, atomically.

    Paths of the training machine are left out. Every tool opens the result like a checkpoint.

    Args:
        path: The new file.
        source: A checkpoint file or a run's folder.
        dtype: Stored type of the weights; None keeps theirs. Opening the file converts them to float32.
        int8: Whether to store the experts' weights as integers (`vmoe.moe.int8`), with the routers' in float32.

    Raises:
        UserError: The source is no checkpoint of ours, or a dense one with `int8`, or `path` cannot be written.
    """
    content = _checked_content(source)
    weights, trained = {}, trained_weights(content)
    if int8:
        require_rounding(source, any(map(_EXPERT_WEIGHT.search, trained)))
    for name, value in trained.items():
        if int8 and _EXPERT_WEIGHT.search(name):
            weights[name], weights[name + SCALE] = quantise(value)
        elif dtype is None or not value.is_floating_point() or (int8 and ".router." in name):
            weights[name] = value
        else:
            weights[name] = value.to(dtype)
    _write_shared(path, weights, content)


def write_changed(path: str | Path, source: str | Path, weights: dict[str, Tensor], moe: dict[str, Any] | None) -> None:
    """Writes a model of other experts with its checkpoint's facts, as `write_safetensors` does.

    Args:
        path: The new file.
        source: The original checkpoint: a file or a run's folder.
        weights: The changed model's state dict.
        moe: Its MoE layers as a config's plain types; None for a dense model.

    Raises:
        UserError: As `write_safetensors`.
    """
    content = _checked_content(source)
    loss = without_guidance(facts_of(content).config).get("loss")
    _write_shared(path, weights, content, {"moe": moe} | ({} if loss is None else {"loss": loss}))


def require_rounding(path: object, has_experts: bool) -> None:
    """Refuses to round the experts of a dense model.

    Raises:
        UserError: The model has no experts.
    """
    if not has_experts:
        raise UserError(f"--quantize int8: {path}: a dense model has no experts to round; leave the option out")


def shared_config(config: dict[str, Any]) -> dict[str, Any]:
    """A run's config without paths of the training machine."""
    kept = {key: value for key, value in config.items() if key != "distill"}  # its teacher is a path
    if "data" in config:
        kept["data"] = {key: value for key, value in config["data"].items() if key != "root"}
    return kept | {"output_dir": None, "init_from": None}


def without_guidance(config: dict[str, Any]) -> dict[str, Any]:
    """A run's config for other experts: super-classes are for as many as there were."""
    if not config.get("loss"):
        return dict(config)
    kept = {key: value for key, value in config["loss"].items() if key not in ("super_classes", "guidance_weight")}
    return config | {"loss": kept}


def _checked_content(source: str | Path) -> dict[str, Any]:
    path = find_checkpoint(source)
    content = read_checkpoint(path)
    check_entry(content, path)
    return content


def _write_shared(
    path: str | Path, weights: dict[str, Tensor], content: dict[str, Any], changes: dict[str, Any] | None = None
) -> None:
    """Writes weights with the facts of a checkpoint, without paths of the training machine.

    Args:
        path: The new file.
        weights: The model's state dict.
        content: The checkpoint.
        changes: New sections of its config for changed weights. These lose the calibration.
    """
    facts = facts_of(content).by_architecture()
    if changes is not None:
        facts = replace(facts, calibration=None)
    facts = replace(facts, config=shared_config(facts.config) | (changes or {}))
    write_weights(path, weights, facts, content[ENTRY]["epochs_done"], content["global_step"])
