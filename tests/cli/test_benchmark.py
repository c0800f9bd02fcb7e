"""`vmoe benchmark`: tables, their files, and one line for a mistake."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vmoe.bench.torchvision_data import torchvision_loader
from vmoe.cli.benchmark import command_line, main
from vmoe.cli.main import JOBS
from vmoe.data import AugmentConfig, DataConfig, ImageDataModule

TINY = ["--device", "cpu", "--width", "16", "--experts", "4", "--images", "2", "--tokens", "5", "--rounds", "2"]


def test_layer_writes_what_it_prints(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    chosen = ["--cases", "S32,Ti-k1", "--jobs", "layer, dropless", "--seed", "3"]
    assert main(["layer", *TINY, *chosen, "--out", str(out)]) == 0
    shown = capsys.readouterr()
    report = json.loads((out / "layer.json").read_text())
    assert report["command"].startswith("vmoe benchmark layer --device cpu")
    assert report["seed"] == 3 and report["dtype"] == "float32" and "threads" in report["device"]
    assert {"vmoe", "torch", "timm", "python"} <= set(report["versions"])
    assert [case["case"] for case in report["cases"]] == ["S32 changed", "Ti-k1 changed"]
    case = report["cases"][0]
    assert (case["width"], case["hidden"], case["num_experts"], case["top_k"]) == (16, 64, 4, 2)
    assert case["flops"] == 12 * 10 * 2 * 16 * 64
    rows = {row["job"]: row for row in case["rows"]}
    assert rows["layer, dropless"]["ratio"] == pytest.approx(rows["layer, dropless"]["ms"] / rows["dense"]["ms"])
    assert case["floors"][0]["name"] == "dense" and case["copy_bandwidth"] > 0
    markdown = (out / "layer.md").read_text()
    assert "## S32 changed: width 16, hidden 64, E=4, K=2, 2 images of 5 tokens" in shown.out
    assert all(line in markdown for line in shown.out.splitlines() if line.startswith("|"))
    assert "first look at layer" in shown.err and "first look" not in shown.out
    pictures = {"roofline-S32.png", "roofline-Ti-k1.png"}
    for picture in pictures:
        Image.open(out / picture).verify()
    assert {path.name for path in out.iterdir()} == {"layer.json", "layer.md", *pictures}


@pytest.mark.slow  # transformers takes seconds to import
def test_peers_are_timed_beside_the_layer(tmp_path):
    chosen = ["--cases", "S32", "--jobs", "peer: sort", "--peers"]
    assert main(["layer", *TINY, *chosen, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "layer.json").read_text())
    assert "transformers" in report["versions"]
    assert "peer: sort + grouped_mm" in {row["job"] for row in report["cases"][0]["rows"]}


def test_curves(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("vmoe.cli.progress.EVERY", 0.01)
    assert main(["layer", *TINY, "--curves", "top-k", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "layer_curves.json").read_text())
    assert [(row["axis"], row["value"]) for row in report["rows"]] == [("top-k", 1), ("top-k", 2), ("top-k", 4)]
    assert (tmp_path / "layer_curves.md").exists()
    assert ": top-k 4, " in capsys.readouterr().err  # a line of progress
    Image.open(tmp_path / "layer_curves.png").verify()


def test_model(tmp_path, capsys):
    arguments = ["--device", "cpu", "--model", "test_vit", "--image-size", "32", "--batch", "2"]
    arguments += ["--layers", "last-2", "--top-k", "1", "2", "--experts", "2", "--rounds", "1", "--passes", "training"]
    assert main(["model", *arguments, "--route", "patch", "image", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "model.json").read_text())
    names = ["dense", "last-2 K=1", "last-2 K=1 by image", "last-2 K=2", "last-2 K=2 by image"]
    assert [row["model"] for row in report["rows"]] == names
    assert (report["batch"], report["image_size"], report["experts"]) == (2, 32, 2)
    dense, *_, double = report["rows"]
    assert double["gflops_per_image"] > dense["gflops_per_image"]
    assert "| last-2 K=1 by image | training |" in capsys.readouterr().out


def test_onnx_has_no_capacity(tmp_path, capsys):
    assert main(["model", "--device", "cpu", "--passes", "onnx", "--out", str(tmp_path)]) == 2
    assert "--capacity-factor 1.05: images share the experts' slots" in capsys.readouterr().err


@pytest.mark.slow  # each model takes seconds to export
def test_a_model_in_onnx_runtime(tmp_path):
    pytest.importorskip("onnxruntime")
    arguments = ["--device", "cpu", "--model", "test_vit", "--image-size", "32", "--batch", "1", "--rounds", "1"]
    arguments += ["--layers", "last-2", "--top-k", "1", "--experts", "2", "--route", "image", "--passes", "onnx"]
    assert main(["model", *arguments, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "model.json").read_text())["rows"]
    assert [(row["model"], row["pass"], row["compile"]) for row in rows] == [
        ("dense", "onnx", "off"),
        ("last-2 K=1 by image", "onnx", "off"),
    ]


def test_data(tmp_path, capsys):
    config = tmp_path / "small.yaml"
    config.write_text(
        "data: {name: digits, image_size: 16, batch_size: 64}\n"
        "model: {name: vit_tiny_patch16_224, kwargs: {patch_size: 8, embed_dim: 24, depth: 2, num_heads: 3}}\n"
        "moe: {num_experts: 2}\n"
    )
    arguments = ["--config", str(config), "--workers", "0", "1", "--seconds", "0.2", "--data.batch_size", "32"]
    assert main(["data", "--device", "cpu", *arguments, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "data.json").read_text())
    rows = report["rows"]
    assert [(row["pipeline"], row["workers"]) for row in rows] == [("workers", 0), ("workers", 1), ("device", 1)]
    assert report["batch"] == 32
    for row in rows:
        synthetic = row["synthetic_images_per_second"]
        assert row["share_of_synthetic"] == pytest.approx(row["training_images_per_second"] / synthetic)
        assert row["share_of_model"] == pytest.approx(row["images_per_second"] / synthetic)
        assert row["bound_by"] == ("the data" if row["share_of_model"] < 1 else "the model")


def test_torchvisions_loader_beside_ours(tmp_path, capsys):
    generator = np.random.default_rng(0)
    for index in range(16):
        place = tmp_path / "images" / ("train" if index < 12 else "val") / str(index % 2)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20, 24, 3), np.uint8)).save(place / f"{index}.png")
    config = tmp_path / "small.yaml"
    config.write_text(
        f"data: {{name: folder, root: {tmp_path / 'images'}, image_size: 16, batch_size: 4, val_fraction: 0.2,\n"
        "  augment: {preset: light, crop_scale: [0.5, 1.0]}, mix: {mixup_alpha: 0.8}}\n"
        "model: {name: vit_tiny_patch16_224, kwargs: {patch_size: 8, embed_dim: 24, depth: 2, num_heads: 3}}\n"
        "moe: {num_experts: 2}\n"
    )
    arguments = ["data", "--device", "cpu", "--config", str(config), "--pipelines", "workers", "--seconds", "0.1"]
    arguments += ["--out", str(tmp_path), "--workers", "0"]
    assert main([*arguments, "--torchvision"]) == 0
    rows = json.loads((tmp_path / "data.json").read_text())["rows"]
    sources = [(row["source"], row["workers"]) for row in rows]
    assert sources == [("folder", 0), ("torchvision", 0)]
    assert all(row["images_per_second"] > 0 and row["training_images_per_second"] > 0 for row in rows)
    # Said before the folder, which is not there, is looked for.
    assert main([*arguments, "--torchvision", "--data.augment.preset", "strong", "--data.root", "absent"]) == 2
    assert "--torchvision: crops by scale and flips, and data.augment does otherwise" in capsys.readouterr().err
    assert main([*arguments, "--torchvision", "--data.name", "npz"]) == 2
    assert "--torchvision: data.name is npz" in capsys.readouterr().err


def test_torchvisions_epochs_are_as_long_as_ours(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        for index in range(10):
            Image.new("RGB", (16, 16)).save(tmp_path / split / "a" / f"{index}.png")
    augment = AugmentConfig(preset="light", crop_scale=(0.5, 1.0))
    config = DataConfig(
        name="folder", root=str(tmp_path), image_size=16, batch_size=4, repeat=6, val_fraction=0.2, augment=augment
    )
    module = ImageDataModule(config, 0)
    module.setup("fit")
    assert len(module.train_dataloader()) == 8 * 6 // 4
    assert len(torchvision_loader(module, 0)) == 10 * 6 // 4  # it has the validation images too


def test_data_that_do_not_fit_on_the_device_are_measured_with_workers_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.sysconf", lambda name: 2**9)
    model = ["--model.kwargs", "{patch_size: 8, embed_dim: 24, depth: 2, num_heads: 3}", "--data.batch_size", "32"]
    config = str(Path(__file__).parents[2] / "configs" / "digits.yaml")
    arguments = ["data", "--device", "cpu", "--config", config, "--workers", "0", "--seconds", "0.1"]
    assert main([*arguments, "--out", str(tmp_path), *model]) == 0
    assert "left out: data.pipeline=device: 1,797 images take" in capsys.readouterr().err
    assert [row["pipeline"] for row in json.loads((tmp_path / "data.json").read_text())["rows"]] == ["workers"]
    assert main([*arguments, "--out", str(tmp_path), *model, "--pipelines", "device"]) == 2
    assert "data.pipeline=device: 1,797 images take" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "layer|model|data"),
        (["layers"], "layers"),
        (["layer", "--cases", "S17"], "--cases S17: no such case; there are S16"),
        (["layer", "--device", "cpu", "--curves", "depth"], "--curves depth: no such axis"),
        (["layer", "--device", "cpu", "--curves", "--cases", "S32", "Ti-k1"], "goes with one case"),
        (["layer", "--device", "cpu", "--top-k", "64"], "--top-k 64"),
        (["layer", "--device", "cpu", "--jobs", "expert", "peer"], "--jobs peer: no job begins so; there are dense; "),
        (["layer", "--rounds", "0"], "'0' must be a whole number >= 1"),
        (["layer", "--data.batch_size", "3"], "--data.batch_size"),
        (["model", "--device", "cpu", "--model", "vit_none"], "vit_none"),
        (["model", "--device", "cpu", "--layers", "often-2"], "often-2"),
        (["model", "--device", "cpu", "--top-k", "9", "--experts", "8"], "top_k=9"),
        (["data", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["data", "--config", "configs/digits.yaml", "--seconds", "0"], "--seconds"),
        (["data"], "--config"),
    ],
)
def test_mistakes_are_one_line_that_names_them(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("vmoe benchmark: error: ") and error.count("\n") == 1
    assert named in error
    assert not list(tmp_path.iterdir())


def test_documented_commands_are_understood():
    assert "benchmark" in JOBS
    text = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    commands = re.findall(r"^vmoe benchmark (.*?)(?:\s+#.*)?$", text, re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        _, rest = command_line().parse_known_args(shlex.split(command))
        assert not rest or command.startswith("data")
