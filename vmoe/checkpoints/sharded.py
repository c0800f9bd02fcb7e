"""Checkpoints of sharded models: a folder with the shards of each rank. Any number of ranks can read it.

The tensors are in the format of torch.distributed.checkpoint (DCP). One file of plain types holds all else.
"""

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from vmoe.checkpoints.entry import ENTRY
from vmoe.errors import UserError

PLAIN_PART = "plain.pt"
_WEIGHTS, _OPTIMIZER, _AVERAGE = "weights/", "optimizer/", "ema/"  # prefixes of the names of a folder's tensors
_METADATA = ".metadata"
_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_METADATA_NAMES = {
    "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
    "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
}  # fmt: skip
_PICKLED = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("builtins", "set"),
}


def is_sharded(path: Path) -> bool:
    """Whether a path is a checkpoint folder."""
    return (path / PLAIN_PART).is_file() or (path / _METADATA).is_file()


class SafeReader(dcp.FileSystemReader):
    """DCP's reader, restricted to unpickle only the types that DCP itself writes into a folder's metadata.

    Raises:
        UserError: The metadata or a rank's file is missing, or the metadata hold anything else.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        folder = Path(self.path)
        try:
            with open(folder / _METADATA, "rb") as file:
                metadata = _Unpickler(file).load()
            files = sorted({info.relative_path for info in metadata.storage_data.values()})
        except OSError as error:
            raise UserError(f"{folder / _METADATA}: is missing; copy the folder again") from error
        except Exception as error:  # a damaged file makes the unpickler fail in any way it can
            raise UserError(f"{folder / _METADATA}: is damaged or foreign; copy the folder again") from error
        for name in files:
            if not (folder / name).is_file():
                raise UserError(f"{folder / name}: is missing, a part of this checkpoint; copy the folder again")
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # never allow a whole module: pickle follows dots in names, and modules hold what they import
        is_type = module == "torch" and (name == "Size" or isinstance(vars(torch).get(name), torch.dtype))
        if is_type or (module == _METADATA_MODULE and name in _METADATA_NAMES) or (module, name) in _PICKLED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong here")


def read_plain_part(path: Path) -> dict[str, Any]:
    """The content of a folder without its tensors.

    Raises:
        UserError: It is missing or damaged.
    """
    try:
        return torch.load(path / PLAIN_PART, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler fail in any way it can
        raise UserError(f"{path / PLAIN_PART}: is missing or damaged; copy the folder again") from error


def write_plain_part(folder: Path, plain: dict[str, Any]) -> None:
    """Writes the content of a folder without its tensors, and flushes it to the disk.

    Raises:
        OSError, RuntimeError: It cannot be written.
    """
    with open(folder / PLAIN_PART, "wb") as file:
        torch.save(plain, file)
        os.fsync(file.fileno())


def read_folder(path: Path) -> dict[str, Any]:
    """A folder's content as an ordinary checkpoint, on the CPU. The optimiser's state has parameter names as keys.

    Raises:
        UserError: A file of it is missing or damaged.
    """
    content = read_plain_part(path)
    reader = SafeReader(path)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # this process reads alone, on purpose
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    content["state_dict"] = _part(tensors, _WEIGHTS)
    states: dict[str, Any] = {}
    for name, value in _part(tensors, _OPTIMIZER).items():
        parameter, _, key = name.rpartition("/")
        states.setdefault(parameter, {})[key] = value
    content["optimizer_states"][0]["state"] = states
    if average := _part(tensors, _AVERAGE):
        content[ENTRY]["ema"]["weights"] = average
    return content


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def folder_tensors(
    weights: dict[str, Tensor], optimizer: dict[str, dict[str, Tensor]], average: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """All tensors of a checkpoint by their names in a folder.

    Args:
        weights: The state dict.
        optimizer: The optimiser's state of each parameter, by the parameter's name.
        average: The average of the weights (EMA), or None.
    """
    result = {f"{_WEIGHTS}{name}": value for name, value in weights.items()}
    for name, state in optimizer.items():
        result |= {f"{_OPTIMIZER}{name}/{key}": value for key, value in state.items()}
    return result | {f"{_AVERAGE}{name}": value for name, value in (average or {}).items()}


def take_average(content: dict[str, Any]) -> dict[str, Tensor] | None:
    """Removes the tensors of the average of the weights (EMA) from a checkpoint and returns them, or None."""
    ema = content[ENTRY].get("ema")
    return None if ema is None else ema.pop("weights")
