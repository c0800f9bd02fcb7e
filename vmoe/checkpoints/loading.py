"""Reads checkpoints and rebuilds their models, for every tool.

A checkpoint is Lightning's file with one entry of ours, `vmoe`, in plain types. The entry holds the format's version,
the run's whole config, the class names, image size, mean and std, the average of the weights if the run keeps one, and
the state for exact resumption. A file to share is a safetensors file instead, with the same entry as JSON in its
metadata and without the state of training.
"""

import difflib
import json
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from vmoe.checkpoints.building import build_model, timm_arguments
from vmoe.checkpoints.entry import ENTRY, MODEL_PREFIX, ModelFacts, check_entry, checked, facts_of
from vmoe.checkpoints.run_folder import RunFolder
from vmoe.checkpoints.sharded import is_sharded, read_folder, read_plain_part
from vmoe.checkpoints.source import local_path
from vmoe.checkpoints.trained import TrainedModel, as_trained
from vmoe.config_values import with_section
from vmoe.errors import UserError
from vmoe.files import atomic_write, new_folder
from vmoe.models.lora import merged_weights
from vmoe.models.released import RELEASED
from vmoe.models.sources import with_source
from vmoe.moe import MoeConfig
from vmoe.moe.int8 import dequantise

SCALE = "_scale"  # the scales of a weight stored as int8 have its name with this suffix


def load(path: str | Path, device: str | torch.device = "cpu") -> TrainedModel:
    """Opens a trained model: rebuilds it and loads its weights, or their average (EMA) if the run kept one.

    It never runs code from a file, and builds only models that timm or this package names.

    Args:
        path: A run's folder (its best checkpoint, or the last if there is no best); a .ckpt or .safetensors file; a
            folder of `vmoe export --format hub`; or a name that is fetched once: a released model (`vmoe models` lists
            them), USER/NAME or USER/NAME@REVISION on the hub, or the address of a .safetensors file.
        device: The device of the model.

    Returns:
        timm's model, in evaluation mode, which also has `class_names`, `image_size`, `mean`, `std`, `config` and
        `predict`: see `TrainedModel`.

    Raises:
        UserError: The file is missing, truncated, foreign, damaged, or of a newer version.
    """
    path = find_checkpoint(path)
    content = read_checkpoint(path)
    check_entry(content, path)
    facts = facts_of(content).by_architecture()
    try:
        model = _rebuild(facts)
        model.load_state_dict(trained_weights(content))
        return as_trained(
            model.to(device).eval(),
            facts,
            epoch=content[ENTRY]["epochs_done"],
            step=content["global_step"],
            path=path,
        )
    except UserError as error:  # the model cannot be built
        raise UserError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200] + (" is missing" if isinstance(error, KeyError) else "")
        raise UserError(f"{path}: its weights and its config do not make a model ({reason}); train it again") from error


load_checkpoint = load  # the older name of `vmoe.load`


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint file for `path`: the file itself, or a run's best checkpoint, else its last.

    For a name or an address it fetches the weights first: see `local_path`.

    Raises:
        UserError: There is none.
    """
    path = local_path(path)
    if not path.is_dir() or is_sharded(path):
        if not path.exists():
            raise UserError(f"{path}: no such file; {_advice(path)}")
        return path
    folder = RunFolder(path)
    for candidate in (folder.best, folder.last, folder.shared):
        if candidate.is_file() or is_sharded(candidate):
            return candidate
    raise UserError(
        f"{path}: holds no checkpoints/best.ckpt, checkpoints/last.ckpt or model.safetensors; give a run's folder"
    )


def _advice(path: Path) -> str:
    near = difflib.get_close_matches(str(path), RELEASED, n=1, cutoff=0.75)
    return f"did you mean {near[0]}?" if near else "give a .ckpt or .safetensors file or a run's folder"


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU. It is checked to be this package's and of a supported version.

    Raises:
        UserError: The file is missing, truncated, foreign, damaged, or of a newer version.
    """
    path = Path(path)
    return checked(read_folder(path) if is_sharded(path) else _read_file(path), path)


