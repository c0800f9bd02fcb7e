"""Reads the checkpoint format of google-research/vmoe, without JAX.

A checkpoint PREFIX is PREFIX.index, which describes the tensors, and PREFIX.data-nnnnn-of-NNNNN with their values in
chunks: an expert tensor is split along its experts. Every file is one msgpack object. Data files are never unpacked as
a whole. A first pass over their headers finds the chunks and checks the file. Then the values are copied to their
targets in small pieces.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgpack
import numpy as np

from vmoe.errors import UserError
from vmoe.models.msgpack_headers import Headers

VERSION = "20220622"
_CHUNK_MARK = "__msgpack_array_chunk_a87ca2__"
_SLICE_ND, _INDEX_INFO = 6, 8  # the format's msgpack extension types
_STORED_DTYPES = {"float32": "<f4", "float64": "<f8", "float16": "<f2", "bfloat16": "<u2"}
_WINDOW = 2**20  # bytes copied at a time
_MAX_INDEX = 2**26  # bytes; a checkpoint of thousands of chunks has an index of some hundred kB
_MAX_CHUNKS = 2**16  # per tensor; bounds the memory that msgpack allocates before it has read the entries

Bounds = tuple[tuple[int, int], ...]  # start and stop along each axis


class Chunk(NamedTuple):
    """A part of a tensor: its bounds in the tensor, and its byte ranges (offset, length) in a data file."""

    bounds: Bounds
    path: Path
    ranges: tuple[tuple[int, int], ...]


class Leaf(NamedTuple):
    """A tensor of a checkpoint. Its chunks cover it exactly once, and their bytes exist."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]


class _Entry(NamedTuple):
    """A tensor's entry in the index: its chunks' bounds, and the data file of each."""

    shape: tuple[int, ...]
    dtype: str
    bounds: tuple[Bounds, ...]
    shards: tuple[int, ...]


class _Stored(NamedTuple):
    """A chunk's entry in a data file."""

    dtypes: frozenset[str]
    ranges: tuple[tuple[int, int], ...]


def open_checkpoint(prefix: str | Path) -> dict[str, Leaf]:
    """Finds the model's parameters in a checkpoint, without reading their values.

    The parameters may be at the top level or, beside an optimiser's state, under `params`. All else is left out.

    Args:
        prefix: The files' common path, without `.index`.

    Returns:
        The leaves by name, such as "Encoder/encoderblock_0/LayerNorm_0/scale".

    Raises:
        UserError: A file is missing, cut off, foreign, or does not match the others.
    """
    index_path = Path(f"{prefix}.index")
    shard_count, tree = _read_index(index_path)
    wrapped = isinstance(tree.get("params"), dict) and "embedding" not in tree
    root = "params/" if wrapped else ""
    data = [Path(f"{prefix}{suffix}") for suffix in _data_suffixes(shard_count)]
    stored = [_scan_data_file(path) for path in data]

    leaves = {}
    # A leaf's number in the data files is its position when keys are sorted as strings at every level
    for number, (name, packed) in enumerate(_flatten(tree)):
        if name.startswith(root):
            entry = _read_entry(packed, f"{index_path}: {name}")
            leaves[name.removeprefix(root)] = _find_chunks(entry, number, name, data, stored)
    return leaves


def data_suffixes(prefix: str | Path) -> list[str]:
    """The suffixes of a checkpoint's data files after its prefix, from its index.

    Raises:
        UserError: The index is missing, cut off or foreign.
    """
    return _data_suffixes(_read_index(Path(f"{prefix}.index"))[0])


def _data_suffixes(shard_count: int) -> list[str]:
    return [f".data-{number:05d}-of-{shard_count:05d}" for number in range(shard_count)]


def read_into(leaves: dict[str, Leaf], targets: dict[str, np.ndarray]) -> None:
    """Copies tensors into arrays of their shapes, one data file after the other, with a window of 1 MiB.

    Args:
        leaves: The result of `open_checkpoint`.
        targets: The target of each name: a float32 array, or a view with any strides.

    Raises:
        UserError: A file has changed or cannot be read.
    """
    by_file: dict[Path, list[tuple[Chunk, str, np.ndarray]]] = {}
    for name, target in targets.items():
        for chunk in leaves[name].chunks:
            part = target[
                (*(slice(*bounds) for bounds in chunk.bounds), ...)
            ]  # with the ellipsis a scalar is a view too
            by_file.setdefault(chunk.path, []).append((chunk, leaves[name].dtype, part))
    for path, parts in by_file.items():
        try:
            with open(path, "rb") as file:
                for chunk, dtype, part in parts:
                    _copy_values(part, _Values(file, chunk.ranges, dtype))
        except (OSError, EOFError) as error:
            raise UserError(f"{path}: cannot be read ({error}); fetch it again") from error


