"""`vmoe demo-page`: its folder and its mistakes. What the page does is tested in tests/browser."""

import json

import pytest
from PIL import Image

from vmoe.cli.demo_page import main
from vmoe.serve import demo_page

pytest.importorskip("onnxscript")
MOE = {"num_experts": 3, "top_k": 2, "layers": [1]}
PARTS = ("ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


@pytest.fixture
def runtime(tmp_path):
    """Something of the form of the npm package."""
    folder = tmp_path / "runtime"
    (folder / "dist").mkdir(parents=True)
    for name in PARTS:
        (folder / "dist" / name).write_bytes(name.encode())
    return folder


@pytest.mark.slow  # the tests of the page in a browser write one too
def test_a_folder_that_is_written_again(save_run, tmp_path, runtime):
    out, pictures = tmp_path / "page", [tmp_path / name / "photo.png" for name in ("red", "blue")]
    for picture in pictures:  # of one name
        picture.parent.mkdir()
        Image.new("RGB", (20, 40), picture.parent.name).save(picture)
    out.mkdir()
    for name in ("about.js", "old.js"):  # what an older version wrote
        (out / name).write_text("")
    run = str(save_run(moe=MOE))
    assert main([run, "--out", str(out), "--runtime", str(runtime), "--images", *map(str, pictures)]) == 0
    names = {file.name for file in out.iterdir()}
    assert "old.js" not in names and (out / "ort.js").read_bytes() == PARTS[0].encode()
    about = json.loads((out / "about.js").read_text().removeprefix("globalThis.ABOUT = ").rstrip(";\n"))
    assert about["class_names"] == list("0123456789")
    assert [sample["name"] for sample in about["samples"]] == ["photo.png"] * 2
    assert about["samples"][0] != about["samples"][1]
    (layer,) = about["layers"]
    assert layer["grid"] == [4, 4] and layer["patches"] == list(range(1, 17)) and layer["capacity_factor"] == 1.5
    page = (out / "index.html").read_text()
    assert all(f'"{name}"' in page for name in names - {"index.html"})


def test_mistakes_are_one_line_and_leave_nothing(save_run, tmp_path, runtime, capsys):
    run, file, other = save_run(moe=MOE), tmp_path / "file", tmp_path / "other"
    file.write_text("no folder")
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    out = tmp_path / "page"
    before = {path.name for path in tmp_path.iterdir()}
    for arguments, told in (
        ([tmp_path / "nowhere", "--out", out], "nowhere: no such file"),
        ([tmp_path / "model.onnx", "--out", out], "give the checkpoint it was made from"),
        ([save_run("dense"), "--out", out], "a dense model without experts"),
        ([save_run("soft", {"num_experts": 3, "router": "soft", "layers": [1]}), "--out", out], "its router is soft"),
        ([run, "--out", other], "exists and is no demo page"),
        ([run, "--out", file / "page"], "cannot be written"),
        ([run, "--out", out, "--images", text], "text.jpg: cannot be read as an image"),
        ([run, "--out", out, "--runtime", file], "is not the npm package onnxruntime-web"),
        ([run, "--out", out, "--runtime", other], "is not the npm package onnxruntime-web"),
        ([run], "--out"),
    ):
        given = arguments if "--runtime" in arguments else [*arguments, "--runtime", runtime]
        assert main(list(map(str, given))) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} - before == {"dense", "soft"}


def test_npm_is_asked_for_where_it_is_missing(save_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([str(save_run(moe=MOE)), "--out", str(tmp_path / "page")]) == 2
    assert "give --runtime its .tgz" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_that_is_too_large_is_refused(save_run, tmp_path, runtime, monkeypatch, capsys):
    monkeypatch.setattr(demo_page, "LARGEST_PROGRAM", 2**20 // 8)
    assert main([str(save_run(moe=MOE)), "--out", str(tmp_path / "page"), "--runtime", str(runtime)]) == 2
    assert "choose a smaller model" in capsys.readouterr().err and not (tmp_path / "page").exists()
