"""Image files cut off, with flipped bits, of every mode and orientation: a picture, or one line that names the file."""

import io
import json
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import saved_runs

from vmoe.cli.main import main
from vmoe.data import load_image
from vmoe.errors import UserError

FORMATS = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]
MODES = [
    "1",
    "L",
    "LA",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "I;16",
    "F",
    "La",
    "RGBa",
]


def encoded(form: str, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form)
    return buffer.getvalue()


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Cut off, with flipped bits, with bytes taken out or put in: one of these, or several."""
    content = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(content)) if content else 0
        how = draw.choice(["cut", "flip", "flip", "take", "put", "zeros"])
        if how == "cut":
            del content[place:]
        elif how == "flip" and content:
            content[place] ^= 1 << draw.randrange(8)
        elif how == "take":
            del content[place : place + draw.randint(1, 40)]
        elif how == "put":
            content[place:place] = draw.randbytes(draw.randint(1, 40))
        else:
            content[place : place + 8] = bytes(len(content[place : place + 8]))
    return bytes(content)


def check(path: Path) -> bool:
    """Whether it is a picture; else one line says why not."""
    try:
        picture = load_image(path)
    except UserError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
        return False
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3 and picture.size
    return True


@pytest.mark.parametrize("form", FORMATS)
def test_damaged_files(tmp_path, form):
    whole, draw = encoded(form), random.Random(form)
    path = tmp_path / f"x.{form.lower()}"
    path.write_bytes(whole)
    assert check(path)
    read = 0
    for _ in range(150):
        path.write_bytes(damaged(whole, draw))
        read += check(path)
    assert read < 150  # some are damaged beyond reading


@pytest.mark.parametrize("mode", MODES)
def test_every_mode(tmp_path, mode):
    tried = 0
    for form in FORMATS:
        path = tmp_path / f"x.{form.lower()}"
        try:
            path.write_bytes(encoded(form, mode))
        except (OSError, ValueError, KeyError):  # Pillow has no such file
            continue
        tried += 1
        assert check(path) or mode == "F"
    assert tried or mode in ("La", "RGBa", "HSV", "PA", "RGBX", "LA")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_every_orientation_is_shown_upright(tmp_path, form):
    """A corner's colour tells which way up: red is at the top left of the picture that is meant."""
    meant = np.full((16, 32, 3), 255, np.uint8)
    meant[:8, :16] = (255, 0, 0)
    stored_as = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transposes
    for orientation, transpose in stored_as.items():
        stored = Image.fromarray(meant)
        if transpose is not None:
            stored = stored.transpose(transpose)
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.{form.lower()}"
        stored.save(path, form, exif=exif, **({"quality": 95} if form in ("JPEG", "WEBP") else {}))
        shown = load_image(path)
        assert shown.shape == meant.shape, orientation
        assert np.abs(shown.astype(int) - meant).mean() < 12, orientation


@pytest.mark.parametrize("sides", [(60_000, 60_000), (2**31 - 1, 1), (0, 5), (1, 10**6)])
def test_headers_that_promise_too_much(tmp_path, sides):
    content = bytearray(encoded("PNG"))
    content[16:24] = struct.pack(">II", *sides)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    path = tmp_path / "x.png"
    path.write_bytes(content)
    assert not check(path)


@pytest.fixture
def damaged_folder(tmp_path) -> Path:
    folder, draw = tmp_path / "pictures", random.Random(0)
    folder.mkdir()
    for number in range(12):
        whole = encoded(FORMATS[number % 4])
        content = whole if number % 3 == 0 else damaged(whole, draw)
        (folder / f"{number:02}.{FORMATS[number % 4].lower().replace('jpeg', 'jpg')}").write_bytes(content)
    return folder


def test_predict_answers_for_those_that_can_be_read(tmp_path, damaged_folder, capsys):
    run = saved_runs.save_run(tmp_path / "run", {"num_experts": 4})
    readable = sum(map(check, damaged_folder.iterdir()))
    assert 0 < readable < 12
    capsys.readouterr()
    assert main(["predict", str(run), str(damaged_folder)]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == readable
    assert f"{12 - readable} of 12 files left out" in shown.err


@pytest.mark.parametrize("tool", ["heatmap", "explore"])
def test_heatmap_and_explore_leave_out_what_predict_leaves_out(tmp_path, damaged_folder, capsys, tool):
    run, out = str(saved_runs.save_run(tmp_path / "run", {"num_experts": 4})), tmp_path / "out"
    readable = sum(map(check, damaged_folder.iterdir()))
    capsys.readouterr()
    images = [str(damaged_folder), "--layers", "3"]
    if tool == "explore":
        images = ["--images", str(damaged_folder), "--replicates", "20"]
    assert main([tool, run, *images, "--out", str(out)]) == 0
    error = capsys.readouterr().err
    assert f"{12 - readable} of 12 files left out" in error
    assert error.count("cannot be read as an image") == 12 - readable
    if tool == "heatmap":
        index = json.loads((out / "index.json").read_text())
        assert len(index["images"]) == readable and len(index["damaged"]) == 12 - readable
        assert index["damaged"][0].split(": ")[0] in (out / "index.html").read_text()
    else:
        report = json.loads((out / "data" / "report.json").read_text())
        assert report["provenance"]["num_images"] == readable


@pytest.mark.parametrize("tool", ["predict", "heatmap", "explore"])
def test_what_can_be_given_as_a_picture(tmp_path, capsys, tool):
    run = str(saved_runs.save_run(tmp_path / "run", {"num_experts": 4}))
    (tmp_path / "a 1.png").write_bytes(encoded("PNG"))
    (tmp_path / "a 2.png").write_bytes(b"no picture")
    out = [] if tool == "predict" else ["--out", str(tmp_path / "out")]

    def told(given):
        images = ["--images", given, "--replicates", "20"] if tool == "explore" else [given]
        code = main([tool, run, *images, *out])
        return code, capsys.readouterr().err

    for given, words in {
        "https://example.org/cat.png": "https://example.org/cat.png: addresses are not fetched; download",
        "-": "-: pictures are not read from standard input",
        str(tmp_path / "b*.png"): "b*.png: no file matches this pattern",
        str(tmp_path / "a 2.png"): "a 2.png: cannot be read as an image",
    }.items():
        code, error = told(given)
        assert code == 2 and error.count("\n") == 1 and words in error
    assert not (tmp_path / "out").exists()
    code, error = told(str(tmp_path / "a*.png"))
    assert code == 0 and "1 of 2 files left out:" in error


@pytest.mark.parametrize("split", ["train", "val"])
def test_training_replaces_them_and_evaluation_stops(tmp_path, capsys, split):
    for each in ("train", "val", "test"):
        folder = tmp_path / "tree" / each / "cat"
        folder.mkdir(parents=True)
        for number in range(20):
            (folder / f"{number}.png").write_bytes(encoded("PNG")[: 300 if each == split and number % 4 == 0 else None])
    options = ["--data.name", "folder", "--data.root", str(tmp_path / "tree"), "--data.image_size", "16"]
    options += ["--data.batch_size", "10", "--trainer.epochs", "1", "--trainer.device", "cpu"]
    options += [f"--model.kwargs.{name}={value}" for name, value in saved_runs.KWARGS.items()]
    code = main(["train", *options, "--output_dir", str(tmp_path / "run")])
    told = capsys.readouterr()
    if split == "train":
        assert code == 0 and "5 damaged images were replaced" in told.out
    else:
        assert code == 2 and told.err.count("\n") == 1 and "cannot be read as an image" in told.err
