"""What a run's folder and a checkpoint are: the one place that opens, checks and rebuilds them for every tool.

A checkpoint is the file Lightning writes, with one entry of ours, `vmoe`, of plain types: the format's version, the
run's whole config, the class names, image size, mean and std, the average of the weights where the run keeps one, and
what an exact resumption needs. Weights to be shared are a safetensors file instead, with the same entry as JSON in its
metadata and without what training needs.
"""

import json
import math
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from vmoe.checkpoints.entry import ENTRY, MODEL_PREFIX, check_entry, checked
from vmoe.checkpoints.sharded import is_sharded, read_folder, read_plain_part
from vmoe.checkpoints.trained import TrainedModel, as_trained
from vmoe.errors import UserError
from vmoe.files import atomic_write, new_folder
from vmoe.models import create_model
from vmoe.models.sources import with_source
from vmoe.moe import MoeConfig
from vmoe.moe.int8 import dequantise

SCALE = "_scale"  # follows the name of a weight stored as int8 in that of its scales
# Options of a run that tell where things are and how fast they go, but change nothing of its result. With Muon the
# layout does: it decides which matrices Muon trains.
WITHOUT_EFFECT = (
    *("output_dir", "resume", "data.workers", "data.check", "trainer.log_every"),
    *("trainer.device", "trainer.compile", "trainer.cuda_graph"),
    *("parallel.strategy", "parallel.expert_size", "parallel.dense", "parallel.async_save"),
)
# Arguments of timm that would fetch or open other files: a checkpoint brings its own weights.
_FETCHING_ARGUMENTS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


@dataclass(frozen=True)
class RunFolder:
    """The files of a run, by what they are."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def last(self) -> Path:
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def best(self) -> Path:
        return self.path / "checkpoints" / "best.ckpt"

    @property
    def shared(self) -> Path:
        """The weights of a folder that was written to be shared, which is no run's."""
        return self.path / "model.safetensors"

    @property
    def launch(self) -> Path:
        return self.path / "checkpoints" / ".launch"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"


def load(path: str | Path, device: str | torch.device = "cpu") -> TrainedModel:
    """Opens a trained model: rebuilds it and fills it with its weights, their average (EMA) where the run kept one.

    Nothing that a file says is run; only models that timm or this package names are built.

    Args:
        path: A run's folder, of which the best checkpoint is taken, or the last while there is no best; a .ckpt or
            .safetensors file; or a folder that `vmoe export --format hub` wrote.
        device: Where the model goes.

    Returns:
        timm's model, in evaluation mode, which also has `class_names`, `image_size`, `mean`, `std`, `config` and
        `predict`: see `TrainedModel`.

    Raises:
        UserError: the file is missing, truncated, foreign, damaged, or of a newer version.
    """
    path = find_checkpoint(path)
    content = read_checkpoint(path)
    check_entry(content, path)
    ours = content[ENTRY]
    try:
        config = rebuilding_config(ours)
        model = _rebuild(config, len(ours["class_names"]), ours["image_size"])
        model.load_state_dict(trained_weights(content))
        return as_trained(
            model.to(device).eval(),
            config=config,
            class_names=[str(name) for name in ours["class_names"]],
            image_size=int(ours["image_size"]),
            mean=tuple(ours["mean"]),
            std=tuple(ours["std"]),
            epoch=int(ours["epochs_done"]),
            step=int(content["global_step"]),
            path=path,
            bit_depth=ours.get("bit_depth"),
        )
    except UserError as error:  # of the model, which cannot be built
        raise UserError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200] + (" is missing" if isinstance(error, KeyError) else "")
        raise UserError(f"{path}: its weights and its config do not make a model ({reason}); train it again") from error


load_checkpoint = load  # its name before `vmoe.load`


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint file that `path` stands for: itself, or the best, else the last, of a run's folder.

    Raises:
        UserError: there is none.
    """
    if str(path).startswith("hf-hub:"):
        name = str(path).removeprefix("hf-hub:")
        raise UserError(f"{path}: fetch it first, by `hf download {name}`, and give the folder that this prints")
    path = Path(path).expanduser()
    if not path.is_dir() or is_sharded(path):
        if not path.exists():
            raise UserError(f"{path}: no such file; give a .ckpt or .safetensors file or a run's folder")
        return path
    folder = RunFolder(path)
    for candidate in (folder.best, folder.last, folder.shared):
        if candidate.is_file() or is_sharded(candidate):
            return candidate
    raise UserError(
        f"{path}: holds no checkpoints/best.ckpt, checkpoints/last.ckpt or model.safetensors; give a run's folder"
    )


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU, checked to be ours and of a version that is understood.

    Raises:
        UserError: the file is missing, truncated, foreign, damaged, or of a newer version.
    """
    path = Path(path)
    return checked(read_folder(path) if is_sharded(path) else _read_file(path), path)


