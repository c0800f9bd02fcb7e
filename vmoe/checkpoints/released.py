"""Opens released models by name: downloads and converts them once, and registers them in timm.

torch.hub's folder keeps a model under checkpoints/vmoe/NAME: the publisher's files, their record, and the converted
model, a safetensors file as from `vmoe.save`.
"""

import errno
import json
import os
import re
import zipfile
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn

from vmoe.checkpoints.downloading import fetch_file, one_process_in, sha256_of
from vmoe.checkpoints.entry import facts_of_import
from vmoe.checkpoints.hub import require_network
from vmoe.checkpoints.writing import write_weights
from vmoe.errors import UserError
from vmoe.extras import require_module
from vmoe.files import new_folder, write_json, writing
from vmoe.models import released
from vmoe.models.imported import ImportedModel
from vmoe.models.released import ReleasedModel
from vmoe.moe import MoeConfig
from vmoe.sizes import height_and_width

RECORD = "downloaded.json"  # each file's address, size and SHA-256 at the first download; the SHA-256 of refused files
_IN_ZIP = re.compile(r"(?:[^/\\]+/)*([^/\\.][^/\\]*\.(?:rank\d{1,6}|master|global|pth))")
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO)
_OUR_SETS = {"imagenet-1k": "imagenet", "cifar100": "cifar100"}


def cache_folder(name: str) -> Path:
    """The folder of a model. TORCH_HOME moves it."""
    return Path(torch.hub.get_dir()) / "checkpoints" / "vmoe" / name


def converted_file(name: str) -> Path:
    """The path of the converted model, which need not exist yet."""
    name = released.full_name(name)
    return cache_folder(name) / f"{name}-{released.RELEASED[name].digest}.safetensors"


def fetch_released(name: str) -> Path:
    """The file of a released model for `vmoe.load`. It is downloaded and converted once.

    Args:
        name: A name in `vmoe.models.released.RELEASED`.

    Raises:
        UserError: There is no network, the downloaded files are no such model, or a package to read them is missing.
    """
    name = released.full_name(name)
    model, path = released.RELEASED[name], converted_file(name)
    record = path.with_name(RECORD)
    if _is_converted(path, record):
        return path
    if model.kind == "jax":
        require_module("msgpack")
    with one_process_in(path.parent):
        if _is_converted(path, record):  # another process may have converted it while this one waited
            return path
        files = _published_files(name, model, _read_record(record))
        _convert(name, model, path, files)
        write_json(record, {"files": files, "converted": {path.name: path.stat().st_size}})
    return path


def _is_converted(path: Path, record: Path) -> bool:
    """Whether the converted model exists with its recorded size."""
    return path.is_file() and _read_record(record)["converted"].get(path.name) == path.stat().st_size


