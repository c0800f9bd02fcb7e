"""`vmoe predict`."""

import csv
import importlib.util
import json

import pytest
from PIL import Image

from vmoe.cli.export import main as export
from vmoe.cli.predict import main

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
