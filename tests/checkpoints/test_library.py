"""A trained model in Python, as a script uses it: load, predict, save."""

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from support import local_hub
from support.saved_runs import save_run

import vmoe
from vmoe.cli.evaluate import main as evaluate_command
from vmoe.cli.export import main as export_command
from vmoe.cli.predict import main as predict_command

MOE = {"num_experts": 3, "top_k": 2, "layers": [1]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "mine", moe=MOE)


@pytest.fixture
def pictures(tmp_path):
    """A folder with three pictures and a text, and the pixels of the first."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    Image.new("L", (16, 16), 200).save(folder / "b.png")
    Image.new("RGBA", (40, 20), (255, 0, 0, 128)).save(folder / "c.png")
    (folder / "notes.txt").write_text("no picture")
    return folder, pixels


def test_a_loaded_model_is_timm_s_model_which_knows_its_classes(run):
    model = vmoe.load(run)
    assert isinstance(model, vmoe.TrainedModel) and isinstance(model, timm.models.VisionTransformer)
    assert model.class_names == list("0123456789") and not model.training
    assert (model.image_size, model.mean, model.std) == (16, (0.3,) * 3, (0.4,) * 3)
    assert model.config["data"]["name"] == "digits"
    assert [name for name, _ in vmoe.moe_layers(model)] == ["blocks.1.mlp"]
    images = torch.randn(2, 3, 16, 16)
    with vmoe.record_routing(model) as trace:
        logits = model(images)
    assert logits.shape == (2, 10) and list(trace.layers) == ["blocks.1.mlp"]
    fresh = vmoe.create_model(
        "vit_tiny_patch16_224",
        vmoe.MoeConfig(**MOE),
        num_classes=10,
        img_size=16,
        patch_size=4,
        embed_dim=24,
        depth=4,
        num_heads=3,
    )
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(images), logits)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images), logits) and other.class_names == model.class_names


def test_pictures_of_any_kind_have_the_same_answer(run, pictures):
    folder, pixels = pictures
    model = vmoe.load(run)
    image = Image.fromarray(pixels)
    given = [folder / "a.png", str(folder / "a.png"), image, pixels, folder]
    found = model.predict(given, batch_size=2)
    labels, probabilities = found
    assert len(found) == len(labels) == 7 and probabilities.shape == (7, 10)
    assert found.pictures == [folder / "a.png", folder / "a.png", 2, 3, *(folder / f"{name}.png" for name in "abc")]
    assert len(found.notes) == 1 and found.notes[0].startswith("ignored: 1 file of another format (.txt; ")
    for row in (1, 2, 3, 4):
        np.testing.assert_allclose(probabilities[row], probabilities[0], rtol=1e-5)
    assert labels == [model.class_names[row.argmax()] for row in probabilities]
    assert found.top(2)[0][0] == {"class": labels[0], "probability": probabilities[0].max()}
    for alone in (folder / "a.png", image, pixels):
        np.testing.assert_allclose(model.predict(alone).probabilities, probabilities[:1], rtol=1e-5)
    prepared = vmoe.prepare_image(image, model.image_size, model.mean, model.std)
    with torch.no_grad():
        logits = model(prepared[None])
    np.testing.assert_allclose(logits.softmax(-1).numpy(), probabilities[:1], rtol=1e-5)


def test_images_of_pillow_are_read_as_their_files_are(run, tmp_path):
    model = vmoe.load(run)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(np.arange(24 * 16 * 3, dtype=np.uint8).reshape(24, 16, 3)).save(
        tmp_path / "turned.png", exif=turned
    )
    Image.fromarray((np.arange(256) * 257).astype(np.uint16).reshape(16, 16)).save(tmp_path / "deep.png")
    Image.new("P", (9, 9), 3).save(tmp_path / "palette.png")
    Image.new("CMYK", (9, 9), (9, 99, 199, 0)).save(tmp_path / "print.tiff")
    for path in sorted(tmp_path.iterdir()):
        with Image.open(path) as image:
            assert np.array_equal(model.predict(image).probabilities, model.predict(path, bit_depth=16).probabilities)


def test_prediction_leaves_the_model_s_mode_alone_and_does_not_depend_on_it(run, pictures):
    model = vmoe.load(run)
    expected = model.predict(pictures[0]).probabilities
    model.train()
    model.patch_embed.eval()
    assert np.array_equal(model.predict(pictures[0]).probabilities, expected)
    assert model.training and model.blocks[0].training and not model.patch_embed.training


def test_damaged_pictures_are_an_error_or_left_out(run, pictures):
    folder, pixels = pictures
    (folder / "d.jpg").write_text("no picture")
    model = vmoe.load(run)
    with pytest.raises(ValueError, match=r"d\.jpg: cannot be read as an image"):
        model.predict([folder])
    found = model.predict([folder, pixels], skip_damaged=True)
    assert len(found) == 4 and len(found.left_out) == 1 and "d.jpg" in found.left_out[0]
    assert found.pictures[-1] == 1


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["no.jpg"], r"no\.jpg: no such image file"),
        ([np.zeros((3, 8, 8), np.float32)], r"pictures\[0\]: an array of float32 of shape \(3, 8, 8\): must be uint8"),
        ([np.zeros((0, 8, 3), np.uint8)], "holds no pixel"),
        ([torch.zeros(3, 8, 8)], r"pictures\[0\]: Tensor: is no picture; give a path"),
    ],
)
def test_what_is_no_picture_is_a_value_error_of_one_line(run, given, line):
    with pytest.raises(ValueError, match=line) as caught:
        vmoe.load(run).predict(given)
    assert "\n" not in str(caught.value)


def test_no_pictures_have_no_answers(run):
    labels, probabilities = vmoe.load(run).predict([])
    assert labels == [] and probabilities.shape == (0, 10)


@pytest.mark.parametrize(("moe", "suffix"), [(vmoe.MoeConfig(**MOE), ".safetensors"), (None, ".ckpt")])
def test_a_model_of_one_s_own_loop_opens_in_every_tool(tmp_path, pictures, capsys, moe, suffix):
    folder, _ = pictures
    model = vmoe.create_model(
        "vit_tiny_patch16_224", moe, num_classes=10, img_size=16, patch_size=4, embed_dim=24, depth=4, num_heads=3
    )
    path = tmp_path / f"mine{suffix}"
    names = [str(number) for number in range(10)]
    vmoe.save(model, path, class_names=names, mean=(0.3,) * 3, std=(0.4,) * 3)
    again = vmoe.load(path)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(images), model.eval()(images))
    assert (again.class_names, again.image_size, again.mean, again.std) == (names, 16, (0.3,) * 3, (0.4,) * 3)
    assert predict_command([str(path), str(folder)]) == 0
    assert evaluate_command([str(path), "--data", "digits", "--out", str(tmp_path / "out")]) == 0
    assert export_command([str(path), "--format", "hub", "--out", str(tmp_path / "hub")]) == 0
    capsys.readouterr()
    assert torch.equal(vmoe.load(tmp_path / "hub")(images), model(images))


def test_timm_s_own_model_made_sparse_and_a_loaded_model_are_saved_too(run, tmp_path):
    model = vmoe.sparsify(timm.create_model("test_vit", num_classes=3), vmoe.MoeConfig(num_experts=2, layers=[0]))
    vmoe.save(model, tmp_path / "a.safetensors", ["a", "b", "c"])
    again = vmoe.load(tmp_path / "a.safetensors")
    assert (list(again.mean), again.image_size) == (list(model.pretrained_cfg["mean"]), 160)
    loaded = vmoe.load(run)
    vmoe.save(loaded, tmp_path / "b.ckpt")
    again = vmoe.load(tmp_path / "b.ckpt")
    same = ("class_names", "image_size", "mean", "std", "epoch", "step", "bit_depth")
    assert all(getattr(again, name) == getattr(loaded, name) for name in same)
    assert again.config["data"]["name"] == "digits"


def test_a_model_that_cannot_be_built_again_is_refused_and_nothing_is_written(tmp_path):
    path = tmp_path / "x.safetensors"
    model = timm.create_model("test_vit", num_classes=3, mlp_ratio=2)
    with pytest.raises(ValueError, match="is built otherwise than this model"):
        vmoe.save(model, path, ["a", "b", "c"])
    vmoe.save(model, path, ["a", "b", "c"], kwargs={"mlp_ratio": 2})
    path.unlink()
    model = timm.create_model("test_vit", num_classes=3, act_layer="relu")
    with pytest.raises(ValueError, match="gives other logits than this model"):
        vmoe.save(model, path, ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"kwargs: act_layer=.*cannot be written"):
        vmoe.save(vmoe.create_model("test_vit", num_classes=3, act_layer=torch.nn.ReLU), path, "abc")
    model = vmoe.create_model("test_vit", num_classes=3)
    for arguments, line in (
        ({}, r"class_names: is missing"),
        ({"class_names": ["a"]}, r"class_names: are 1, but the model gives 3 logits"),
        ({"class_names": "abc", "mean": (1, 2)}, r"mean=\(1, 2\): must be three numbers"),
    ):
        with pytest.raises(ValueError, match=line):
            vmoe.save(model, path, **arguments)
    with pytest.raises(ValueError, match=r"must end in \.safetensors or \.ckpt"):
        vmoe.save(model, tmp_path / "x.pt", "abc")
    assert list(tmp_path.iterdir()) == []


def test_a_mistaken_path_is_a_value_error_of_one_line():
    with pytest.raises(ValueError, match="no such file"):
        vmoe.load("nowhere")


def test_a_model_of_the_hub_opens_by_its_name(tmp_path, monkeypatch, capsys):
    save_run(tmp_path / "run", moe=MOE)
    assert export_command([str(tmp_path / "run"), "--format", "hub", "--out", str(tmp_path / "folder")]) == 0
    files = {f"me/model/{file.name}": file.read_bytes() for file in (tmp_path / "folder").iterdir()}
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    with local_hub.serving(files, tmp_path / "cache", monkeypatch):
        x = torch.rand(1, 3, 16, 16)
        assert torch.equal(vmoe.load("hf-hub:me/model")(x), vmoe.load(tmp_path / "run")(x))
        assert predict_command(["hf-hub:me/model@main", str(tmp_path / "a.png")]) == 0
        capsys.readouterr()
        assert predict_command(["hf-hub:me/other", str(tmp_path / "a.png")]) == 2
        line = capsys.readouterr().err
    assert line.startswith("vmoe predict: error: hf-hub:me/other: its model.safetensors cannot be fetched (")
    assert line.count("\n") == 1


@pytest.mark.slow  # a process of its own imports torch
def test_import_has_no_side_effect_and_does_without_training():
    code = "import sys, vmoe; assert 'torch' not in sys.modules; vmoe.load; assert 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