def _read_record(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {what: dict(content.get(what, {})) for what in ("files", "converted", "refused")}
    except (OSError, ValueError, AttributeError, TypeError):
        return {"files": {}, "converted": {}, "refused": {}}


def _published_files(name: str, model: ReleasedModel, record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Downloads all of the publisher's files that are missing.

    Returns:
        The address, size and SHA-256 of each, by its name.

    Raises:
        UserError: A file cannot be downloaded, or differs from the first download.
    """
    known = record["files"]
    if model.kind == "swin":
        return _fetched(name, model, ".zip", known)
    from vmoe.models.jax_checkpoint import data_suffixes

    files = _fetched(name, model, ".index", known)
    try:
        suffixes = data_suffixes(cache_folder(name) / model.file)
    except UserError as error:
        raise _refused(name, model, files, error) from error
    for suffix in suffixes:
        files |= _fetched(name, model, suffix, known)
    return files


def _fetched(name: str, model: ReleasedModel, suffix: str, known: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Downloads one of the publisher's files if it is missing."""
    address = model.address.removesuffix(".zip") + suffix
    path = cache_folder(name) / f"{model.file}{suffix}"
    if path.is_file():
        sha256 = sha256_of(path)
    else:
        require_network(name)
        try:
            sha256 = fetch_file(address, path)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    first = known.get(path.name, {}).get("sha256")
    if first is not None and first != sha256:
        path.unlink()
        raise UserError(
            f"{name}: {address} is not what it was: its SHA-256 is {sha256}, and that of the first download is "
            f"{first}; run this again if it was damaged, or remove {path.with_name(RECORD)} if the publisher has "
            "replaced it"
        )
    return {path.name: {"address": address, "size": path.stat().st_size, "sha256": sha256}}


def _convert(name: str, model: ReleasedModel, path: Path, files: dict[str, dict[str, Any]]) -> None:
    """Writes the converted model.

    Raises:
        UserError: The files are not this model's, or the file cannot be written.
    """
    try:
        imported = _import_swin(name, model) if model.kind == "swin" else _import_jax(name, model)
        _require_the_model(model, imported)
    except UserError as error:
        if _is_of_this_machine(error):
            raise
        raise _refused(name, model, files, error) from error
    facts = facts_of_import(imported, model.class_names(), _OUR_SETS.get(model.names), model.crop)
    write_weights(path, imported.model.state_dict(), facts)


def _is_of_this_machine(error: BaseException | None) -> bool:
    """Whether a disk failed, such as a full one, rather than the publisher's files."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _OF_DISKS:
            return True
        error = error.__cause__
    return False


def _import_jax(name: str, model: ReleasedModel) -> ImportedModel:
    from vmoe.models.jax_import import RoutingOptions, import_jax_checkpoint

    moe = model.moe or {}
    options = RoutingOptions(
        top_k=moe["top_k"],
        capacity_factor=model.capacity_factor,
        group_images=moe["group"],
        ensemble=moe.get("ensemble"),
    )
    imported = import_jax_checkpoint(cache_folder(name) / model.file, options)
    return _dropping_nothing(imported, expert_dropout=moe.get("expert_dropout", 0.0))


def _import_swin(name: str, model: ReleasedModel) -> ImportedModel:
    from vmoe.models.swin_import import import_swin_moe_checkpoint

    path = cache_folder(name) / f"{model.file}.zip"
    with new_folder(path.with_suffix("")) as folder:
        _unzip(path, folder)
        imported = _dropping_nothing(import_swin_moe_checkpoint(folder))
        for file in folder.iterdir():  # they are in the .zip
            file.unlink()
    path.with_suffix("").rmdir()
    return imported


def _dropping_nothing(imported: ImportedModel, **not_in_the_files: Any) -> ImportedModel:
    """The same model with no drops at evaluation, so that a prediction does not depend on its batch.

    Fields of its `MoeConfig` that are not in the files may be given too.
    """
    if imported.moe is None:
        return imported
    return replace(imported, moe=replace(imported.moe, eval_capacity_factor=None, **not_in_the_files))


def _unzip(path: Path, folder: Path) -> None:
    """Extracts the files of a checkpoint, from any folder of the publisher's .zip, into `folder`."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if not (member := _IN_ZIP.fullmatch(entry.filename)):
                    continue
                with archive.open(entry) as source, writing(folder), open(folder / member[1], "wb") as target:
                    while chunk := source.read(2**20):
                        target.write(chunk)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise UserError(f"{path}: no .zip, or damaged ({' '.join(str(error).split())[:100]})") from error


def _require_the_model(model: ReleasedModel, imported: ImportedModel) -> None:
    found = {
        "image_size": imported.image_size[0],
        "num_classes": imported.num_classes,
        "num_experts": 0 if imported.moe is None else imported.moe.num_experts,
    }
    expected = {
        "image_size": model.image_size,
        "num_classes": model.num_classes,
        "num_experts": (model.moe or {}).get("num_experts", 0),
    }
    for what, value in found.items():
        if value != expected[what]:
            raise UserError(f"its {what} is {value}, and that of the released model is {expected[what]}")


def _refused(name: str, model: ReleasedModel, files: dict[str, dict[str, Any]], error: UserError) -> UserError:
    """The error for files that are not the model's.

    They are removed, so that they are downloaded again, unless the same came before: then they are not damaged.
    """
    folder = cache_folder(name)
    record = _read_record(folder / RECORD)
    came = {file: facts["sha256"] for file, facts in files.items()}
    reason = str(error).replace(f"{folder}{os.sep}", "")
    line = f"{name}: what came from {model.address} is not this model ({reason})"
    if record["refused"] == came:
        return UserError(f"{line}, twice the same; please report this line, or remove {folder} to fetch them again")
    for file in files:
        (folder / file).unlink(missing_ok=True)
    write_json(folder / RECORD, {**record, "refused": came})
    return UserError(f"{line}; its files are removed, so run this again to fetch them again")


def _name_in_timm(architecture: str) -> None:
    def create(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        moe: MoeConfig | dict[str, Any] | Literal[False] | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        from vmoe.models.registry import create_on_backbone  # here: that module may import this one

        name = f"{architecture}.{pretrained_cfg}" if isinstance(pretrained_cfg, str) else architecture
        if not released.is_released(name):
            tags = ", ".join(each.partition(".")[2] for each in released.architectures()[architecture])
            raise RuntimeError(f"Invalid pretrained tag ({pretrained_cfg}) for {architecture}; its tags are {tags}")
        name = released.full_name(name)
        backbone, arguments = released.RELEASED[name].backbone
        own = own_moe(name)
        if pretrained:
            from vmoe.checkpoints.loading import read_facts

            path = fetch_released(name)
            facts = read_facts(path)
            backbone, arguments = facts.config["model"]["name"], facts.config["model"]["kwargs"]
            own = facts.config["moe"]
            found = {"num_classes": len(facts.class_names), "input_size": (3, *height_and_width(facts.image_size))}
            pretrained_cfg_overlay = {**found, **(pretrained_cfg_overlay or {}), "file": str(path)}
        if moe is not None:
            own = asdict(moe) if isinstance(moe, MoeConfig) else moe or None
        try:
            return create_on_backbone(
                architecture,
                pretrained,
                pretrained_cfg=pretrained_cfg,
                pretrained_cfg_overlay=pretrained_cfg_overlay,
                backbone=backbone,
                moe=own or {"layers": []},
                **{**arguments, **kwargs},
            )
        except RuntimeError as error:
            if not pretrained or "state_dict" not in str(error):
                raise
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{name}: its weights do not fit these arguments or this moe ({reason})") from error

    create.__name__ = create.__qualname__ = architecture
    register_model(create)


def own_moe(name: str) -> dict[str, Any] | None:
    """The MoE layers of a released model, as a config's plain types; None for a dense one."""
    model = released.RELEASED[released.full_name(name)]
    if model.moe is None:
        return None
    return asdict(MoeConfig(**model.moe, capacity_factor=model.capacity_factor))


def _timm_cfg(model: ReleasedModel) -> dict[str, Any]:
    """The `pretrained_cfg` of a model for timm."""
    return {
        "url": model.address,
        "num_classes": model.num_classes,
        "input_size": (3, model.image_size, model.image_size),
        "fixed_input_size": True,
        "crop_pct": model.crop_share,
        "crop_mode": {"centre": "center", "squash": "squash"}[model.crop],
        "interpolation": model.interpolation,
        "mean": model.mean,
        "std": model.std,
        "first_conv": "patch_embed.proj",
        "classifier": "head" if model.kind == "jax" else "head.fc",
        "license": model.license,
        "origin_url": model.source,
        "paper_ids": f"arXiv:{model.paper}",
    }


default_cfgs = generate_default_cfgs({name: _timm_cfg(model) for name, model in released.RELEASED.items()})
for _architecture in released.architectures():
    _name_in_timm(_architecture)
