"""`vmoe import-jax`: what it writes opens, gives the same logits, and a mistake leaves nothing behind."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import timm
import torch
from support import jax_oracle
from support.jax_writer import write_checkpoint

import vmoe
from vmoe.checkpoints import ENTRY, load_checkpoint
from vmoe.cli.import_jax import main

TOKEN = Path(__file__).parent.parent / "fixtures" / "vmoe_jax_token" / "vmoe_tiny_token"
ARCHITECTURES = {
    "token": ({}, []),
    "gap": ({"cls": False, "pre_logits": 7, "hidden": 29}, []),
    "dense": ({"moe": ()}, []),
    "soft": ({"slots": 3}, ["--router", "soft"]),
    "expert_choice": ({}, ["--router", "expert_choice", "--capacity-factor", "1.3"]),
    "capacity": ({}, ["--capacity-factor", "0.5", "--top-k", "1", "--batch-priority", "--group-images", "1"]),
    "resized": ({}, ["--img-size", "20"]),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_ckpt_opens_as_any_other(name, tmp_path, capsys):
    architecture, options = ARCHITECTURES[name]
    write_checkpoint(tmp_path / "x", jax_oracle.random_params(np.random.default_rng(0), **architecture))
    assert main([str(tmp_path / "x"), "--out", str(tmp_path / "out" / "x.ckpt"), *options]) == 0
    assert "5 classes" in capsys.readouterr().out
    checkpoint = load_checkpoint(tmp_path / "out" / "x.ckpt")
    arguments = {"router": "soft"} if name == "soft" else {}
    if name == "expert_choice":
        arguments = {"router": "expert_choice", "capacity_factor": 1.3}
    if name == "capacity":
        arguments = {"capacity_factor": 0.5, "top_k": 1, "batch_priority": True, "group_images": 1}
    if name == "resized":
        arguments = {"img_size": 20}
    expected = vmoe.load_jax_checkpoint(tmp_path / "x", **arguments)
    images = torch.randn(3, 3, checkpoint.image_size, checkpoint.image_size)
    torch.testing.assert_close(checkpoint.model(images), expected(images), rtol=0, atol=0)
    assert (checkpoint.mean, checkpoint.std, checkpoint.class_names) == ((0.5,) * 3, (0.5,) * 3, list("01234"))


def test_safetensors_load_into_the_named_model(tmp_path):
    path = tmp_path / "x.safetensors"
    assert main([str(TOKEN), "--out", str(path)]) == 0
    with safetensors.safe_open(path, "pt") as file:
        identity = json.loads(file.metadata()[ENTRY])
    config = identity["config"]
    model = vmoe.create_model(
        config["model"]["name"],
        vmoe.MoeConfig(**config["moe"]),
        img_size=identity["image_size"],
        num_classes=len(identity["class_names"]),
        **config["model"]["kwargs"],
    )
    timm.models.load_checkpoint(model, str(path))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(images), vmoe.load_jax_checkpoint(TOKEN)(images), rtol=0, atol=0)


def test_class_names(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"class {i}" for i in range(10)) + "\n")
    assert main([str(TOKEN), "--out", str(tmp_path / "x.ckpt"), "--class-names", str(names)]) == 0
    assert load_checkpoint(tmp_path / "x.ckpt").class_names[3] == "class 3"


def test_without_a_classifier_there_is_no_ckpt_but_the_weights(tmp_path, capsys):
    params = jax_oracle.random_params(np.random.default_rng(0))
    write_checkpoint(tmp_path / "x", {name: value for name, value in params.items() if not name.startswith("head/")})
    before = set(tmp_path.iterdir())
    assert main([str(tmp_path / "x"), "--out", str(tmp_path / "x.ckpt")]) == 2
    error = capsys.readouterr().err
    assert "--out" in error and "vmoe.load_jax_checkpoint" in error and error.count("\n") == 1
    assert set(tmp_path.iterdir()) == before
    assert main([str(tmp_path / "x"), "--out", str(tmp_path / "x.safetensors")]) == 0
    expected = vmoe.load_jax_checkpoint(tmp_path / "x").state_dict()
    assert safetensors.torch.load_file(tmp_path / "x.safetensors").keys() == expected.keys()


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["/no/such/prefix", "--out", "x.ckpt"], "/no/such/prefix.index: no such file"),
        ([str(TOKEN), "--out", "x.npz"], "--out x.npz"),
        ([str(TOKEN)], "--out"),
        ([str(TOKEN), "--out", "x.ckpt", "--top-k", "9"], "--top-k 9"),
        ([str(TOKEN), "--out", "x.ckpt", "--capacity-factor", "-1"], "--capacity-factor"),
        ([str(TOKEN), "--out", "x.ckpt", "--router", "soft"], "--router soft"),
        ([str(TOKEN), "--out", "x.ckpt", "--img-size", "31"], "--img-size 31"),
        ([str(TOKEN), "--out", "x.ckpt", "--class-names", __file__], "--class-names"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(argv, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("vmoe import-jax: error: ") and error.count("\n") == 1 and word in error
    assert list(tmp_path.iterdir()) == []
