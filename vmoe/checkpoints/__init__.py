"""What a run's folder and a checkpoint are: the one room that knows the format and opens, checks and rebuilds them.

`entry` is what is ours in a file and `sharded` a folder of shards. `loading` reads both and makes a `trained` model, by
which `prediction` answers; `foreign` reads weights of others. `writing` makes files: `shared` those that leave the
machine, `own` those of anybody's loop.
"""

from vmoe.checkpoints.entry import ENTRY, FORMAT_VERSION, check_entry
from vmoe.checkpoints.foreign import read_foreign_weights
from vmoe.checkpoints.loading import (
    SCALE,
    WITHOUT_EFFECT,
    RunFolder,
    build_model,
    copy_checkpoint,
    find_checkpoint,
    flatten,
    load,
    load_checkpoint,
    read_checkpoint,
    read_without_tensors,
    rebuilding_config,
    timm_arguments,
    trained_weights,
)
from vmoe.checkpoints.own import save
from vmoe.checkpoints.shared import require_rounding, shared_config, write_changed, write_safetensors
from vmoe.checkpoints.trained import TrainedModel, as_trained
from vmoe.checkpoints.writing import new_entry, write_content, write_weights

__all__ = [
    "ENTRY",
    "FORMAT_VERSION",
    "SCALE",
    "WITHOUT_EFFECT",
    "RunFolder",
    "TrainedModel",
    "as_trained",
    "build_model",
    "check_entry",
    "copy_checkpoint",
    "find_checkpoint",
    "flatten",
    "load",
    "load_checkpoint",
    "new_entry",
    "read_checkpoint",
    "read_foreign_weights",
    "read_without_tensors",
    "rebuilding_config",
    "require_rounding",
    "save",
    "shared_config",
    "timm_arguments",
    "trained_weights",
    "write_changed",
    "write_content",
    "write_safetensors",
    "write_weights",
]
