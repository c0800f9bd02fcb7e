"""Runs that start from a checkpoint: its own recipe with changes and the user's options."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import yaml

from vmoe.checkpoints import TrainedModel, without_guidance
from vmoe.cli.train_options import parse
from vmoe.config_values import to_plain
from vmoe.data import DataConfig
from vmoe.training.config import TrainConfig

_ALONE = {"compile": False, "cuda_graph": False}  # these take longer to start than a short run lasts


def follow_up(checkpoint: TrainedModel, data: DataConfig, changes: dict[str, Any], argv: list[str]) -> TrainConfig:
    """The config of a run with a checkpoint's recipe, in one process, uncompiled.

    Args:
        checkpoint: The checkpoint with the recipe.
        data: Its images.
        changes: Changed sections of the recipe: `trainer` in part, all others as a whole.
        argv: Options of `vmoe train`, which override all others.

    Raises:
        UserError: An option is not allowed.
    """
    own = without_guidance(checkpoint.config) if "moe" in changes else dict(checkpoint.config)
    # such a run starts from a whole model, and may have fewer epochs than the unfreezing
    own["finetune"] = {key: value for key, value in own.get("finetune", {}).items() if key != "unfreeze_epochs"}
    plain = {
        **{key: value for key, value in own.items() if key not in ("parallel", "distill")},
        **changes,
        "resume": False,
        "data": to_plain(dataclasses.replace(data, pipeline=own["data"].get("pipeline", "workers"))),
        "trainer": {**own["trainer"], **_ALONE, **changes.get("trainer", {})},
    }
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(plain), encoding="utf-8")
        return parse(["--config", str(recipe), *argv])
