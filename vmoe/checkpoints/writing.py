"""Writing a checkpoint: what is ours in it, and its two kinds of file."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vmoe.checkpoints.entry import ENTRY, FORMAT_VERSION, MODEL_PREFIX
from vmoe.files import atomic_write


def new_entry(**facts: Any) -> dict[str, Any]:
    """What is ours in a checkpoint that is written now: the format's version, and `facts` of plain types."""
    return {"version": FORMAT_VERSION, **facts}


def write_content(path: str | Path, content: dict[str, Any]) -> None:
    """Writes the whole content of a checkpoint, of tensors and plain types, as one .ckpt file, atomically.

    Raises:
        UserError: it cannot be written; what was there before stays.
    """
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)


def write_weights(path: str | Path, weights: dict[str, Tensor], entry: dict[str, Any]) -> None:
    """Writes a model that every tool opens, atomically: a .safetensors file, or with any other suffix a .ckpt file.

    Args:
        path: Where the file goes.
        weights: The model's state dict.
        entry: Made by `new_entry`.

    Raises:
        UserError: it cannot be written; what was there before stays.
    """
    if Path(path).suffix != ".safetensors":
        prefixed = {MODEL_PREFIX + name: value for name, value in weights.items()}
        write_content(path, {"state_dict": prefixed, ENTRY: entry, "global_step": entry.get("step", 0)})
        return
    weights = {name: value.contiguous() for name, value in weights.items()}
    with atomic_write(path) as temporary:
        save_file(weights, temporary, metadata={"format": "pt", ENTRY: json.dumps(entry)})
