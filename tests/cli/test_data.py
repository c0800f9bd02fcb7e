"""`vmoe data show`: the sheet holds what training sees."""

import json

import numpy as np
import pytest
from PIL import Image

from vmoe.cli.main import main
from vmoe.data import DataConfig, FractalConfig, ImageDataModule
from vmoe.data.images import eval_crop
from vmoe.data.inspection import inspect_images
from vmoe.data.sheet import draw_sheet


@pytest.mark.parametrize(("classes", "rows"), [("3", 3), ("50", 10)])
def test_there_is_a_row_for_each_class(tmp_path, capsys, classes, rows):
    out = tmp_path / "sheet.png"
    options = ["--images", "4", "--look-at", "0", "--out", str(out)]
    assert main(["data", "show", "--config", "digits", "--classes", classes, *options]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "images: digits, 10 classes, 16 x 16 pixels" and told[-1] == f"a sheet of them in {out}"
    assert (Image.open(out).height - 51) / 68 == rows  # each of 64 pixels and a gap of 4


def test_small_pictures_are_enlarged_and_a_class_may_have_fewer():
    red, blue = (np.full((16, 16, 3), colour, dtype=np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    sheet = np.asarray(draw_sheet("two classes", [("red", [red] * 3), ("a blue one", [blue])]))
    for colour, rows, columns in ((red, 64, 3 * 64), (blue, 64, 64)):
        shown = (sheet == colour[0, 0]).all(2)
        assert (shown.any(1).sum(), shown.any(0).sum()) == (rows, columns)


def test_a_long_list_of_numbers_is_broken_after_a_comma():
    image = np.zeros((8, 8, 3), np.uint8)
    numbers = ",".join(["0.123"] * 60)
    cut, broken = (draw_sheet("bands", [("a", [image])], [line]).height for line in (numbers[:40], numbers))
    assert broken > cut


def test_pictures_are_those_of_the_first_epoch():
    config = DataConfig(name="fractals", batch_size=8, fractals=FractalConfig(classes=4, epoch_images=32))
    data = ImageDataModule(config, 0)
    data.setup()
    seen = {}
    for batch in data.train_dataloader():
        levels = batch.images.permute(0, 2, 3, 1).numpy() * 255 * np.array(data.std) + 255 * np.array(data.mean)
        for label, image in zip(batch.labels.tolist(), levels, strict=True):
            seen.setdefault(label, []).append(image.round().astype(np.uint8).tobytes())
    for label in range(4):
        shown = [picture.tobytes() for picture in data.training_pictures(label, 99)]
        assert sorted(shown) == sorted(seen[label]) and len(shown) == 8


def test_what_is_wrong_with_a_set_is_found(tmp_path, capsys):
    root, rng = tmp_path / "photos", np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                shape = (20, 30) if split == "train" and number else (40, 24)
                coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
                coarse.resize(shape[::-1], Image.Resampling.BICUBIC).save(root / split / name / f"{number}.png")
    with Image.open(root / "train" / "bee" / "3.png") as picture:
        picture.resize((60, 40), Image.Resampling.BICUBIC).save(root / "val" / "ant" / "again.jpg", quality=90)
    Image.new("RGB", (20, 20), "white").save(root / "train" / "ant" / "white.png")
    Image.new("RGB", (20, 20), "white").save(root / "val" / "ant" / "white.png")  # plain, and so not compared
    (root / "val" / "bee" / "broken.png").write_bytes(b"no picture")
    sheet, report = tmp_path / "sheet.png", tmp_path / "report.json"
    options = ["--data.image_size", "[20,30]", "--data.crop", "squash", "--out", str(sheet), "--json", str(report)]
    assert main(["data", "show", str(root), *options, "--images", "4"]) == 0
    said, found = capsys.readouterr().out, json.loads(report.read_text())
    assert "sizes in training: 20 x 20 to 40 x 30, median 20 x 30 (height x width)" in said
    assert "warning: 1 of 11 test images cannot be read: " in said and "broken.png" in said
    suggested = next(line for line in said.splitlines() if "--data.mean" in line)
    assert suggested.count("'[") == suggested.count("]'") == 2  # zsh refuses brackets without quotes
    (pair,) = found["near_duplicates"]
    assert pair["image"].endswith("again.jpg") and pair["training_image"].endswith("bee/3.png")
    assert "1 of 11 test images are nearly training images, so results are too good" in said
    data = ImageDataModule(root, image_size=(20, 30), crop="squash")
    data.setup()
    train = data.image_sets()["train"]
    levels = np.stack([eval_crop(train.read(index), (20, 30), "squash") for index in range(25)]) / 255
    assert found["mean"] == pytest.approx(levels.mean((0, 1, 2)), abs=1e-4)
    assert found["std"] == pytest.approx(levels.std((0, 1, 2)), abs=1e-4)
    assert Image.open(sheet).height > 3 * (80 + 4)  # two classes, and the pair


def test_near_duplicates_have_a_row_for_each_split(tmp_path):
    for split, numbers in (("train", (0, 1, 2)), ("val", (1, 3)), ("test", (2, 4))):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in numbers:
                pixels = np.random.default_rng([number, name == "bee"]).integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.png")
    data = ImageDataModule(tmp_path, image_size=16)
    data.setup()
    rows = inspect_images(data, progress=False).rows(3)
    assert [(name, len(pictures)) for name, pictures in rows] == [("validation | training", 2), ("test | training", 2)]
    assert all(np.array_equal(*pictures) for _, pictures in rows)
