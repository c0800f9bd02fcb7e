"""Writes a trained model as a folder for timm: `timm.create_model("local-dir:DIR", pretrained=True)` opens it once
`vmoe` is imported.

The folder holds timm's config.json with the MoE settings in `model_args`, model.safetensors (which every tool of this
package opens too), the model card README.md, and for a V-MoE its picture routing.png.
"""

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models._hub import save_config_for_hf  # timm's own save_for_hf calls it
from torch import nn

from vmoe.checkpoints import RunFolder, TrainedModel, load_checkpoint, timm_arguments, write_safetensors
from vmoe.errors import UserError
from vmoe.export.card import PICTURE, draw_routing, has_picture, is_untouched, model_card
from vmoe.files import new_folder, write_json
from vmoe.models.registry import ON_BACKBONE
from vmoe.sizes import height_and_width

_CROP_MODES = {"centre": "center", "squash": "squash", "letterbox": "border"}  # our name -> timm's
CONFIG, CARD = "config.json", "README.md"


def write_hub_folder(path: str | Path, source: str | Path, license: str | None = None) -> bool:
    """Writes the folder if timm's model from it gives the same logits; else it writes nothing.

    Args:
        path: The folder. If it exists, other files in it stay, and so does a README.md that its owner has completed.
        source: A checkpoint file or a run's folder. The card uses the folder's summary.json.
        license: The weights' licence, by its name on the hub, such as "apache-2.0".

    Returns:
        Whether README.md was written.

    Raises:
        UserError: The checkpoint cannot be read, timm cannot build its model, or `path` cannot be written.
    """
    path = Path(path)
    checkpoint = load_checkpoint(source)
    if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or RunFolder(path).shared.is_file())):
        raise UserError(f"--out {path}: exists and is no folder of a model; choose another place")
    with new_folder(path) as folder:
        weights = RunFolder(folder).shared
        write_safetensors(weights, source)
        _write_hub_config(folder, checkpoint)
        is_new = _is_free(path / CARD)
        if is_new:
            (folder / CARD).write_text(model_card(checkpoint, source, license), encoding="utf-8")
        if has_picture(checkpoint):
            draw_routing(checkpoint).save(folder / PICTURE)
        _keep_others(path, folder, {weights.name, CONFIG, PICTURE, *([CARD] if is_new else [])})
    return is_new


def _is_free(card: Path) -> bool:
    """Whether a card may be written: there is none, or it is unchanged."""
    return not card.exists() or is_untouched(card.read_text(encoding="utf-8", errors="replace"))


def _keep_others(old: Path, new: Path, ours: set[str]) -> None:
    """Moves the old folder's other files, such as a licence or a repository's `.git`, into the new one."""
    for entry in old.iterdir() if old.is_dir() else ():
        if entry.name in ours:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry, new / entry.name)


def _link(source: str | Path, target: str | Path) -> None:
    """Makes a hard link to a file, or a copy if the file system has no hard links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def push(path: str | Path, name: str) -> str:
    """Uploads a folder to the Hugging Face hub and returns its address.

    Args:
        path: A folder of `write_hub_folder`.
        name: USER/NAME of the repository, which is created if needed.

    Raises:
        UserError: The hub refuses.
    """
    from huggingface_hub import HfApi  # here: the import takes a second, and most folders are never uploaded

    api = HfApi(library_name="vmoe")
    try:
        repository = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=str(path), commit_message="Add the model")
    except Exception as error:  # a refusal, a wrong name or no network: the libraries below raise types of their own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"--push {name}: failed ({reason}); the folder {path} is complete, push it by: hf upload {name} {path}"
        ) from error
    return str(repository)


def _write_hub_config(folder: Path, checkpoint: TrainedModel) -> None:
    """Writes config.json through timm, with the image size as an argument if the architecture takes it.

    The number of classes is not an argument, since transformers passes it on by itself.
    """
    described = copy.copy(checkpoint.model)
    described.pretrained_cfg = _pretrained_cfg(checkpoint)  # timm's own describes other weights
    for size in ({"img_size": checkpoint.image_size}, {}):
        described.pretrained_cfg["fixed_input_size"] = bool(size)
        names = {"label_names": checkpoint.class_names}
        save_config_for_hf(described, folder / CONFIG, names, {**_model_args(checkpoint), **size})
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config["model_args"].pop("num_classes", None)  # timm has added it
        if checkpoint.multi_label:
            config["problem_type"] = "multi_label_classification"  # so that transformers' pipeline uses sigmoids
        write_json(folder / CONFIG, config)
        try:
            model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        except TypeError as error:
            if "img_size" in str(error) and size:
                continue
            raise
        _require_timm_agrees(model, checkpoint)
        return


@torch.no_grad()
def _require_timm_agrees(model: nn.Module, checkpoint: TrainedModel) -> None:
    """Compares a model's logits with the checkpoint's, bit for bit, and raises if they differ."""
    images = torch.randn(2, checkpoint.channels or 3, *height_and_width(checkpoint.image_size))
    if not torch.equal(model(images), checkpoint.model.cpu()(images)):
        raise UserError(f"{checkpoint.path}: timm makes another model of it; its model.kwargs cannot be shared so")


def _pretrained_cfg(checkpoint: TrainedModel) -> dict[str, Any]:
    """The description of these weights for timm: the preparation of images, and the first and last layers."""
    known = getattr(checkpoint.model, "pretrained_cfg", {})
    return {
        "architecture": _timm_name(checkpoint),
        "num_classes": len(checkpoint.class_names),
        "input_size": (checkpoint.channels or 3, *height_and_width(checkpoint.image_size)),
        "mean": checkpoint.mean,
        "std": checkpoint.std,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": _CROP_MODES[checkpoint.crop],
        "first_conv": known.get("first_conv"),
        "classifier": known.get("classifier", "head"),
    }


def _timm_name(checkpoint: TrainedModel) -> str:
    """A registered name of the model: its own if it describes the model fully, else ours for MoE on any backbone."""
    name = checkpoint.config["model"]["name"]
    return name if checkpoint.config["moe"] is None or name.startswith("vmoe_") else ON_BACKBONE


def _model_args(checkpoint: TrainedModel) -> dict[str, Any]:
    name, moe = checkpoint.config["model"]["name"], checkpoint.config["moe"]
    arguments = timm_arguments(checkpoint.config["model"]["kwargs"])
    if checkpoint.channels is not None:
        arguments["in_chans"] = checkpoint.channels
    if name.startswith("vmoe_"):
        arguments["moe"] = moe or False
    elif moe is not None:
        arguments |= {"backbone": name, "moe": moe}
    return arguments
