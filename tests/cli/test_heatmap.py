"""`vmoe heatmap`: pages and an index for images of any kind; one line for a mistake."""

import json
import re
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image

from vmoe.cli.export import main as export
from vmoe.cli.heatmap import main
from vmoe.cli.predict import main as predict

MOE = {"num_experts": 4, "top_k": 2}


@pytest.fixture
def save_image(tmp_path):
    def save(name, size=(16, 16), mode="RGB", **options):
        pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels, "RGBA")
        if mode == "I;16":
            image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        elif mode != "RGBA":
            image = image.convert("RGB").convert(mode)
        image.save(path, **options)
        return str(path)

    return save


def test_images_of_any_size_and_mode(save_run, save_image, tmp_path, capsys):
    images = [
        save_image("rgb.png"),
        save_image("tall.jpg", (20, 500)),
        save_image("wide.png", (90, 1), "RGBA"),
        save_image("tiny.png", (1, 1), "L"),
        save_image("palette.gif", (40, 30), "P"),
        save_image("deep.png", (20, 20), "I;16"),
        save_image("ink.jpg", (33, 20), "CMYK"),
        save_image("bits.png", (18, 20), "1"),
    ]
    out = tmp_path / "out"
    assert main([str(save_run(moe=MOE)), *images, "--out", str(out), "--layers", "3"]) == 0
    index = json.loads((out / "index.json").read_text())
    assert [image["file"] for image in index["images"]] == images
    assert index["images"][1]["size"] == [20, 500]
    for image in index["images"]:
        assert image["prediction"]["class"] in "0123456789"
        assert sum(told["probability"] for told in image["most_probable"]) <= 1 + 1e-6
        assert list(image["layers"]) == ["blocks.3.mlp"]
        for layer in image["layers"].values():
            assert sum(layer["first_choice_share"]) == pytest.approx(1)
            assert sum(layer["choice_share"]) == pytest.approx(1)
            assert sum(layer["mean_gate"]) == pytest.approx(1, abs=1e-5)
            assert layer["dropped_share"] == 0
            assert [token["token"] for token in layer["prefix_tokens"]] == ["class token"]
        for page in image["pages"]:
            Image.open(out / page).verify()
    pages = {page for image in index["images"] for page in image["pages"]}
    assert len(pages) == 8
    assert {path.name for path in out.iterdir()} == pages | {"index.html", "index.json"}
    assert "rgb.png: " in capsys.readouterr().out


def test_a_folder_all_layers_and_a_capacity(save_run, save_image, tmp_path):
    save_image("photos/a/cat.png"), save_image("photos/a/dog.png"), save_image("photos/b/cat.png")
    arguments = [str(save_run(moe=MOE)), str(tmp_path / "photos/a"), str(tmp_path / "photos/b/cat.png")]
    arguments += ["--out", str(tmp_path / "out"), "--capacity-factor", "0.5", "--layers", "all"]
    assert main(arguments) == 0
    index = json.loads((tmp_path / "out/index.json").read_text())
    assert [image["pages"] for image in index["images"]] == [
        [f"{name}-{page}.png" for page in ("blocks.1.mlp", "blocks.3.mlp", "overview")]
        for name in ("cat", "dog", "cat-2")
    ]
    assert index["capacity_factor"] == 0.5
    assert index["images"][0]["layers"]["blocks.3.mlp"]["dropped_share"] > 0.2


def test_one_figure_an_image_and_a_page_that_shows_them(save_run, save_image, tmp_path, capsys):
    save_image("photos/<b> & 'c'.png"), save_image("photos/100%.png")
    out = tmp_path / "out"
    assert main([str(save_run(moe=MOE)), str(tmp_path / "photos"), "--out", str(out)]) == 0
    index = json.loads((out / "index.json").read_text())
    figures = [image["pages"] for image in index["images"]]
    assert figures == [["100%-overview.png"], ["<b> & 'c'-overview.png"]]
    assert list(index["images"][0]["layers"]) == ["blocks.1.mlp", "blocks.3.mlp"]
    page = (out / "index.html").read_text()
    shown = [unquote(source) for source in re.findall(r"<img [^>]*src='([^']*)'", page)]
    assert shown == ["100%-overview.png", "<b> & 'c'-overview.png"] and all((out / name).is_file() for name in shown)
    assert "<b>" not in page and "&lt;b&gt; &amp; &#x27;c&#x27;.png" in page
    assert f"predicted: {index['images'][0]['prediction']['class']} " in page
    assert "index.html, 2 figures and index.json" in capsys.readouterr().out


def test_a_diverged_checkpoint_is_told_before_a_page_is_written(save_run, save_image, tmp_path, capsys):
    run = save_run(moe=MOE)
    file = run / "checkpoints" / "best.ckpt"
    content = torch.load(file, weights_only=True)
    content["state_dict"]["model.head.bias"] *= float("nan")
    torch.save(content, file)
    assert main([str(run), save_image("cat.png"), "--out", str(tmp_path / "out")]) == 2
    assert "not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_mistakes_are_one_line_that_names_them(save_run, save_image, tmp_path, capsys):
    run, image, out = str(save_run(moe=MOE)), save_image("cat.png"), str(tmp_path / "out")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG not really")
    dense = str(save_run("dense"))
    soft = str(save_run("soft", moe={"num_experts": 4, "router": "soft"}))
    for arguments, named in (
        ([run, str(broken), "--out", out], "broken.png"),
        ([run, str(tmp_path / "missing.png"), "--out", out], "missing.png"),
        ([run, str(tmp_path / "run"), "--out", out], "no image file"),
        ([dense, image, "--out", out], "dense"),
        ([str(tmp_path / "none.ckpt"), image, "--out", out], "none.ckpt"),
        ([run, image, "--out", out, "--layers", "0"], "--layers 0"),
        ([run, image, "--out", out, "--capacity-factor", "-1"], "--capacity-factor"),
        ([run, image, "--out", out, "--capacity-factor", "2000"], "error: --capacity-factor 2000: "),
        ([soft, image, "--out", out, "--capacity-factor", "0.5"], "error: --capacity-factor 0.5: "),
        ([run, image, "--out", out, "--device", "abacus"], "--device abacus"),
        ([run, image, "--out", str(broken)], "broken.png"),
        ([run, image], "--out"),
        ([run, image, "--out", out, "--layer", "3"], "--layer"),
    ):
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("vmoe heatmap: error: ") and error.count("\n") == 1
        assert named in error
    assert not list(tmp_path.glob("out/*"))


def test_where_images_are_routed_as_a_whole_there_is_no_map(save_run, save_image, tmp_path, capsys):
    run = str(save_run(moe=MOE | {"route": "image", "capacity_factor": None}))
    picture = save_image("photo.png")
    assert main([run, picture, "--out", str(tmp_path / "maps")]) == 2
    assert "a map would have one colour; vmoe explore shows" in capsys.readouterr().err
    assert predict([run, picture, "--routing"]) == 0
    told = capsys.readouterr().out
    assert told.count("blocks.1.mlp: expert ") == 1 and told.count(" 50%") >= 2
    assert export([run, "--format", "hub", "--out", str(tmp_path / "hub")]) == 0
    assert not (tmp_path / "hub" / "routing.png").exists()
    assert "2 for each image" in (tmp_path / "hub" / "README.md").read_text()
