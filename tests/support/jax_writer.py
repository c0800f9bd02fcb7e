"""Writes checkpoints in the format of google-research/vmoe, to read them back."""

import msgpack
import numpy as np

NDARRAY, SLICE_ND, INDEX_INFO = 1, 6, 8
MARK = "__msgpack_array_chunk_a87ca2__"


def write_checkpoint(prefix, params, *, shards=3, dtype="float32", largest_array=None, beside=None):
    """Writes `params`, arrays by names with slashes.

    Args:
        prefix: The path without suffix.
        params: The arrays.
        shards: Number of data files. Tensors of experts are split by expert and spread over them.
        dtype: The stored type; bfloat16 truncates a float32.
        largest_array: The most numbers of an array in a file; larger chunks are split. None never splits.
        beside: Further entries at the top, by name. Then `params` goes under "params".
    """
    if beside is not None:
        params = {**{f"params/{name}": value for name, value in params.items()}, **beside}
    # the order of leaves: keys are sorted as strings at each level, not whole paths
    names = sorted(params, key=lambda name: name.split("/"))
    files = [{MARK: True} for _ in range(shards)]
    index, turn = {}, 0
    for number, name in enumerate(names):
        value = np.asarray(params[name])
        pieces = (
            [[(i, i + 1)] for i in range(len(value))] if "/Moe/Mlp/" in name else [[(0, n)] for n in value.shape[:1]]
        )
        all_bounds, homes = [], []
        for piece in pieces or [[]]:
            bounds = [*piece, *((0, extent) for extent in value.shape[1:])]
            flat = value[tuple(slice(*pair) for pair in bounds)].reshape(-1)
            step = largest_array or flat.size
            arrays = [_ndarray(flat[i : i + step], dtype) for i in range(0, flat.size, step)]
            home = turn % shards
            files[home].setdefault(str(number), []).append([arrays, msgpack.ExtType(SLICE_ND, _slices(bounds))])
            all_bounds.append(_slices(bounds))
            homes.append(home)
            turn += 1
        shaped = msgpack.packb((value.shape, _name_of(value, dtype), False, {}))
        *parents, last = name.split("/")
        level = index
        for parent in parents:
            level = level.setdefault(parent, {})
        level[last] = msgpack.ExtType(INDEX_INFO, msgpack.packb((shaped, all_bounds, homes)))
    for number, content in enumerate(files):
        _write(f"{prefix}.data-{number:05d}-of-{shards:05d}", content)
    _write(f"{prefix}.index", {"shard_count": shards, "index": index, "version": "20220622"})


def cut_to_bfloat16(value):
    """The float32 whose lower half is zero."""
    return (np.asarray(value, np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


def _write(path, content):
    with open(path, "wb") as file:
        file.write(msgpack.packb(content))


def _slices(bounds) -> bytes:
    return msgpack.packb([msgpack.packb((start, stop, None)) for start, stop in bounds])


def _name_of(value, dtype):
    return dtype if value.dtype.kind == "f" else value.dtype.name


def _ndarray(flat, dtype):
    dtype = _name_of(flat, dtype)
    if dtype == "bfloat16":
        raw = (flat.astype(np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    else:
        raw = flat.astype(dtype).tobytes()
    return msgpack.ExtType(NDARRAY, msgpack.packb((flat.shape, dtype, raw)))
