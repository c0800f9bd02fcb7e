"""Writes checkpoints, as .ckpt or .safetensors files."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vmoe.checkpoints.entry import ENTRY, MODEL_PREFIX, ModelFacts, entry_for
from vmoe.files import atomic_write


def write_content(path: str | Path, content: dict[str, Any]) -> None:
    """Writes a checkpoint's whole content (tensors and plain types) as one .ckpt file, atomically.

    Raises:
        UserError: It cannot be written; what was there before stays.
    """
    with atomic_write(path, replaces_folder=True) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)


def write_weights(
    path: str | Path, weights: dict[str, Tensor], facts: ModelFacts, epochs_done: int = 0, step: int = 0
) -> None:
    """Writes a model for every tool, atomically: as .safetensors, or for any other suffix as .ckpt.

    Args:
        path: The new file.
        weights: The model's state dict.
        facts: The model's facts.
        epochs_done: Number of trained epochs.
        step: Number of updates.

    Raises:
        UserError: It cannot be written; what was there before stays.
    """
    entry = entry_for(facts, epochs_done, step)
    if Path(path).suffix != ".safetensors":
        prefixed = {MODEL_PREFIX + name: value for name, value in weights.items()}
        write_content(path, {"state_dict": prefixed, ENTRY: entry, "global_step": step})
        return
    weights = {name: value.contiguous() for name, value in weights.items()}
    with atomic_write(path) as temporary:
        save_file(weights, temporary, metadata={"format": "pt", ENTRY: json.dumps(entry)})
