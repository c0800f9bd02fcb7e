"""Checkpoint folders: each process writes its parts of the tensors, through torch.distributed.checkpoint."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from vmoe.checkpoint_folders import PLAIN_PART, SafeReader
from vmoe.errors import UserError
from vmoe.files import new_folder
from vmoe.training.processes import Place, gather, together


def save_folder(tensors: dict[str, Tensor], plain: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint folder beside its place and renames it; all processes must call it.

    Args:
        tensors: Of this process, by names that are the same in all.
        plain: All else, of the first process.
        path: The folder.

    Raises:
        UserError: one of them cannot write; what was there before stays.
    """
    with ExitStack() as stack:
        is_first = Place.of_this().is_first
        folder = together(lambda: stack.enter_context(new_folder(path)) if is_first else None)
        folder = gather(folder)[0]
        together(lambda: _write_tensors(tensors, folder, path))
        together(lambda: _write_plain(plain, folder / PLAIN_PART, path) if is_first else None)
        together(stack.close)


def _write_tensors(tensors: dict[str, Tensor], folder: Path, path: Path) -> None:
    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder))
    except CheckpointException as failed:  # in all processes; it knows what failed in each
        error = next(iter(failed.failures.values()))[0]
        raise UserError(_line(path, error), everywhere=True) from error


def _write_plain(plain: dict[str, Any], file: Path, path: Path) -> None:
    try:
        with open(file, "wb") as opened:
            torch.save(plain, opened)
            os.fsync(opened.fileno())
    except (OSError, RuntimeError) as error:  # what torch makes of a failed write
        raise UserError(_line(path, error)) from error


def _line(path: Path, error: BaseException) -> str:
    reason = " ".join(str(error).split())[:100]
    return f"{path}: cannot be written ({reason}); is the disk full?"


def load_tensors(targets: dict[str, Tensor], path: Path) -> None:
    """Fills tensors, each process its parts of them, from a checkpoint folder; all processes must call it.

    Raises:
        UserError: the folder lacks some: other parameters were Muon's, which it is where matrices are whole.
    """
    reader = SafeReader(path)
    missing = targets.keys() - reader.read_metadata().state_dict_metadata.keys()
    if missing:
        raise UserError(
            f"{path}: has no {min(missing)}: optim.name=muon took other matrices with those processes; go on with as "
            "many, or with parallel.expert_size of all of them",
            everywhere=True,
        )
    dcp.load(targets, storage_reader=reader)
