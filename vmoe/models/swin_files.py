"""Files of a Swin-MoE checkpoint: one file, or a file of experts per rank and a master file with everything else."""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmoe.errors import UserError

EXPERTS = ".mlp._moe_layer.experts."
_MEMBER = re.compile(r"(?P<prefix>.+)\.(?:master|global|rank(?P<rank>\d{1,6}))")
_WHOLE = (".pth", ".pt", ".bin")
_STEM = "patch_embed.proj.weight"  # only a file with the dense part has it


class SwinFiles:
    """The files of one checkpoint.

    Args:
        path: A file of the checkpoint, the folder that holds them, or their common path (NAME of NAME.rank0,
            NAME.rank1, ... and NAME.master).

    Attributes:
        path: The name of the checkpoint in messages.
        ranks: The files with experts, by rank. A single file with the whole model is rank 0.
        tensors: All tensors except those of experts.

    Raises:
        UserError: A file is missing, damaged or no checkpoint of Swin-MoE.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.ranks, rest = _find(Path(path).expanduser())
        self._first = _read(self.ranks[0])
        self.tensors = {name: value for name, value in self._first.items() if EXPERTS not in name}
        if rest is not None:
            self.tensors = _read(rest)
        elif _STEM not in self.tensors and any(EXPERTS in name for name in self._first):
            raise UserError(f"{self.path}.master: no such file; it holds all but the experts, copy it too")
        # frozen biases of experts are in the master file
        self.frozen = {name: self.tensors.pop(name) for name in list(self.tensors) if EXPERTS in name}

    def experts(self, rank: int) -> dict[str, Tensor]:
        """The tensors of the experts in the file of a rank.

        Raises:
            UserError: The file is damaged, or its names or shapes differ from rank 0's.
        """
        first = _experts_of(self._first)
        if rank == 0:
            return first
        path = self.ranks[rank]
        tensors = _experts_of(_read(path))
        for name in sorted(first.keys() | tensors.keys()):
            here, there = (tuple(each[name].shape) if name in each else "absent" for each in (first, tensors))
            if here != there:
                raise UserError(
                    f"{path}: {name} is {there}, but {here} in {self.ranks[0].name}; is it of another model?"
                )
        return tensors


def _experts_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if EXPERTS in name}


def _find(path: Path) -> tuple[Path, list[Path], Path | None]:
    """The common path, the files with experts in the order of their ranks, and the master file."""
    if path.is_dir():
        path = _only_checkpoint(path)
    member = _MEMBER.fullmatch(path.name)
    if path.is_file() and (member is None or path.suffix == ".global"):
        return path, [path], None
    prefix = path.with_name(member["prefix"]) if member else path
    found = _members(prefix.parent).get(prefix.name, {})
    if not found and not member:  # a name without its .pth
        prefix = prefix.with_name(f"{prefix.name}.pth")
        found = _members(prefix.parent).get(prefix.name, {})
    if not found:
        raise UserError(f"{path}: no such file; give a file of the checkpoint, its folder, or NAME of NAME.rank0")
    ranks = sorted(rank for rank in found if isinstance(rank, int))
    master, whole = found.get(".master"), found.get(".global")
    if whole is not None and (ranks or master):
        raise UserError(f"{prefix}: has files per rank and also {whole.name}; give the one file, or move it away")
    if whole is not None:
        return prefix, [whole], None
    missing = next((rank for rank in range(len(ranks) or 1) if rank not in ranks), None)
    if missing is not None:
        raise UserError(f"{prefix}.rank{missing}: no such file; the experts are in the files of all ranks, copy it too")
    return prefix, [found[rank] for rank in ranks], master


def _members(folder: Path) -> dict[str, dict[int | str, Path]]:
    """The files per rank in a folder, by their common name and then by rank, ".master" or ".global"."""
    found: dict[str, dict[int | str, Path]] = {}
    for file in folder.iterdir() if folder.is_dir() else ():
        match = _MEMBER.fullmatch(file.name)
        if match and file.is_file():
            kind = file.suffix if match["rank"] is None else int(match["rank"])
            found.setdefault(match["prefix"], {})[kind] = file
    return found


def _only_checkpoint(folder: Path) -> Path:
    """The one checkpoint in a folder."""
    names = sorted(_members(folder)) or sorted(file.name for file in folder.iterdir() if file.suffix in _WHOLE)
    if not names:
        raise UserError(f"{folder}: holds no files NAME.rank0 and NAME.master, and no .pth file")
    if len(names) > 1:
        raise UserError(f"{folder}: holds several checkpoints, such as {names[0]} and {names[1]}; give one of them")
    return folder / names[0]


def _read(path: Path) -> dict[str, Tensor]:
    """The state dict in a file that torch wrote."""
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: no file of PyTorch, or cut off while it was copied; copy it again")
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not verify checksums
            is_damaged = archive.testzip() is not None
        content: Any = None if is_damaged else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds Python objects beside tensors, as files for resuming a training do; "
            "write the weights alone where you trust it: torch.save({'model': content['model']}, path)"
        ) from error
    except Exception as error:  # a damaged file makes the reader fail in any way it can
        raise UserError(f"{path}: damaged, or no file of PyTorch (unzip a released .zip first)") from error
    if is_damaged:
        raise UserError(f"{path}: damaged, as its checksums show; copy it again")
    tensors = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not tensors:
        raise UserError(f"{path}: holds no state dict; is it a checkpoint of Swin-MoE?")
    # Tutel's own merge script leaves a plain number under `_num_global_experts`
    return {str(name): value for name, value in tensors.items() if isinstance(value, Tensor)}
