"""Opening checkpoints: what comes back, and what a file that is not one is told."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import vmoe
from vmoe.checkpoints import (
    ENTRY,
    RunFolder,
    build_model,
    find_checkpoint,
    load_checkpoint,
    write_safetensors,
)
from vmoe.checkpoints.entry import FORMAT_VERSION
from vmoe.errors import UserError
from vmoe.moe import MoeConfig

KWARGS = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
MOE = {"num_experts": 2, "top_k": 1, "layers": [1]}


def _content(**changes) -> dict:
    model = vmoe.create_model("vit_tiny_patch16_224", MoeConfig(**MOE), num_classes=3, img_size=16, **KWARGS)
    ours = {
        "version": FORMAT_VERSION,
        "config": {"seed": 1, "model": {"name": "vit_tiny_patch16_224", "kwargs": KWARGS}, "moe": MOE},
        "class_names": ["a", "b", "c"],
        "image_size": 16,
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "epochs_done": 4,
    }
    weights = {f"model.{key}": value for key, value in model.state_dict().items()}
    return {ENTRY: ours | changes, "global_step": 40, "state_dict": weights}


def _save(path, **changes):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(_content(**changes), path)
    return path


def test_everything_comes_back(tmp_path):
    path = _save(tmp_path / "x.ckpt")
    checkpoint = load_checkpoint(str(path))
    assert (checkpoint.epoch, checkpoint.step, checkpoint.image_size, checkpoint.path) == (4, 40, 16, path)
    assert checkpoint.class_names == ["a", "b", "c"]
    assert (checkpoint.mean, checkpoint.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert checkpoint.config["seed"] == 1
    assert not checkpoint.model.training
    assert [layer.num_experts for _, layer in vmoe.moe_layers(checkpoint.model)] == [2]
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(saved[f"model.{key}"], value) for key, value in checkpoint.model.state_dict().items())


def test_a_run_s_folder_stands_for_its_best_else_its_last_checkpoint(tmp_path):
    folder = RunFolder(tmp_path)
    _save(folder.last)
    assert find_checkpoint(tmp_path) == folder.last
    _save(folder.best)
    assert find_checkpoint(tmp_path) == folder.best


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_weights_to_share(tmp_path, dtype):
    data = {"name": "npz", "root": "/home/someone/secret.npz"}
    config = _content()[ENTRY]["config"] | {"data": data, "output_dir": "/home/someone/run"}
    source = _save(tmp_path / "x.ckpt", config=config, ema={"weights": {"head.bias": torch.tensor([1.0, 2.0, 3.0])}})
    shared = tmp_path / "shared" / "x.safetensors"
    write_safetensors(shared, source, dtype)
    assert b"someone" not in shared.read_bytes()
    ours, theirs = load_checkpoint(shared), load_checkpoint(source)
    assert ours.model.head.bias.tolist() == [1.0, 2.0, 3.0]  # the average, which is what was trained
    for name, value in theirs.model.state_dict().items():
        expected = value if dtype is None else value.to(dtype).float()
        assert torch.equal(ours.model.state_dict()[name], expected), name
    same = ("class_names", "image_size", "mean", "std", "epoch", "step")
    assert all(getattr(ours, name) == getattr(theirs, name) for name in same)


def _save_shared(path, metadata):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"head.bias": torch.zeros(3)}, path, metadata=metadata)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: path.write_text("not a checkpoint"), "not a safetensors file"),
        (lambda path: _save_shared(path, None), "holds weights, but not what model they are of"),
        (lambda path: _save_shared(path, {ENTRY: "{"}), "not a safetensors file, or damaged"),
        (lambda path: _save_shared(path, {ENTRY: "[1]"}), "not a checkpoint of this package"),
        (lambda path: _save_shared(path, {ENTRY: json.dumps({"version": FORMAT_VERSION + 1})}), "newer vmoe"),
        (lambda path: _save_shared(path, {ENTRY: json.dumps({"version": FORMAT_VERSION})}), "do not make a model"),
    ],
)
def test_safetensors_that_are_no_checkpoint(tmp_path, make, told):
    path = tmp_path / "x.safetensors"
    make(path)
    with pytest.raises(UserError, match=told):
        load_checkpoint(path)


class _Runs:
    def __reduce__(self):
        return (open, ("/tmp/never", "w"))


def _missing(path):
    pass


def _empty_folder(path):
    path.mkdir()


def _truncated(path):
    _save(path)
    path.write_bytes(path.read_bytes()[:-100])


def _damaged(path):
    _save(path)
    content = bytearray(path.read_bytes())
    content[200:400] = bytes(200)
    path.write_bytes(content)


def _text(path):
    path.write_text("not a checkpoint")


def _other_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")


def _pickle_that_runs_code(path):
    torch.save({ENTRY: _Runs()}, path)


def _plain_pickle(path):
    path.write_bytes(pickle.dumps({ENTRY: {"version": 1}}))


def _foreign(path):
    torch.save({"state_dict": {}}, path)


def _newer(path):
    _save(path, version=FORMAT_VERSION + 1)


def _other_classes(path):
    _save(path, class_names=["a"])


def _unknown_model(path):
    _save(path, config={"model": {"name": "hf-hub:someone/model", "kwargs": {}}, "moe": None})


def _unknown_knob(path):
    _save(path, config={"model": {"name": "vit_tiny_patch16_224", "kwargs": KWARGS}, "moe": {"unheard_of": 1}})


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (_missing, "no such file"),
        (_empty_folder, "holds no checkpoints"),
        (_truncated, "cut off"),
        (_damaged, "damaged"),
        (_text, "not a checkpoint"),
        (_other_zip, "cannot be read"),
        (_pickle_that_runs_code, "cannot be read"),
        (_plain_pickle, "not a checkpoint"),
        (_foreign, "not a checkpoint of this package"),
        (_newer, "newer vmoe"),
        (_other_classes, "do not make a model"),
        (_unknown_model, "unknown model"),
        (_unknown_knob, "unheard_of"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_bad_files_are_told_in_one_line(tmp_path, make, told):
    path = tmp_path / "x.ckpt"
    make(path)
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    line = str(error.value)
    assert line.startswith(str(path)) and told in line and "\n" not in line


def test_nothing_is_fetched_for_a_checkpoint(tmp_path):
    kwargs = {**KWARGS, "pretrained": True, "checkpoint_path": str(tmp_path / "other.pth")}
    config = {"model": {"name": "vit_tiny_patch16_224", "kwargs": kwargs}, "moe": MOE}
    assert load_checkpoint(_save(tmp_path / "x.ckpt", config=config)).epoch == 4


@pytest.mark.parametrize(
    ("name", "kwargs", "told"),
    [("vit_tinny", {}, "vit_tinny"), ("vit_tiny_patch16_224", {"depht": 3}, "depht"), ("resnet18", {}, "resnet18")],
)
def test_a_model_that_cannot_be_built_is_told_in_one_line(name, kwargs, told):
    with pytest.raises(UserError) as error:
        build_model(name, kwargs, MoeConfig(), 10, 32)
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({"num_heads": 0}, "modulo by zero"),
        ({"act_layer": "geluu"}, "KeyError 'geluu'"),
        ({"checkpoint_path": "missing.pth"}, "FileNotFoundError"),
    ],
)
def test_whatever_timm_raises_is_told_in_one_line(kwargs, told):
    with pytest.raises(UserError) as error:
        build_model("vit_tiny_patch16_224", KWARGS | kwargs, None, 10, 32)
    assert told in str(error.value) and "\n" not in str(error.value)
    assert "moe" not in str(error.value)


def test_an_image_size_that_is_no_multiple_of_the_patch_is_refused():
    """Timm would leave out the last rows and columns, without a word."""
    with pytest.raises(UserError, match=r"data\.image_size=18: is no multiple of the patch size 8; use 16 or 24"):
        build_model("vit_tiny_patch16_224", KWARGS, None, 10, 18)
    with pytest.raises(UserError, match=r"use 8$"):
        build_model("vit_tiny_patch16_224", KWARGS, None, 10, 3)
    build_model("vit_tiny_patch16_224", KWARGS | {"dynamic_img_size": True, "dynamic_img_pad": True}, None, 10, 18)


def test_a_torchvision_of_another_torch_is_told(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms')")
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths}
    library = [sys.executable, "-c", "from vmoe import create_model"]
    answer = subprocess.run(library, env=environment, capture_output=True, text=True)
    assert answer.stderr.splitlines()[-1].startswith("ImportError: torchvision was built for another torch; install")
    root = Path(__file__).parents[1]
    model = root / "assets" / "models" / "cifar100_tiny.safetensors"
    tool = [sys.executable, str(root / "tools" / "export.py"), str(model), "--out", str(tmp_path / "new.safetensors")]
    answer = subprocess.run(tool, env=environment, capture_output=True, text=True)
    *_, last = answer.stderr.splitlines()  # behind lines of progress, where the machine is slow
    assert answer.returncode == 2 and "Traceback" not in answer.stderr, answer.stderr
    assert last.startswith("vmoe export: error: torchvision was built for another torch; install")
