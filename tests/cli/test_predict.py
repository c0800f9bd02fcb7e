"""`vmoe predict`."""

import csv
import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image

import vmoe
from vmoe.cli.export import main as export
from vmoe.cli.predict import main
from vmoe.errors import UserError

MOE = {"num_experts": 3, "top_k": 2, "layers": [1]}


@pytest.fixture
def pictures(tmp_path):
    """A folder of odd pictures, and a text that is none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (1, 1), "red").save(folder / "a.png")
    Image.new("RGB", (30000, 2), "blue").save(folder / "b.png")
    Image.new("CMYK", (40, 50)).save(folder / "c.jpg")
    frames = [Image.new("P", (20, 20), colour) for colour in range(3)]
    frames[0].save(folder / "d.gif", save_all=True, append_images=frames[1:])
    (folder / "e.jpg").write_text("no picture")
    return folder


def answers(capsys, *arguments) -> tuple[str, str]:
    assert main(list(map(str, arguments))) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_every_form_gives_the_same_answers(save_run, pictures, tmp_path, capsys):
    run = save_run(moe=MOE)
    forms = [run, tmp_path / "shared", tmp_path / "model.safetensors", tmp_path / "model.onnx"]
    assert export([str(run), "--format", "hub", "--out", str(forms[1])]) == 0
    assert export([str(run), "--out", str(forms[2])]) == 0
    if importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnxscript") is None:
        forms.pop()
    else:
        assert export([str(run), "--format", "onnx", "--out", str(forms[3])]) == 0
    capsys.readouterr()
    expected, told = answers(capsys, run, pictures)
    assert expected.count("\n") == 4 and "a.png: " in expected and expected.splitlines()[0].count("%") == 5
    assert "1 of 5 files left out:" in told and "e.jpg: cannot be read as an image" in told
    for form in forms[1:]:
        assert answers(capsys, form, pictures)[0] == expected


def test_arrays_and_tables_hold_what_is_printed(save_run, pictures, tmp_path, capsys):
    run, written = save_run(moe=MOE), {name: tmp_path / f"{name}.npz" for name in ("logits", "embeddings")}
    table, parquet = tmp_path / "answers.csv", tmp_path / "answers.parquet"
    files = [f"--{name}={path}" for name, path in written.items()] + [f"--csv={table}", f"--parquet={parquet}"]
    out, _ = answers(capsys, run, pictures, *files, "--threshold", 1)
    assert out.count(": unknown (") == 4  # nobody is that sure
    arrays = {name: np.load(path) for name, path in written.items()}
    model = vmoe.load(run)
    assert [row.partition(": ")[0] for row in out.splitlines()] == arrays["logits"]["files"].tolist()
    assert arrays["embeddings"]["class_names"].tolist() == model.class_names
    vectors, logits = torch.from_numpy(arrays["embeddings"]["embeddings"]), arrays["logits"]["logits"]
    assert torch.allclose(model.get_classifier()(vectors), torch.from_numpy(logits), atol=1e-5)
    rows = list(csv.DictReader(table.open()))
    assert {row["label"] for row in rows} == {"unknown"}
    probabilities = torch.from_numpy(logits).softmax(-1).max(-1).values
    best = [float(row["probability"]) for row in rows if row["rank"] == "1"]
    assert best == pytest.approx(probabilities.tolist(), abs=1e-5)
    read = pytest.importorskip("pyarrow.parquet").read_table(parquet).to_pylist()
    assert [(row["file"], row["class"]) for row in read] == [(row["file"], row["class"]) for row in rows]


def test_test_time_augmentation_does_not_care_for_mirrored_images(save_run, tmp_path):
    model = vmoe.load(save_run(moe=MOE))
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    plain, mirrored = (model.predict(each, features=True) for each in (image, image[:, ::-1]))
    both = [model.predict(each, tta=True, features=True) for each in (image, image[:, ::-1])]
    np.testing.assert_allclose(both[0].logits, (plain.logits + mirrored.logits) / 2, atol=1e-6)
    np.testing.assert_allclose(both[0].features, (plain.features + mirrored.features) / 2, atol=1e-6)
    np.testing.assert_allclose(both[0].probabilities, both[1].probabilities, atol=1e-6)
    assert model.predict(image).features is None


def test_a_picture_is_unknown_below_the_threshold(save_run):
    found = vmoe.load(save_run(moe=MOE)).predict(np.zeros((8, 8, 3), np.uint8))
    most = float(found.probabilities.max())
    assert found.labels_from(most) == found.labels
    assert found.labels_from(min(1, most + 1e-3)) == ["unknown"]
    with pytest.raises(UserError, match=r"threshold=2: must be a probability, from 0 to 1"):
        found.labels_from(2)


def test_tables(save_run, pictures, tmp_path, capsys):
    table, numbers = tmp_path / "answers.csv", tmp_path / "answers.json"
    out, _ = answers(capsys, save_run(moe=MOE), pictures, "--top", 2, "--csv", table, "--json", numbers, "--routing")
    rows = list(csv.DictReader(table.open()))
    told = json.loads(numbers.read_text())
    assert len(rows) == 8 and rows[0]["rank"] == "1" and len(told["images"]) == 4 and len(told["damaged"]) == 1
    assert rows[0]["class"] == told["images"][0]["predictions"][0]["class"]
    shares = told["images"][0]["routing"]["blocks.1.mlp"]
    assert len(shares) == 3 and sum(shares) == pytest.approx(1) and "blocks.1.mlp: expert" in out


def test_mistakes_are_one_line(save_run, pictures, tmp_path, capsys):
    run = save_run(moe=MOE)
    for arguments, told in (
        ([run, pictures / "e.jpg"], "e.jpg: cannot be read as an image"),
        ([run, pictures / "nowhere.jpg"], "no such image file"),
        ([run, pictures, "--top", "0"], "--top"),
        ([tmp_path / "no.onnx", pictures], "no.onnx: no such file"),
        ([save_run("dense"), pictures, "--routing"], "dense model"),
    ):
        assert main(list(map(str, arguments))) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1


def test_foreign_onnx_files(pictures, tmp_path, capsys):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    value = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [1])
    same = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["images"], ["logits"])], "g", [value], [same])
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / "foreign.onnx")
    (tmp_path / "damaged.onnx").write_text("no model")
    for name, told in (("foreign.onnx", "without our metadata"), ("damaged.onnx", "damaged")):
        assert main([str(tmp_path / name), str(pictures)]) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1
