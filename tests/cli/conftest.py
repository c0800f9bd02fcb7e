"""Small untrained checkpoints, as a run leaves them."""

import pytest
import torch

import vmoe
from vmoe.checkpoints import ENTRY, FORMAT_VERSION

KWARGS = {"patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3}


@pytest.fixture
def save_run(tmp_path):
    """Writes the run folder NAME with a checkpoint for digits at 16 px; `moe` as keyword arguments or None."""

    def save(name="run", moe=None, data=None, class_names=tuple("0123456789")):
        torch.manual_seed(0)
        config = vmoe.MoeConfig(**moe) if moe else None
        model = vmoe.create_model("vit_tiny_patch16_224", config, num_classes=len(class_names), img_size=16, **KWARGS)
        content = {
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
        folder = tmp_path / name
        (folder / "checkpoints").mkdir(parents=True)
        torch.save(content, folder / "checkpoints" / "best.ckpt")
        return folder

    return save