def read_facts(path: Path) -> ModelFacts:
    """The facts in one of our safetensors files, read without its tensors.

    Raises:
        UserError: The file is missing, truncated, foreign, damaged, or of a newer version.
    """
    with _reading_safetensors(path):
        ours = _entry_in_metadata(path)
    content = checked({"state_dict": {}, ENTRY: ours, "global_step": 0}, path)
    check_entry(content, path)
    return facts_of(content).by_architecture()


def read_without_tensors(path: str | Path) -> dict[str, Any]:
    """Like `read_checkpoint`, but does not read the tensors of a folder of shards.

    Raises:
        UserError: As `read_checkpoint`.
    """
    path = Path(path)
    return checked(read_plain_part(path) if is_sharded(path) else _read_file(path), path)


def _read_file(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a .ckpt or .safetensors file or a run's folder")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: not a checkpoint, or cut off while it was copied; copy it again")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # for a damaged file the unpickler may raise any type
        raise UserError(
            f"{path}: cannot be read as a checkpoint of tensors and plain types; is it damaged or foreign? "
            "Of a whole model that was pickled, write the weights by vmoe.save(model, path)"
        ) from error


def _read_safetensors(path: Path) -> dict[str, Any]:
    with _reading_safetensors(path):
        ours = _entry_in_metadata(path)
        stored = load_file(path)
    scales = {name for name in stored if name.endswith(SCALE) and _is_int8(stored, name.removesuffix(SCALE))}
    weights = {
        MODEL_PREFIX + name: dequantise(value, stored[name + SCALE]) if name + SCALE in scales else value
        for name, value in stored.items()
        if name not in scales
    }
    step = ours.get("step", 0) if isinstance(ours, dict) else 0
    return {"state_dict": weights, ENTRY: ours, "global_step": step}


def _entry_in_metadata(path: Path) -> Any:
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get(ENTRY, "null"))


@contextmanager
def _reading_safetensors(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a safetensors file, or damaged ({' '.join(str(error).split())[:100]})") from error


def _is_int8(stored: dict[str, Tensor], name: str) -> bool:
    return name in stored and stored[name].dtype == torch.int8


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copies a checkpoint. The target is never half-written.

    Raises:
        UserError: It cannot be written.
    """
    if is_sharded(source):
        with new_folder(target) as temporary:
            shutil.copytree(source, temporary, dirs_exist_ok=True)
        return
    with atomic_write(target, replaces_folder=True) as temporary:
        shutil.copyfile(source, temporary)


def trained_weights(content: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict of a checkpoint's model, with the average of the weights (EMA) if the run kept one.

    Low-rank adapters are merged into their weights. Other modules of a Classifier's subclass are left out.
    """
    return merged_weights(unmerged_weights(content))


def unmerged_weights(content: dict[str, Any]) -> dict[str, Tensor]:
    """Like `trained_weights`, but with separate low-rank adapters, as in training."""
    state = content["state_dict"]
    weights = {key.removeprefix(MODEL_PREFIX): value for key, value in state.items() if key.startswith(MODEL_PREFIX)}
    ema = content[ENTRY].get("ema")
    return weights if ema is None else weights | ema["weights"]


def _rebuild(facts: ModelFacts) -> nn.Module:
    config, name = facts.config, with_source(facts.config["model"]["name"])
    if not timm.is_model(name):  # a name such as hf-hub:... would fetch a model
        raise ValueError(f"unknown model {name!r}")
    try:
        moe = None if config["moe"] is None else MoeConfig(**config["moe"])
    except ValueError as error:
        raise ValueError(with_section(str(error), MoeConfig, "moe.")) from error
    kwargs = timm_arguments(config["model"]["kwargs"])
    return build_model(name, kwargs, moe, len(facts.class_names), facts.image_size, facts.channels)
