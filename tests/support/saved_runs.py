"""Makes small untrained checkpoints in the form of a run's."""

from pathlib import Path
from typing import Any

import torch

import vmoe
from vmoe.checkpoints import ENTRY
from vmoe.checkpoints.entry import FORMAT_VERSION

KWARGS = {"patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3}
DIGITS = tuple("0123456789")


def content(
    moe: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    class_names: tuple[str, ...] = DIGITS,
    **sections: dict[str, Any],
) -> dict[str, Any]:
    """The content of a checkpoint for digits at 16 px.

    `moe` has keyword arguments of `MoeConfig`, or is None. `sections` are others of the config.
    """
    torch.manual_seed(0)
    config = vmoe.MoeConfig(**moe) if moe else None
    model = vmoe.create_model("vit_tiny_patch16_224", config, num_classes=len(class_names), img_size=16, **KWARGS)
    return {
        ENTRY: {
            "version": FORMAT_VERSION,
            "config": {
                "seed": 0,
                "output_dir": None,
                "data": {"name": "digits"} | (data or {}),
                "model": {"name": "vit_tiny_patch16_224", "kwargs": KWARGS},
                "moe": moe,
                "optim": {},
                "trainer": {},
                **sections,
            },
            "class_names": list(class_names),
            "image_size": 16,
            "mean": [0.3, 0.3, 0.3],
            "std": [0.4, 0.4, 0.4],
            "epochs_done": 1,
        },
        "global_step": 1,
        "state_dict": {f"model.{key}": value for key, value in model.state_dict().items()},
    }


def save_run(folder: Path, *args: Any, **kwargs: Any) -> Path:
    """Writes a run's folder with such a checkpoint, and returns it."""
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(content(*args, **kwargs), folder / "checkpoints" / "best.ckpt")
    return folder
