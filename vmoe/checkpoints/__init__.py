"""The format of checkpoints and run folders. No other room knows it.

`entry` is this package's entry in a file. `state` is what training adds, `sharded` the folder format of sharded models,
`program` the metadata of exported programs, and `run_folder` the names of all files. `loading` reads files and makes a
`trained` model, which predicts by `prediction`. `building` builds models. `foreign` reads weights of others. `writing`
writes files; `shared` writes files to share, and `own` those of custom training loops.
"""

from typing import TYPE_CHECKING

from vmoe.imports import names_on_demand

if TYPE_CHECKING:
    from vmoe.checkpoints.building import build_model, timm_arguments
    from vmoe.checkpoints.entry import (
        ENTRY,
        FORMAT_VERSION,
        ModelFacts,
        check_entry,
        facts_of,
        facts_of_import,
    )
    from vmoe.checkpoints.foreign import read_foreign_weights
    from vmoe.checkpoints.loading import (
        copy_checkpoint,
        find_checkpoint,
        load,
        load_checkpoint,
        read_checkpoint,
        read_without_tensors,
        trained_weights,
        unmerged_weights,
    )
    from vmoe.checkpoints.own import describe, save
    from vmoe.checkpoints.run_folder import WITHOUT_EFFECT, RunFolder, flatten
    from vmoe.checkpoints.shared import (
        require_rounding,
        shared_config,
        without_guidance,
        write_changed,
        write_safetensors,
    )
    from vmoe.checkpoints.trained import TrainedModel, as_trained, require_single_label
    from vmoe.checkpoints.writing import write_content, write_weights
else:  # a run's folder can be read without torch
    __getattr__ = names_on_demand(
        __name__,
        {
            "vmoe.checkpoints.building": ["build_model", "timm_arguments"],
            "vmoe.checkpoints.entry": [
                "ENTRY",
                "FORMAT_VERSION",
                "ModelFacts",
                "check_entry",
                "facts_of",
                "facts_of_import",
            ],
            "vmoe.checkpoints.foreign": ["read_foreign_weights"],
            "vmoe.checkpoints.loading": [
                *("copy_checkpoint", "find_checkpoint", "load", "load_checkpoint", "read_checkpoint"),
                *("read_without_tensors", "trained_weights", "unmerged_weights"),
            ],
            "vmoe.checkpoints.own": ["describe", "save"],
            "vmoe.checkpoints.run_folder": ["WITHOUT_EFFECT", "RunFolder", "flatten"],
            "vmoe.checkpoints.shared": [
                *("require_rounding", "shared_config", "without_guidance", "write_changed", "write_safetensors"),
            ],
            "vmoe.checkpoints.trained": ["TrainedModel", "as_trained", "require_single_label"],
            "vmoe.checkpoints.writing": ["write_content", "write_weights"],
        },
    )

__all__ = [
    "ENTRY",
    "FORMAT_VERSION",
    "WITHOUT_EFFECT",
    "ModelFacts",
    "RunFolder",
    "TrainedModel",
    "as_trained",
    "build_model",
    "check_entry",
    "copy_checkpoint",
    "describe",
    "facts_of",
    "facts_of_import",
    "find_checkpoint",
    "flatten",
    "load",
    "load_checkpoint",
    "read_checkpoint",
    "read_foreign_weights",
    "read_without_tensors",
    "require_rounding",
    "require_single_label",
    "save",
    "shared_config",
    "timm_arguments",
    "trained_weights",
    "unmerged_weights",
    "without_guidance",
    "write_changed",
    "write_content",
    "write_safetensors",
    "write_weights",
]
