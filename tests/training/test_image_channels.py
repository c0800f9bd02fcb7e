"""A run on pictures of four channels and 12 bits, and every tool that opens it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import timm
import torch
from timm.models import adapt_input_conv

import vmoe
from vmoe.checkpoints import ENTRY, RunFolder
from vmoe.checkpoints.entry import check_entry
from vmoe.cli.evaluate import main as evaluate
from vmoe.cli.explore import main as explore
from vmoe.cli.export import main as export
from vmoe.cli.heatmap import main as heatmap
from vmoe.cli.main import run_job
from vmoe.cli.train import main as train
from vmoe.data import DataConfig
from vmoe.errors import UserError
from vmoe.evaluation.evaluate import data_for
from vmoe.export.predictor import load_predictor
from vmoe.serve.api_description import describe_api
from vmoe.serve.uploads import UploadReader, _count_pixels
from vmoe.training.config import ModelConfig, TrainConfig
from vmoe.training.run.initial import initial_model

KWARGS = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
MODEL = ["--model.name", "vit_tiny_patch16_224", "--moe.num_experts", "2"]
MODEL += [word for name, value in KWARGS.items() for word in (f"--model.kwargs.{name}", str(value))]
CHANNELS = ["--data.channels", "4", "--data.image_size", "16", "--data.batch_size", "8", "--trainer.device", "cpu"]


@pytest.fixture(scope="module")
def satellite(tmp_path_factory):
    """Pictures of two classes that the fourth channel alone tells apart, which RGB does not have."""
    root, rng = tmp_path_factory.mktemp("data") / "fields", np.random.default_rng(0)
    for label, name in enumerate(("dry", "wet")):
        (root / name).mkdir(parents=True)
        for number in range(20):
            picture = rng.integers(0, 4096, (20, 20, 4), dtype=np.uint16)
            picture[..., 3] = 4000 * label
            tifffile.imwrite(root / name / f"{number}.tif", picture, photometric="minisblack", planarconfig="contig")
    return root


@pytest.fixture(scope="module")
def run(satellite, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "fields"
    options = ["--trainer.epochs", "4", "--optim.lr", "3e-3", "--optim.warmup_epochs", "0"]
    assert train([str(satellite), *CHANNELS, *options, *MODEL, "--output_dir", str(folder)]) == 0
    return folder


def test_the_run_and_its_evaluation_see_the_fourth_channel(run):
    assert json.loads((run / "summary.json").read_text())["metrics"]["test/top1"] == 1
    model = vmoe.load(run)
    assert (model.channels, model.bit_depth, len(model.mean)) == (4, 12, 4)
    assert model.patch_embed.proj.in_channels == 4
    entry = torch.load(RunFolder(run).best, weights_only=True)[ENTRY]
    assert (entry["version"], entry["channels"]) == (2, 4)
    assert evaluate([str(run)]) == 0
    assert json.loads((run / "evaluation.json").read_text())["results"][0]["top1"] == 1
    assert data_for(model, "more.csv").bit_depth == 12  # of the model, as for `predict`


def test_files_and_arrays_are_predicted_alike(run, satellite):
    model, file = vmoe.load(run), satellite / "wet" / "0.tif"
    array = tifffile.imread(file)
    found = model.predict([file, array, np.moveaxis(array, 2, 0), array.astype(np.float32)])
    assert found.labels == ["wet"] * 4 and len({row.tobytes() for row in found.logits}) == 1
    assert len(model.predict(satellite, progress=False)) == 40
    with pytest.raises(UserError, match=r"pictures\[0\]: this picture: is of shape \(20, 20, 3\), but data.channels=4"):
        model.predict(array[..., :3])


@pytest.mark.parametrize(
    ("form", "name"),
    [("hub", "hub"), ("safetensors", "model.safetensors"), pytest.param("onnx", "model.onnx", marks=pytest.mark.slow)],
)
def test_predictions_of_the_checkpoint_and_of_exports_are_the_same(run, satellite, tmp_path, form, name):
    files = [satellite / "dry" / "0.tif", satellite / "wet" / "0.tif"]
    assert export([str(run), "--format", form, "--out", str(tmp_path / name)]) == 0
    model = load_predictor(tmp_path / name, torch.device("cpu"))
    found = model.predict(files)
    assert found.labels == ["dry", "wet"] and model.channels == 4
    assert np.allclose(found.logits, vmoe.load(run).predict(files).logits, atol=1e-4)
    if form == "hub":
        assert json.loads((tmp_path / "hub" / "config.json").read_text())["pretrained_cfg"]["input_size"] == [4, 16, 16]
        assert timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).patch_embed.proj.in_channels == 4
        card = (tmp_path / "hub" / "README.md").read_text()
        assert "16 x 16 pixels, 4 channels" in card and "routing.png" not in card


def test_heatmaps_and_the_explorer_show_the_first_three_channels(run, satellite, tmp_path):
    picture = satellite / "wet" / "0.tif"
    assert heatmap([str(run), str(picture), "--out", str(tmp_path / "maps")]) == 0
    (image,) = json.loads((tmp_path / "maps" / "index.json").read_text())["images"]
    assert image["prediction"]["class"] == "wet"
    few = ["--replicates", "20", "--sample", "4", "--probe-images", "0", "--cause-images", "0"]
    assert explore([str(run), "--out", str(tmp_path / "page"), *few]) == 0
    page = (tmp_path / "page" / "index.html").read_text()
    assert "the first 3 of 4 channels as red, green and blue" in page


def test_a_server_reads_uploads_by_their_channels(run, satellite, tmp_path):
    model, file = vmoe.load(run), satellite / "wet" / "0.tif"
    reader = UploadReader(model.image_size, model.crop, 2, model.bit_depth, None, model.channels)
    pixels = reader._decode(file.read_bytes())
    assert pixels.shape == (16, 16, 4)
    served = model.predict([pixels], bit_depth=1)  # as `ModelService.predict` hands them over
    assert np.allclose(served.logits, model.predict(file).logits, atol=1e-6)
    assert _count_pixels(file.read_bytes(), 4) == 20 * 20 * 4 * 4 // 3
    assert "4 channels" in describe_api(["dry", "wet"], 16, "centre", 1000, 4)["info"]["description"]


def test_what_is_for_rgb_refuses_the_run(run, tmp_path, capsys):
    for job, options, line in (
        ("demo-page", ["--out", str(tmp_path / "page")], "reads pictures by data.channels=4; serve it"),
        ("evaluate", ["--corruptions", "gaussian_noise"], "corruptions: change the colours of RGB"),
        ("evaluate", ["--data", "digits"], "data.channels=4: is for sets of your own; digits has RGB"),
    ):
        assert run_job(job, [str(run), *options]) == 2
        assert line in capsys.readouterr().err


def test_a_model_of_rgb_starts_one_of_four_channels_as_timm_does(tmp_path):
    dense = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=2, **KWARGS)
    vmoe.save(dense, tmp_path / "dense.safetensors", ["dry", "wet"], kwargs=KWARGS)
    torch.save(dense.state_dict(), tmp_path / "timm.pth")
    for file in ("dense.safetensors", "timm.pth"):
        config = TrainConfig(
            data=DataConfig(name="folder", channels=4),
            model=ModelConfig(kwargs=KWARGS),
            moe=vmoe.MoeConfig(num_experts=2),
            init_from=str(tmp_path / file),
        )
        lines = []
        found = initial_model(config, ["dry", "wet"], 16, lines.append)
        assert f"{tmp_path / file}: its first convolution, of 3 channels, is repeated for 4 as timm does it" in lines
        assert torch.equal(found.patch_embed.proj.weight, adapt_input_conv(4, dense.patch_embed.proj.weight))
        assert torch.equal(found.blocks[1].mlp.experts.fc1.weight[0], dense.blocks[1].mlp.fc1.weight)  # upcycled
    other = replace(config, data=DataConfig(name="folder", channels=5), init_from=str(tmp_path / "four.safetensors"))
    vmoe.save(found, other.init_from, ["dry", "wet"], mean=[0] * 4, std=[1] * 4, kwargs=KWARGS)
    with pytest.raises(UserError, match=r"patch_embed.proj.weight is \(24, 4, 8, 8\) there and \(24, 5, 8, 8\)"):
        initial_model(other, ["dry", "wet"], 16)


def test_a_model_of_ones_own_tells_its_channels(tmp_path):
    model = vmoe.create_model(
        "vit_tiny_patch16_224", vmoe.MoeConfig(), img_size=16, num_classes=2, in_chans=5, **KWARGS
    )
    with pytest.raises(UserError, match=r"mean=.*: must be 5 numbers"):
        vmoe.save(model, tmp_path / "a.safetensors", ["a", "b"])
    vmoe.save(model, tmp_path / "a.safetensors", ["a", "b"], mean=[0.1] * 5, std=[0.2] * 5)
    found = vmoe.load(tmp_path / "a.safetensors")
    assert found.channels == 5 and found.predict(np.zeros((5, 9, 9), np.float32)).labels[0] in ("a", "b")


@pytest.mark.parametrize(
    ("change", "line"),
    [({"channels": 0}, "channels must be from 1 to 512 or None"), ({"mean": [0.5] * 3}, "mean must be 4 numbers")],
)
def test_a_file_of_wrong_channels_is_refused(run, change, line):
    content = torch.load(RunFolder(run).best, weights_only=True)
    content[ENTRY] |= change
    with pytest.raises(UserError, match=line):
        check_entry(content, run)
