"""Reading a checkpoint's files: how much memory it takes, and what damaged, foreign and hostile files are told."""

import tracemalloc
from pathlib import Path

import msgpack
import numpy as np
import pytest
from support import jax_oracle
from support.jax_writer import INDEX_INFO, NDARRAY, SLICE_ND, write_checkpoint

import vmoe
from vmoe.errors import UserError
from vmoe.models.jax_checkpoint import open_checkpoint, read_into


@pytest.fixture
def prefix(tmp_path) -> Path:
    write_checkpoint(tmp_path / "x", jax_oracle.random_params(np.random.default_rng(0)))
    return tmp_path / "x"


def rewrite_index(prefix: Path, change) -> None:
    path = Path(f"{prefix}.index")
    content = msgpack.unpackb(path.read_bytes())
    change(content)
    path.write_bytes(msgpack.packb(content))


def rewrite_data(prefix: Path, change, number: int = 0) -> Path:
    path = Path(f"{prefix}.data-{number:05d}-of-00003")
    content = msgpack.unpackb(path.read_bytes())
    change(content)
    path.write_bytes(msgpack.packb(content))
    return path


def refusal(prefix: Path, **arguments) -> str:
    before = sorted(prefix.parent.iterdir())
    with pytest.raises(UserError) as caught:
        vmoe.load_jax_checkpoint(prefix, **arguments)
    assert sorted(prefix.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 4])
def test_peak_memory_is_the_model_and_a_window(tmp_path, shards, dtype):
    shape = (3, 1024, 1024)  # 12 MiB in float32, as one array of a file and with its axes turned
    rng = np.random.default_rng(0)
    params = {"Encoder/Moe/Mlp/x": rng.standard_normal(shape, np.float32), "y": rng.standard_normal(shape, np.float32)}
    write_checkpoint(tmp_path / "x", params, shards=shards, dtype=dtype)
    size = sum(value.nbytes for value in params.values())
    tracemalloc.start()
    leaves = open_checkpoint(tmp_path / "x")
    targets = {name: np.empty((1024, 1024, 3), np.float32).transpose(2, 1, 0) for name in params}
    read_into(leaves, targets)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size < peak < 1.3 * size
    assert all(np.allclose(targets[name], value, rtol=0.01) for name, value in params.items())


def test_a_missing_file_is_named(prefix):
    assert refusal(prefix.parent / "other").startswith(f"{prefix.parent / 'other.index'}: no such file")
    data = Path(f"{prefix}.data-00001-of-00003")
    data.unlink()
    assert refusal(prefix).startswith(f"{data}: no such file")


