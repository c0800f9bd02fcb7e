"""`vmoe data show`: the sheet holds what training sees."""

import numpy as np
import pytest
from PIL import Image

from vmoe.cli.main import main
from vmoe.data import DataConfig, FractalConfig, ImageDataModule
from vmoe.data.sheet import draw_sheet


@pytest.mark.parametrize(("classes", "rows"), [("3", 3), ("50", 10)])
def test_there_is_a_row_for_each_class(tmp_path, capsys, classes, rows):
    out = tmp_path / "sheet.png"
    assert main(["data", "show", "--config", "digits", "--classes", classes, "--images", "4", "--out", str(out)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "images: digits, 10 classes, 16 x 16 pixels" and told[-1] == f"a sheet of them in {out}"
    assert (Image.open(out).height - 51) / 68 == rows  # each of 64 pixels and a gap of 4


def test_small_pictures_are_enlarged_and_a_class_may_have_fewer():
    red, blue = (np.full((16, 16, 3), colour, dtype=np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    sheet = np.asarray(draw_sheet("two classes", [("red", [red] * 3), ("a blue one", [blue])]))
    for colour, rows, columns in ((red, 64, 3 * 64), (blue, 64, 64)):
        shown = (sheet == colour[0, 0]).all(2)
        assert (shown.any(1).sum(), shown.any(0).sum()) == (rows, columns)


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
