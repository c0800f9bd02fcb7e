"""Weights of the original Vision Transformers and MLP-Mixers: .npz files of Flax parameters, such as AugReg's."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn


def load_npz_weights(model: nn.Module, path: Path) -> bool:
    """Fills a dense model of timm, in place, with the weights of an .npz file. timm's own code of the model reads it.

    timm resamples the position embeddings and the patch embedding where the model has other sizes.

    Returns:
        Whether the classifier is the file's; it stays as it is where the file has another number of classes.

    Raises:
        ValueError: timm has no code that reads such files for this model, or the file does not fit it.
    """
    timm_model: Any = model
    if not hasattr(model, "load_pretrained"):
        raise ValueError(f"timm reads no .npz file for a {type(model).__name__}; Vision Transformers take them")
    _check_depth(timm_model, path)
    head = timm_model.get_classifier()
    before = [value.clone() for value in head.parameters()]
    try:
        timm_model.load_pretrained(str(path))
    except Exception as error:  # a file of something else fails in any way it can
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"its weights do not fit the model ({reason})") from error
    return any(not torch.equal(old, new) for old, new in zip(before, head.parameters(), strict=True))


def _check_depth(model: Any, path: Path) -> None:
    """Compares the numbers of blocks: timm would pass over the file's further ones in silence."""
    try:
        with np.load(path) as arrays:
            names = list(arrays)
            stacked = [arrays[name].shape[0] for name in names if "/encoderblock/LayerNorm_0/scale" in name]
    except Exception as error:  # NumPy raises any type for a damaged file
        raise ValueError("is no .npz file, or is cut short") from error
    blocks = {found.group(1) for name in names if (found := re.search(r"(?:encoderblock|MixerBlock)_(\d+)/", name))}
    depth = max([len(blocks), *stacked])
    if depth != len(model.blocks):
        raise ValueError(f"has {depth} blocks, and the model has {len(model.blocks)}")
