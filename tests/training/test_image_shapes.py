"""A run on images that are not square, fitted by a crop of the user's choice, and every tool that opens it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import vmoe
from vmoe.checkpoints import ENTRY, RunFolder
from vmoe.cli.evaluate import main as evaluate
from vmoe.cli.export import main as export
from vmoe.cli.heatmap import main as heatmap
from vmoe.cli.main import run_job
from vmoe.cli.train import main as train
from vmoe.data import DataConfig, ImageDataModule
from vmoe.export.predictor import load_predictor
from vmoe.serve.uploads import UploadReader

MODEL = ["--model.name", "vit_tiny_patch16_224", "--moe.num_experts", "2"]
KWARGS = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
MODEL += [word for name, value in KWARGS.items() for word in (f"--model.kwargs.{name}", str(value))]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Wide pictures of two classes: what tells them apart is at their left end, which a central crop cuts off."""
    root, rng = tmp_path_factory.mktemp("data") / "photos", np.random.default_rng(0)
    for label, name in enumerate(("ant", "bee")):
        (root / name).mkdir(parents=True)
        for number in range(20):
            picture = rng.integers(100, 156, (24, 72, 3), dtype=np.uint8)
            picture[:, :20] = 255 * label
            Image.fromarray(picture).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "wide"
    options = ["--data.image_size", "[16,32]", "--data.crop", "letterbox", "--data.batch_size", "8"]
    options += ["--trainer.epochs", "4", "--trainer.device", "cpu", "--data.augment.flip", "0", "--optim.lr", "3e-3"]
    assert train([str(photos), *options, *MODEL, "--output_dir", str(folder)]) == 0
    return folder


def test_the_run_and_its_evaluation_see_the_same_pictures(run):
    assert json.loads((run / "summary.json").read_text())["metrics"]["test/top1"] == 1
    model = vmoe.load(run)
    assert (model.image_size, model.crop) == ((16, 32), "letterbox")
    assert torch.load(RunFolder(run).best, weights_only=True)[ENTRY]["version"] == 2
    assert evaluate([str(run)]) == 0
    assert json.loads((run / "evaluation.json").read_text())["results"][0]["top1"] == 1


@pytest.mark.parametrize(
    ("form", "name"),
    [("hub", "hub"), ("safetensors", "model.safetensors"), pytest.param("onnx", "model.onnx", marks=pytest.mark.slow)],
)
def test_predictions_of_the_checkpoint_and_of_exports_are_the_same(run, photos, tmp_path, form, name):
    files = [photos / "ant" / "0.png", photos / "bee" / "0.png"]
    expected = vmoe.load(run).predict(files)
    assert expected.labels == ["ant", "bee"]
    assert export([str(run), "--format", form, "--out", str(tmp_path / name)]) == 0
    found = load_predictor(tmp_path / name, torch.device("cpu")).predict(files)
    assert np.allclose(found.logits, expected.logits, atol=1e-4)
    if form == "hub":
        about = json.loads((tmp_path / "hub" / "config.json").read_text())["pretrained_cfg"]
        assert about["input_size"] == [3, 16, 32] and about["crop_mode"] == "border"


def test_heatmaps_and_uploads_are_of_the_pictures_shape(run, photos, tmp_path):
    picture = photos / "ant" / "0.png"
    assert heatmap([str(run), str(picture), "--out", str(tmp_path / "maps")]) == 0
    (image,) = json.loads((tmp_path / "maps" / "index.json").read_text())["images"]
    assert [layer["grid"] for layer in image["layers"].values()] == [[2, 4]]
    (page,) = image["pages"]
    with Image.open(tmp_path / "maps" / page) as figure:
        assert figure.width > 1.5 * figure.height
    model = vmoe.load(run)
    reader = UploadReader(model.image_size, model.crop, 2, None, None)
    pixels = reader._decode(picture.read_bytes())
    assert pixels.shape == (16, 32, 3)
    assert np.array_equal(model.predict([pixels]).logits, model.predict([picture]).logits)


def test_what_needs_squares_says_so(run, capsys):
    assert evaluate([str(run), "--corruptions", "gaussian_noise"]) == 2
    assert "are made for square images, and these are 16 x 32 (height x width)" in capsys.readouterr().err
    assert run_job("demo-page", [str(run), "--out", "page"]) == 2
    assert "the demo page shows central squares" in capsys.readouterr().err
    for options in ({"pipeline": "device"}, {"name": "fractals"}):
        with pytest.raises(ValueError, match=r"image_size=\[16, 32\]: .*give one number"):
            DataConfig(image_size=(16, 32), **options)
    assert train(["digits", "--data.image_size", "[16,30]", *MODEL, "--output_dir", "new"]) == 2
    assert "must be multiples of those of the patches, 8 and 8" in capsys.readouterr().err


@pytest.mark.parametrize("pipeline", ["workers", "device"])
def test_training_pictures_are_fitted_too(photos, pipeline):
    """Crops by scale cut from the squashed picture, whose left third alone is black or white."""
    options = {"image_size": 72, "batch_size": 8, "pipeline": pipeline, "crop": "squash"}
    augment = {"preset": "light", "flip": 0.0, "crop_scale": [1.0, 1.0]}
    module = ImageDataModule(photos, **options, augment=augment, mean=(0, 0, 0), std=(1, 1, 1))
    module.setup()
    for images, labels, *_ in module.train_dataloader():
        left = images[:, :, :, :8].mean((1, 2, 3))
        assert torch.equal((left > 0.7).long(), labels.cpu()) and (images[:, :, :, 40:] < 0.7).all()
