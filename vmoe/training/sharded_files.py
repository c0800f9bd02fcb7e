"""Checkpoint folders: each process writes its parts of the tensors, through torch.distributed.checkpoint."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from vmoe.checkpoint_folders import PLAIN_PART, SafeReader
from vmoe.files import replace
from vmoe.training.processes import Place, together, wait_for_all


def save_folder(tensors: dict[str, Tensor], plain: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint folder beside its place and renames it; all processes must call it.

    Args:
        tensors: Of this process, by names that are the same in all.
        plain: All else, of the first process.
        path: The folder.
    """
    temporary = path.with_name(f".{path.name}.new")
    is_first = Place.of_this().is_first
    if is_first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    wait_for_all()
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary))

    def finish() -> None:
        if is_first:
            with open(temporary / PLAIN_PART, "wb") as file:
                torch.save(plain, file)
                os.fsync(file.fileno())
            replace(temporary, path)

    together(finish)


def load_tensors(targets: dict[str, Tensor], path: Path) -> None:
    """Fills tensors, each process its parts of them, from a checkpoint folder; all processes must call it."""
    dcp.load(targets, storage_reader=SafeReader(path))