@pytest.mark.parametrize("suffix", ["index", "data-00000-of-00003", "data-00002-of-00003"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_file_cut_off_anywhere_is_named(prefix, suffix, share):
    path = Path(f"{prefix}.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: min(int(share * len(content)), len(content) - 1)])
    assert refusal(prefix).startswith(f"{path}: cut off")


@pytest.mark.parametrize("suffix", ["index", "data-00001-of-00003"])
@pytest.mark.parametrize(
    "content",
    [b"\x89PNG\r\n\x1a\n" + bytes(64), b"\x80", b"\x00", b"\xc1" * 9, msgpack.packb({"a": 1}), msgpack.packb([1, 2])],
    ids=["png", "empty_map", "zero", "never_used", "map", "array"],
)
def test_a_foreign_file_is_named(prefix, suffix, content):
    path = Path(f"{prefix}.{suffix}")
    path.write_bytes(content)
    assert refusal(prefix).startswith(f"{path}: ")


def test_a_data_file_with_something_behind_it_is_named(prefix):
    path = Path(f"{prefix}.data-00001-of-00003")
    path.write_bytes(path.read_bytes() + b"\x00")
    assert "more follows its end" in refusal(prefix)


def test_any_damaged_byte_is_refused_or_changes_only_values(prefix):
    path = Path(f"{prefix}.data-00001-of-00003")
    content = path.read_bytes()
    for place in range(0, len(content), 97):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            open_checkpoint(prefix)
        except UserError as error:
            assert str(error).startswith((f"{path}: ", str(prefix)))


def test_data_files_of_another_checkpoint(prefix, tmp_path):
    params = jax_oracle.random_params(np.random.default_rng(0), depth=1, moe=(0,))
    write_checkpoint(tmp_path / "y", params)
    data = Path(f"{prefix}.data-00000-of-00003")
    data.write_bytes(Path(f"{tmp_path / 'y'}.data-00000-of-00003").read_bytes())
    assert refusal(prefix).startswith(f"{data}: ")


@pytest.mark.parametrize(
    "array", [((4,), "float32", bytes(16)), ((5,), "float64", bytes(40)), ((10,), "bfloat16", bytes(20))]
)
def test_an_array_that_is_not_what_the_index_says(prefix, array):
    numbers = sorted(open_checkpoint(prefix), key=lambda name: name.split("/"))

    def change(content):
        for arrays, _ in content.get(str(numbers.index("head/bias")), []):
            arrays[:] = [msgpack.ExtType(NDARRAY, msgpack.packb(array))]

    for number in range(3):
        rewrite_data(prefix, change, number)
    assert "head/bias[0:5] is not the 20 bytes of float32" in refusal(prefix)


def test_another_version_of_the_format(prefix):
    rewrite_index(prefix, lambda content: content.update(version="20300101"))
    assert "20300101" in refusal(prefix)


def packed_info(shape, dtype, bounds, shards) -> msgpack.ExtType:
    slices = [msgpack.packb([msgpack.packb((*pair, None)) for pair in chunk]) for chunk in bounds]
    return msgpack.ExtType(INDEX_INFO, msgpack.packb((msgpack.packb((shape, dtype, False, {})), slices, shards)))


HUGE = 2**40
HOSTILE_INFOS = {
    "huge_shape": packed_info((HUGE, HUGE), "float32", [((0, HUGE), (0, HUGE))], [0]),
    "negative_shape": packed_info((-1,), "float32", [((0, 1),)], [0]),
    "overlap": packed_info((5,), "float32", [((0, 4),), ((1, 5),)], [0, 0]),
    "gap": packed_info((5,), "float32", [((0, 2),), ((3, 5),)], [0, 0]),
    "twice": packed_info((5,), "float32", [((0, 5),), ((0, 5),)], [0, 0]),
    "diagonal": packed_info((2, 2), "float32", [((0, 1), (0, 1)), ((1, 2), (1, 2))], [0, 0]),
    "shard_that_is_not": packed_info((5,), "float32", [((0, 5),)], [9]),
    "negative_shard": packed_info((5,), "float32", [((0, 5),)], [-1]),
    "object": packed_info((5,), "object", [((0, 5),)], [0]),
    "integers": packed_info((5,), "int32", [((0, 5),)], [0]),
    "no_shards": packed_info((5,), "float32", [((0, 5),)], []),
    "many_arrays": msgpack.ExtType(INDEX_INFO, b"\xdd\x7f\xff\xff\xff" * 100),
    "nonsense": msgpack.ExtType(INDEX_INFO, b"\x93\x01\x02\x03"),
    "another_type": msgpack.ExtType(NDARRAY, msgpack.packb(((5,), "float32", bytes(20)))),
    "text": "head/bias",
}


@pytest.mark.parametrize("name", HOSTILE_INFOS)
def test_a_hostile_index_allocates_nothing(prefix, name):
    rewrite_index(prefix, lambda content: content["index"]["head"].update(bias=HOSTILE_INFOS[name]))
    tracemalloc.start()
    assert "head/bias" in refusal(prefix)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_hostile_data_file_allocates_nothing(prefix):
    def change(content):
        number = next(key for key in content if key.isdecimal())
        raw = b"\x93\x91\xcf" + HUGE.to_bytes(8, "big") + b"\xa7float32\xc6\xff\xff\xff\xff"
        content[number] = [[[msgpack.ExtType(NDARRAY, raw)], msgpack.ExtType(SLICE_ND, b"\x90")]]

    path = rewrite_data(prefix, change)
    tracemalloc.start()
    assert refusal(prefix).startswith(f"{path}: ")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_deeply_nested_index(prefix):
    Path(f"{prefix}.index").write_bytes(b"\x81\xa1a" * 100_000 + b"\x00")
    refusal(prefix)


WRONG = {
    "missing": (
        lambda p: p.pop("Encoder/encoderblock_1/LayerNorm_0/scale"),
        "lacks Encoder/encoderblock_1/LayerNorm_0/sc",
    ),
    "missing_first": (lambda p: p.pop("embedding/kernel"), "lacks embedding/kernel"),
    "missing_router": (
        lambda p: p.pop("Encoder/encoderblock_1/Moe/Router/dense/kernel"),
        "lacks Encoder/encoderblock_1/Moe",
    ),
    "unknown": (lambda p: p.update({"MapHead/probe": np.zeros((1, 1, 16))}), "MapHead/probe"),
    "shape": (lambda p: p.update({"head/bias": np.zeros(6)}), "head/bias has shape (6,)"),
    "axes": (lambda p: p.update({"embedding/kernel": np.zeros((4, 4))}), "embedding/kernel has shape (4, 4)"),
    "heads": (
        lambda p: p.update({"Encoder/encoderblock_0/SelfAttention/query/kernel": np.zeros((16, 3, 5))}),
        "num_heads",
    ),
    "no_square": (
        lambda p: p.update({"Encoder/posembed_input/pos_embedding": np.zeros((1, 9, 16))}),
        "no square of patches",
    ),
    "gap_in_blocks": (
        lambda p: p.update({"Encoder/encoderblock_3/LayerNorm_0/scale": np.zeros(16)}),
        "without a gap",
    ),
    "ensemble": (
        lambda p: p.update({"Encoder/encoderblock_1/Moe/Router/dense/kernel": np.zeros((16, 4, 1))}),
        "top_k=2: must be at most 1 with ensemble=4",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_tensors_that_make_no_model(name, tmp_path):
    change, message = WRONG[name]
    params = jax_oracle.random_params(np.random.default_rng(0))
    change(params)
    write_checkpoint(tmp_path / "x", params)
    text = refusal(tmp_path / "x")
    assert text.startswith(f"{tmp_path / 'x'}: ") and message in text


BAD_ARGUMENTS = {
    "router": {"router": "cosine"},
    "soft": {"router": "soft"},
    "capacity_factor": {"router": "expert_choice"},
    "lower it": {"router": "expert_choice", "capacity_factor": 9.0},
    "top_k": {"top_k": 5},
    "capacity_rounding": {"capacity_rounding": "floor"},
    "group": {"group_images": 0},
    "img_size": {"img_size": 13},
    "batch_priority": {"router": "expert_choice", "capacity_factor": 1.0, "batch_priority": True},
}


@pytest.mark.parametrize("word", BAD_ARGUMENTS)
def test_arguments_that_do_not_go_with_the_tensors(prefix, word):
    assert word in refusal(prefix, **BAD_ARGUMENTS[word])


def test_a_capacity_factor_that_is_not_that_of_the_slots(tmp_path):
    write_checkpoint(
        tmp_path / "x", jax_oracle.random_params(np.random.default_rng(0), slots=2)
    )  # 10 tokens, 4 experts
    vmoe.load_jax_checkpoint(tmp_path / "x", router="soft", capacity_factor=0.8)
    vmoe.load_jax_checkpoint(tmp_path / "x", router="soft", capacity_multiple_of=4)
    assert "gives 5 slots" in refusal(tmp_path / "x", router="soft", capacity_factor=2.0)
    assert "router" in refusal(tmp_path / "x", router="expert_choice", capacity_factor=1.0)