class _Values:
    """Reads the numbers of a chunk in turn from the byte ranges of its file."""

    def __init__(self, file: BinaryIO, ranges: tuple[tuple[int, int], ...], dtype: str) -> None:
        self._file, self._ranges, self._dtype = file, list(ranges), dtype

    def take(self, count: int) -> np.ndarray:
        raw = bytearray(count * np.dtype(_STORED_DTYPES[self._dtype]).itemsize)
        view = memoryview(raw)
        while view:
            offset, length = self._ranges.pop(0)
            here = min(length, len(view))
            self._file.seek(offset)
            if self._file.readinto(view[:here]) != here:
                raise EOFError("it is shorter than it was")
            if here < length:
                self._ranges.insert(0, (offset + here, length - here))
            view = view[here:]
        values = np.frombuffer(raw, _STORED_DTYPES[self._dtype])
        # bfloat16 is the upper half of a float32
        return (values.astype("<u4") << 16).view("<f4") if self._dtype == "bfloat16" else values


def _copy_values(part: np.ndarray, values: _Values) -> None:
    """Writes the next numbers into `part` in C order, in pieces of at most the window if the last axis allows it."""
    if part.nbytes <= _WINDOW or part.ndim <= 1:
        part[...] = values.take(part.size).reshape(part.shape)
        return
    rows = max(1, _WINDOW * len(part) // part.nbytes)
    for start in range(0, len(part), rows):
        _copy_values(part[start] if rows == 1 else part[start : start + rows], values)


def _read_index(path: Path) -> tuple[int, dict]:
    """The number of data files and the tree of packed entries."""
    size = _file_size(path)
    if size > _MAX_INDEX:
        raise UserError(f"{path}: {size} bytes is too large for the index of a checkpoint; is it another file?")
    content = _unpack_msgpack(path.read_bytes(), str(path), raw=False, max_array_len=0)
    if not isinstance(content, dict) or not isinstance(content.get("index"), dict):
        raise UserError(f"{path}: not the index of a V-MoE checkpoint; give the prefix of its files")
    if content.get("version") != VERSION:
        raise UserError(f"{path}: version {content.get('version')!r} of the format; only {VERSION!r} can be read")
    shard_count = content.get("shard_count")
    if type(shard_count) is not int or not 1 <= shard_count <= 99_999:
        raise UserError(f"{path}: shard_count={shard_count!r} must be a number of files; is it damaged?")
    return shard_count, content["index"]


def _flatten(tree: dict, parent: str = "") -> Iterator[tuple[str, object]]:
    for key in sorted(tree):
        value = tree[key]
        if isinstance(value, dict):
            yield from _flatten(value, f"{parent}{key}/")
        elif value is not None:  # None is no leaf in JAX
            yield f"{parent}{key}", value


def _read_entry(packed: object, where: str) -> _Entry:
    if not isinstance(packed, msgpack.ExtType) or packed.code != _INDEX_INFO:
        raise UserError(f"{where} is no description of a tensor; is the file damaged?")
    try:
        shaped, slices, shards = _unpack_msgpack(packed.data, where)
        shape, dtype, _, _ = _unpack_msgpack(shaped, where)
        bounds = tuple(_bounds(_unpack_msgpack(slice_nd, where), where) for slice_nd in slices)
        entry = _Entry(tuple(shape), dtype.decode(), bounds, tuple(shards))
        if not all(type(extent) is int and extent > 0 for extent in entry.shape):
            raise ValueError(f"shape {entry.shape}")
        if len(entry.shards) != len(bounds) or not _covers(bounds, entry.shape):
            raise ValueError(f"its chunks do not make up the shape {entry.shape}")
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{where} is described wrongly ({error}); is the file damaged?") from error
    if entry.dtype not in _STORED_DTYPES:
        raise UserError(f"{where} has dtype {entry.dtype}; a parameter can be one of {', '.join(_STORED_DTYPES)}")
    return entry


def _bounds(packed_slices: list, where: str) -> Bounds:
    bounds = []
    for packed in packed_slices:
        start, stop, step = _unpack_msgpack(packed, where)
        if step not in (None, 1) or type(start) is not int or type(stop) is not int or not 0 <= start < stop:
            raise ValueError(f"slice {start}:{stop}:{step}")
        bounds.append((start, stop))
    return tuple(bounds)


def _covers(chunks: tuple[Bounds, ...], shape: tuple[int, ...]) -> bool:
    """Whether the chunks form a grid that covers the whole tensor, each cell once."""
    if any(len(bounds) != len(shape) for bounds in chunks) or len(set(chunks)) != len(chunks):
        return False
    cells = 1
    for axis, extent in enumerate(shape):
        pieces = sorted({bounds[axis] for bounds in chunks})
        ends = [0, *(stop for _, stop in pieces)]
        if [start for start, _ in pieces] != ends[:-1] or ends[-1] != extent:
            return False
        cells *= len(pieces)
    return cells == len(chunks)


def _find_chunks(
    entry: _Entry, number: int, name: str, data: list[Path], stored: list[dict[tuple[int, Bounds], _Stored]]
) -> Leaf:
    """Finds the chunks of a leaf in the data files."""
    itemsize = np.dtype(_STORED_DTYPES[entry.dtype]).itemsize
    chunks = []
    for bounds, shard in zip(entry.bounds, entry.shards, strict=True):
        if type(shard) is not int or not 0 <= shard < len(data):
            raise UserError(f"{data[0]}: the index looks for {name} in data file {shard} of {len(data)}")
        path, found = data[shard], stored[shard].get((number, bounds))
        if found is None:
            raise UserError(
                f"{path}: lacks {name}[{_show(bounds)}], which the index says is there; fetch all files again"
            )
        size = math.prod(stop - start for start, stop in bounds) * itemsize
        if found.dtypes != {entry.dtype} or sum(length for _, length in found.ranges) != size:
            raise UserError(f"{path}: {name}[{_show(bounds)}] is not the {size} bytes of {entry.dtype} the index says")
        chunks.append(Chunk(bounds, path, found.ranges))
    return Leaf(entry.shape, entry.dtype, tuple(chunks))


def _show(bounds: Bounds) -> str:
    return ", ".join(f"{start}:{stop}" for start, stop in bounds)


def _scan_data_file(path: Path) -> dict[tuple[int, Bounds], _Stored]:
    """The position of each chunk in a data file, by the leaf's number and the chunk's bounds."""
    size = _file_size(path)
    chunks, is_marked = {}, False
    try:
        with open(path, "rb") as file:
            headers = Headers(file, size)
            for _ in range(headers.expect("map")):
                key = headers.text()
                if key == _CHUNK_MARK:
                    is_marked = headers.expect("bool") == 1
                    continue
                for _ in range(headers.expect("array")):
                    if headers.expect("array") != 2:
                        raise ValueError("a chunk is a pair")
                    arrays = [headers.ndarray() for _ in range(headers.expect("array"))]
                    bounds = _bounds(_unpack_msgpack(headers.extension(_SLICE_ND), str(path)), str(path))
                    dtypes = frozenset(dtype for dtype, _ in arrays)
                    chunks[int(key), bounds] = _Stored(dtypes, tuple(where for _, where in arrays))
            if file.tell() != size:
                raise ValueError("more follows its end")
    except EOFError as error:
        raise UserError(f"{path}: cut off, {size} bytes are not all of it; fetch it again") from error
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a data file of a V-MoE checkpoint ({error}); fetch it again") from error
    if not is_marked:
        raise UserError(f"{path}: not a data file of a V-MoE checkpoint; fetch it again")
    return chunks


def _unpack_msgpack(packed: bytes, where: str, raw: bool = True, max_array_len: int = _MAX_CHUNKS):
    try:
        return msgpack.unpackb(packed, raw=raw, strict_map_key=not raw, max_array_len=max_array_len)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise UserError(f"{where}: cut off or not msgpack ({error or type(error).__name__}); fetch it again") from error


def _file_size(path: Path) -> int:
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such file; give the prefix of a checkpoint's files and fetch all of them")
        return os.stat(path).st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
