"""Loads weights of the original Vision Transformers and MLP-Mixers: .npz files of Flax parameters, such as AugReg's."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

_ADVICE = "give the model.name that its weights are for"


def load_npz_weights(model: nn.Module, path: Path) -> bool:
    """Loads the weights of an .npz file into a dense timm model, in place, with timm's own code.

    timm resamples the position embeddings and the patch embedding if the model has other sizes.

    Returns:
        Whether the classifier was loaded. It is not if the file has another number of classes.

    Raises:
        ValueError: timm has no code that reads such files for this model, or the file does not fit it.
    """
    timm_model: Any = model
    if not (hasattr(model, "load_pretrained") and hasattr(model, "blocks")):  # BiT's ResNets have no blocks
        raise ValueError(
            f"timm takes .npz files for Vision Transformers and MLP-Mixers, not for a {type(model).__name__}; {_ADVICE}"
        )
    _check_depth(timm_model, path)
    head = timm_model.get_classifier()
    before = [value.clone() for value in head.parameters()]
    try:
        timm_model.load_pretrained(str(path))
    except Exception as error:  # another kind of file may raise any type
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"its weights do not fit the model ({reason}); {_ADVICE}") from error
    return any(not torch.equal(old, new) for old, new in zip(before, head.parameters(), strict=True))


def _check_depth(model: Any, path: Path) -> None:
    """Compares the numbers of blocks, since timm would silently ignore further blocks of the file."""
    try:
        with np.load(path) as arrays:
            names = list(arrays)
            stacked = [arrays[name].shape[0] for name in names if "/encoderblock/LayerNorm_0/scale" in name]
    except Exception as error:  # NumPy raises any type for a damaged file
        raise ValueError("is no .npz file, or is cut short; fetch it again") from error
    blocks = {found.group(1) for name in names if (found := re.search(r"(?:encoderblock|MixerBlock)_(\d+)/", name))}
    depth = max([len(blocks), *stacked])
    if depth == 0:
        raise ValueError("holds no weights of a Vision Transformer or an MLP-Mixer; give a file of weights")
    if depth != len(model.blocks):
        raise ValueError(f"has {depth} blocks, and the model has {len(model.blocks)}; {_ADVICE}")
