"""Trained weights as one file to share."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from vmoe.checkpoint_entry import check_entry
from vmoe.checkpoints import ENTRY, SCALE, find_checkpoint, read_checkpoint, trained_weights
from vmoe.files import atomic_write
from vmoe.moe.int8 import quantise

_EXPERT_WEIGHT = re.compile(r"\.experts\.fc[12]\.weight$")


def write_safetensors(
    path: str | Path, source: str | Path, dtype: torch.dtype | None = None, int8: bool = False
) -> None:
    """Writes the trained weights of a checkpoint, and what is needed to use them, as one safetensors file, atomically.

    Paths of the machine that trained are left out. Every tool opens the result as it opens a checkpoint.

    Args:
        path: Where the file goes.
        source: A checkpoint file or a run's folder.
        dtype: Stored type of the weights; None: as they are. They are float32 again when the file is opened.
        int8: Stores the experts' weights as integers (`vmoe.moe.int8`) and keeps the routers' in float32.

    Raises:
        UserError: the source is no checkpoint of ours, or `path` cannot be written.
    """
    file = find_checkpoint(source)
    content = read_checkpoint(file)
    check_entry(content, file)
    ours = content[ENTRY]
    config = ours["config"] | {"output_dir": None, "init_from": None}
    config["data"] = {key: value for key, value in config.get("data", {}).items() if key != "root"}
    kept = ("version", "class_names", "image_size", "mean", "std", "epochs_done")
    entry = {key: ours[key] for key in kept} | {"config": config, "step": content["global_step"]}
    weights = {}
    for name, value in trained_weights(content).items():
        if int8 and _EXPERT_WEIGHT.search(name):
            weights[name], weights[name + SCALE] = quantise(value)
        elif dtype is None or not value.is_floating_point() or (int8 and ".router." in name):
            weights[name] = value.contiguous()
        else:
            weights[name] = value.to(dtype).contiguous()
    with atomic_write(path) as temporary:
        save_file(weights, temporary, metadata={"format": "pt", ENTRY: json.dumps(entry)})