def read_without_tensors(path: str | Path) -> dict[str, Any]:
    """Like `read_checkpoint`, without a model's tensors where they need not be read, in a folder.

    Raises:
        UserError: likewise.
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
    except Exception as error:  # a damaged file makes the unpickler fail in any way it can
        raise UserError(
            f"{path}: cannot be read as a checkpoint of tensors and plain types; is it damaged or foreign?"
        ) from error


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            ours = json.loads((file.metadata() or {}).get(ENTRY, "null"))
        stored = load_file(path)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a safetensors file, or damaged ({' '.join(str(error).split())[:100]})") from error
    scales = {name for name in stored if name.endswith(SCALE) and _is_int8(stored, name.removesuffix(SCALE))}
    weights = {
        MODEL_PREFIX + name: dequantise(value, stored[name + SCALE]) if name + SCALE in scales else value
        for name, value in stored.items()
        if name not in scales
    }
    step = ours.get("step", 0) if isinstance(ours, dict) else 0
    return {"state_dict": weights, ENTRY: ours, "global_step": step}


def _is_int8(stored: dict[str, Tensor], name: str) -> bool:
    return name in stored and stored[name].dtype == torch.int8


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copies a checkpoint; the target is never half of one.

    Raises:
        UserError: it cannot be written.
    """
    if is_sharded(source):
        with new_folder(target) as temporary:
            shutil.copytree(source, temporary, dirs_exist_ok=True)
        return
    with atomic_write(target) as temporary:
        shutil.copyfile(source, temporary)


def trained_weights(content: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict of a checkpoint's model: with the average of the weights (EMA) where the run kept one."""
    weights = {key.removeprefix(MODEL_PREFIX): value for key, value in content["state_dict"].items()}
    ema = content[ENTRY].get("ema")
    return weights if ema is None else weights | ema["weights"]


def build_model(
    name: str, kwargs: dict[str, Any], moe: MoeConfig | None, num_classes: int, image_size: int
) -> nn.Module:
    """The model of a recipe for a data set: what training starts from and a checkpoint's weights are loaded into.

    Without `moe` it is dense, whatever its name. Models that take images of any size are not told one.

    Raises:
        UserError: timm has no such model, it does not take these arguments, or `moe` does not fit it.
    """
    try:
        model = _create(with_source(name), moe or False, num_classes, image_size, kwargs)
    except Exception as error:  # for arguments that it cannot use, timm raises any type
        reason = " ".join(str(error).split())
        if isinstance(error, KeyError) or not reason:
            reason = f"{type(error).__name__} {reason}".strip()
        with_these = [f"model.kwargs={kwargs}"] * bool(kwargs) + ["this moe"] * (moe is not None)
        how = f" with {' and '.join(with_these)}" if with_these else ""
        raise UserError(f"model.name={name}: cannot be built{how}: {reason}") from error
    _check_patches(model, image_size)
    return model


def _create(name: str, moe: MoeConfig | bool, num_classes: int, image_size: int, kwargs: dict[str, Any]) -> nn.Module:
    try:
        return create_model(name, moe, num_classes=num_classes, img_size=image_size, **kwargs)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return create_model(name, moe, num_classes=num_classes, **kwargs)


def _check_patches(model: nn.Module, image_size: int) -> None:
    """Refuses images of which the patches would leave out, without a word, the last rows and columns."""
    embed = getattr(model, "patch_embed", None)
    sides = getattr(embed, "patch_size", None)
    if sides is None or getattr(embed, "dynamic_img_pad", False):
        return
    side = math.lcm(*sides) if isinstance(sides, tuple) else sides
    if image_size % side:
        near = " or ".join(str(size) for size in (image_size // side * side, (image_size // side + 1) * side) if size)
        raise UserError(f"data.image_size={image_size}: is no multiple of the patch size {side}; use {near}")


def _rebuild(config: dict[str, Any], num_classes: int, image_size: int) -> nn.Module:
    name = with_source(config["model"]["name"])
    if not timm.is_model(name):  # names such as hf-hub:... would fetch a model
        raise ValueError(f"unknown model {name!r}")
    try:
        moe = None if config["moe"] is None else MoeConfig(**config["moe"])
    except ValueError as error:
        raise ValueError(f"moe.{error}") from error
    return build_model(name, timm_arguments(config), moe, num_classes, image_size)


def rebuilding_config(ours: dict[str, Any]) -> dict[str, Any]:
    """The config of a checkpoint's run, given its entry of ours, with the model's name and arguments as timm has them,
    without the folder or hub that the run may have named.
    """
    return ours["config"] | {"model": ours["config"]["model"] | ours.get("architecture", {})}


def timm_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a run's model, without those that would fetch weights."""
    return {key: value for key, value in config["model"]["kwargs"].items() if key not in _FETCHING_ARGUMENTS}


def flatten(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config of nested dicts as one dict, by dotted name."""
    flat = {}
    for key, value in plain.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
