"""Files and names made to harm: nothing in them runs, nothing is written elsewhere, and the terminal stays itself."""

import io
import json
import os
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import saved_runs

from vmoe.checkpoints import ENTRY, load_checkpoint
from vmoe.cli.main import main
from vmoe.errors import UserError
from vmoe.text import printable

MOE = {"num_experts": 4, "top_k": 2}
CLEAR = "\x1b[2J\x1b[31m"
SCRIPT = "<img src=x onerror=alert(1)>"
NAMES = [
    f"{SCRIPT}.png",
    f"{CLEAR}cleared.png",
    "two\nlines.png",
    "\u202egnp.exe.png",
    "$(touch hacked).png",
    "--out.png",
    "a" * 240 + ".png",
    os.fsdecode(b"\xff\xfe.png"),
    "[bold]markup[red].png",
]


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8))
    for name in NAMES:
        picture.save(folder / "plain.png")
        (folder / "plain.png").rename(folder / name)
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    names = (SCRIPT, CLEAR, "a\nb", "\u202etac", "", "[/bold]", *"6789")
    return saved_runs.save_run(tmp_path / "run", MOE, class_names=names)


def _state(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


TOOLS = [
    ["predict", "{run}", "{pictures}", "--routing", "--json", "{out}/a.json", "--csv", "{out}/a.csv"],
    ["evaluate", "{run}", "--out", "{out}"],
]
SLOW_TOOLS = [
    ["heatmap", "{run}", "{pictures}", "--out", "{out}", "--layers", "1"],
    ["explore", "{run}", "--images", "{pictures}", "--out", "{out}", "--replicates", "20", "--probe-images", "0"],
]


@pytest.mark.parametrize(
    "arguments",
    [
        *(pytest.param(arguments, id=arguments[0]) for arguments in TOOLS),
        *(pytest.param(arguments, id=arguments[0], marks=pytest.mark.slow) for arguments in SLOW_TOOLS),
    ],
)
def test_names_that_are_commands(tmp_path, monkeypatch, capsys, run, pictures, arguments):
    monkeypatch.chdir(tmp_path)
    before, out = _state(tmp_path), tmp_path / "out"
    filled = [part.format(run=run, pictures=pictures, out=out) for part in arguments]
    assert main(filled) == 0, capsys.readouterr().err
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert "\x1b" not in text and "\u202e" not in text and "two\nlines" not in text
    added = _state(tmp_path) - before
    assert added and all(path == out or out in path.parents for path in added)
    for page in out.glob("*.html"):
        assert SCRIPT not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_is_not_utf_8(tmp_path, monkeypatch, run, encoding):
    """The job ends as elsewhere; what the terminal lacks is a question mark."""
    picture, meant = tmp_path / "café ✓.png", b"caf\xe9 ?.png" if encoding == "latin-1" else b"caf? ?.png"
    Image.new("RGB", (16, 16)).save(picture)
    shown = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in shown.items():
        monkeypatch.setattr(sys, name, stream)
    assert main(["predict", str(run), str(picture)]) == 0
    assert main(["evaluate", str(run), "--out", str(tmp_path / "out")]) == 0
    assert main(["predict", "✓", str(picture)]) == 2 and main(["✓"]) == 2
    out, error = (stream.flush() or stream.buffer.getvalue() for stream in shown.values())
    assert meant in out and b"top-1" in out
    assert b"vmoe predict: error: ?: no such file" in error and b"'?' is no job" in error


def test_a_name_that_the_locale_made_unreadable_is_shown_as_it_is_meant():
    """As Python has it in a C locale without UTF-8; only names in other bytes stay escaped."""
    unreadable = "café".encode().decode("ascii", "surrogateescape")
    assert printable(f"{unreadable} \udcff") == "café \\udcff" and printable("\ud800") == "\\ud800"


def test_an_error_s_line_is_one_line_whatever_the_name(tmp_path, capsys, run):
    name = tmp_path / f"{CLEAR}a\nb\u202e.png"
    assert main(["predict", str(run), str(name)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "\x1b" not in error and "\u202e" not in error and r"\x1b[2J" in error


@pytest.mark.parametrize("member", ["../../hacked.png", "/tmp/hacked-by-a-shard.png", "link"])
def test_tar_members_that_leave_their_folder_are_only_names(tmp_path, monkeypatch, member):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    folder = tmp_path / "shards"
    folder.mkdir()
    for split in ("train", "val"):
        with tarfile.open(folder / f"{split}-0.tar", "w") as tar:
            for key in range(4):
                _add(tar, f"{key}.png", picture.getvalue())
                _add(tar, f"{key}.cls", b"0")
            if member == "link":
                link = tarfile.TarInfo("9.png")
                link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(link)
            else:
                _add(tar, member, picture.getvalue())
                _add(tar, member.replace(".png", ".cls"), b"0")
    monkeypatch.chdir(tmp_path)
    before = _state(tmp_path)
    recipe = [
        "--data.name",
        "webdataset",
        "--data.root",
        str(folder),
        "--data.image_size",
        "16",
        "--data.batch_size",
        "4",
    ]
    small = [f"--model.kwargs.{name}={value}" for name, value in saved_runs.KWARGS.items()]
    assert (
        main(["train", *recipe, *small, "--trainer.epochs", "1", "--trainer.device", "cpu", "--output_dir", "run"]) == 0
    )
    added = {path for path in _state(tmp_path) - before if tmp_path / "run" not in path.parents}
    assert added == {tmp_path / "run", *(folder / f"index-{split}.npz" for split in ("train", "val"))}
    assert not Path("/tmp/hacked-by-a-shard.png").exists()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _train_on(path: Path, name: str, capsys) -> str:
    arguments = ["train", "--data.name", name, "--data.root", str(path), "--trainer.device", "cpu"]
    assert main([*arguments, "--output_dir", str(path.parent / "new")]) == 2
    assert not (path.parent / "new").exists()
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_tar_that_promises_a_terabyte(tmp_path, capsys):
    for split in ("train", "val"):
        info = tarfile.TarInfo("0.png")
        info.size = 2**40
        (tmp_path / f"{split}-0.tar").write_bytes(info.tobuf() + bytes(1024))
    assert "train-0.tar: is damaged" in _train_on(tmp_path, "webdataset", capsys)


@pytest.mark.parametrize("shape", ["(1099511627776,)", "(" * 200 + ")" * 200, "(-1,)", "__import__('os')"])
def test_an_npz_that_promises_a_terabyte(tmp_path, capsys, shape):
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("train_x", "train_y", "test_x", "test_y"):
            archive.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    assert "x.npz: cannot be read as an .npz file" in _train_on(path, "npz", capsys)


def _bomb(levels: int = 30) -> str:
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{level}: &a{level} [*a{level - 1}, *a{level - 1}]" for level in range(1, levels)]
    return "model: {kwargs: {" + ", ".join(lines) + "}}"


@pytest.mark.parametrize(
    ("text", "told"),
    [(_bomb(), "too large"), ("model: " + "[" * 5000, "not YAML"), ("model: {kwargs: &a {b: *a}}", "too large")],
    ids=["billion laughs", "deep", "in itself"],
)
def test_yaml_that_grows_without_end(tmp_path, capsys, text, told):
    (tmp_path / "bomb.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "bomb.yaml"), "--output_dir", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and told in error and not (tmp_path / "new").exists()


@pytest.mark.parametrize("length", [2**63, 2**32, 10, 0])
def test_safetensors_headers(tmp_path, length):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b'{"a":' * 50_000)
    with pytest.raises(UserError, match=r"x\.safetensors"):
        load_checkpoint(path)


def test_metadata_without_end(tmp_path):
    header = json.dumps({"__metadata__": {ENTRY: "[" * 100_000}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(UserError, match=r"x\.safetensors"):
        load_checkpoint(path)


ARGUMENTS = {
    "a path that is opened": {"checkpoint_path": "{hacked}"},
    "weights that are fetched": {"pretrained": True, "pretrained_cfg": {"file": "{hacked}"}},
    "a class by its path": {"act_layer": "os.system"},
    "a module": {"block_fn": "timm.models.vision_transformer.Block"},
    "a cache elsewhere": {"cache_dir": "{hacked}"},
    "a lambda": {"norm_layer": "lambda: __import__('os').mkdir('hacked')"},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_model_arguments_that_name_code_or_places(tmp_path, monkeypatch, name):
    """Either they have no effect, or the checkpoint is refused."""
    monkeypatch.chdir(tmp_path)
    content = saved_runs.content(MOE)
    hacked = tmp_path / "hacked"
    for key, value in ARGUMENTS[name].items():
        text = json.dumps(value).replace("{hacked}", str(hacked))
        content[ENTRY]["config"]["model"]["kwargs"] = saved_runs.KWARGS | {key: json.loads(text)}
    torch.save(content, tmp_path / "x.ckpt")
    try:
        load_checkpoint(tmp_path / "x.ckpt")
    except UserError as error:
        assert str(error).startswith(str(tmp_path / "x.ckpt"))
    assert {path.name for path in tmp_path.iterdir()} == {"x.ckpt"}
