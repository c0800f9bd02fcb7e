"""Reads files of weights that others wrote, such as timm's trainer or its hub."""

import argparse
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from vmoe.checkpoints.entry import ENTRY, MODEL_PREFIX

_WRAPPERS = ("module.", "_orig_mod.", MODEL_PREFIX)  # of DataParallel, torch.compile, Lightning


def read_foreign_weights(path: str | Path) -> dict[str, Tensor] | None:
    """The weights of a file that timm or another library wrote: .pth, .pth.tar, .safetensors, ...

    If the file has an average of the weights (EMA), it returns the average. It removes the name prefixes of wrappers.

    Returns:
        A state dict; None if the path is no such file, or a file of this package.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        return None
    content = _foreign_content(path)
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content:
        return None
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        return None
    while prefix := next((each for each in _WRAPPERS if all(name.startswith(each) for name in content)), None):
        content = {name.removeprefix(prefix): value for name, value in content.items()}
    return content


def _foreign_content(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                is_ours = ENTRY in (file.metadata() or {})
            return None if is_ours else load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's trainer stores its options so
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        return None if isinstance(content, dict) and ENTRY in content else content
    except Exception:  # a damaged file may raise any type; reading it as ours will report it
        return None
