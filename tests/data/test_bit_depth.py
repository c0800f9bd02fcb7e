"""Files of more than 8 bits per channel: which value is white, and what is transparent."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from support import saved_runs

from vmoe.checkpoints import ENTRY, load_checkpoint
from vmoe.cli.main import main
from vmoe.data import DataConfig, ImageDataModule, load_image
from vmoe.data.images import decode_image, eval_crop
from vmoe.errors import UserError

RAMP = np.tile(np.linspace(0, 1, 60), (40, 1))


def levels(bits):
    """A ramp from 0 to the largest value of so many bits."""
    return np.round(RAMP * (2**bits - 1)).astype(np.uint16)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(depth, colour, row, transparent=None, width=2):
    """A PNG of one row of `width` pixels; Pillow writes neither 16-bit colours nor gray of 2 bits."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))
    middle = b"" if transparent is None else chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    end = chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + middle + end


def tiff(values, tags=()):
    """An uncompressed TIFF of (H, W) or (H, W, 3) values, with further tags (tag, value)."""
    data, (height, width), channels = values.tobytes(), values.shape[:2], 1 if values.ndim == 2 else 3
    forms = {"uint16": (16, 1), "float32": (32, 3)}
    bits, form = forms[values.dtype.name]
    short = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: 1 if channels == 1 else 2,
        277: channels,
        278: height,
        339: form,
    }
    long = {273: 8, 279: len(data)}
    entries, start = {}, 8 + len(data)
    extra = struct.pack("<3H", bits, bits, bits)
    rows = sorted({**short, **long, **dict(tags)}.items())
    behind = start + 2 + 12 * len(rows) + 4
    for tag, value in rows:
        if isinstance(value, float):
            entries[tag] = struct.pack("<HHIf", tag, 11, 1, value)
        elif tag == 258 and channels == 3:
            entries[tag] = struct.pack("<HHII", tag, 3, 3, behind)
        elif tag in long:
            entries[tag] = struct.pack("<HHII", tag, 4, 1, value)
        else:
            entries[tag] = struct.pack("<HHIHH", tag, 3, 1, value, 0)
    directory = struct.pack("<H", len(rows)) + b"".join(entries[tag] for tag, _ in rows) + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", start) + data + directory + extra


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_the_depth_that_is_given_makes_the_largest_value_white(tmp_path, bits):
    Image.fromarray(levels(bits)).save(tmp_path / "gray.png")
    cv2.imwrite(str(tmp_path / "colour.png"), np.dstack([levels(bits)] * 3))
    (tmp_path / "colour.tif").write_bytes(tiff(np.dstack([levels(bits)] * 3)))
    for name in ("gray.png", "colour.png", "colour.tif"):
        read = load_image(tmp_path / name, bit_depth=bits)
        assert np.abs(read[0, :, 1] - RAMP[0] * 255).max() < 1.5 and (read[..., :1] == read).all(), name


def test_the_file_s_own_word_comes_first(tmp_path):
    files = {
        "maxval.pgm": b"P5 60 40 1023\n" + levels(10).astype(">u2").tobytes(),
        "largest.tif": tiff(levels(12), [(281, 4095)]),
        "fractions.tif": tiff((RAMP * 80 - 20).astype("<f4"), [(340, -20.0), (341, 60.0)]),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        for given in (None, 16, 9):
            assert np.abs(load_image(tmp_path / name, given)[0, :, 0] - RAMP[0] * 255).max() < 1.5, (name, given)
    # The brightest value of the image itself says nothing.
    (tmp_path / "statistic.tif").write_bytes(tiff(levels(12) // 2, [(281, 2047 - 3)]))
    assert load_image(tmp_path / "statistic.tif").max() == 7


def test_fractions_need_a_range(tmp_path):
    (tmp_path / "f.tif").write_bytes(tiff(RAMP.astype("<f4")))
    assert load_image(tmp_path / "f.tif", bit_depth=1)[0, -1].tolist() == [255] * 3
    with pytest.raises(UserError, match=r"f\.tif.*fractions without a known range"):
        load_image(tmp_path / "f.tif")


@pytest.mark.parametrize("depth", [2, 4, 8, 16])
def test_a_transparent_level_of_gray_is_white(depth):
    row = {2: b"\x70", 4: b"\x1f", 8: b"\x01\xff", 16: b"\x00\x01\x03\xff"}[depth]
    image = decode_image(io.BytesIO(png(depth, 0, row, transparent=[1])), "x")
    opaque = decode_image(io.BytesIO(png(depth, 0, row)), "x")
    assert image[0, 0].tolist() == [255] * 3 != opaque[0, 0].tolist()
    assert image[0, 1].tolist() == opaque[0, 1].tolist()


def test_a_transparent_colour_of_16_bits_is_white_and_no_other():
    row = struct.pack(">6H", 1000, 2000, 3000, 1001, 2000, 3000)
    image = decode_image(io.BytesIO(png(16, 2, row, transparent=[1000, 2000, 3000])), "x")
    assert image[0].tolist() == [[255, 255, 255], [3, 7, 11]]


def test_opacity_of_16_bits(tmp_path):
    content = png(16, 4, struct.pack(">4H", 1000, 65535, 1000, 0))
    assert decode_image(io.BytesIO(content), "x", bit_depth=10)[0].tolist() == [[249] * 3, [255] * 3]
    assert decode_image(io.BytesIO(content), "x")[0].tolist() == [[3] * 3, [255] * 3]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("channels", [1, 3])
def test_deep_files_are_upright(tmp_path, orientation, channels):
    values = np.arange(4 * 6 * 3).reshape(4, 6, 3).astype(np.uint16) * 56
    values = values[..., 0] if channels == 1 else values
    (tmp_path / "a.tif").write_bytes(tiff(values, [(274, orientation)]))
    upright = Image.fromarray((values.astype(int) * 255 // 4095).astype(np.uint8))
    upright.getexif()[274] = orientation
    expected = np.array(ImageOps.exif_transpose(upright).convert("RGB"))
    assert np.array_equal(load_image(tmp_path / "a.tif", bit_depth=12), expected)


@pytest.fixture
def microscope(tmp_path):
    """Class folders of 12-bit images in 16-bit PNGs, with train and val."""
    for split in ("train", "val"):
        for label, name in enumerate(("a", "b")):
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            for number in range(10):
                Image.fromarray(levels(12) // (1 + label)).save(folder / f"{number}.png")
    return tmp_path / "set"


def module_of(root, **options):
    module = ImageDataModule(DataConfig(name="folder", root=str(root), image_size=16, **options), seed=0)
    module.setup()
    return module


@pytest.mark.parametrize("pipeline", ["workers", "device"])
def test_a_set_s_own_range_is_measured_and_said(microscope, pipeline):
    module = module_of(microscope, pipeline=pipeline, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert module.bit_depth == 12
    assert next(iter(module.test_dataloader())).images.max() > 0.75  # the central square of the ramp
    line = f"{microscope}: files of more than 8 bits, with values up to 4095: white is 4095 (data.bit_depth=12)"
    assert line in module.notes and not any("wrongly scaled" in note for note in module.notes)


def test_a_wrong_depth_is_warned_of(microscope):
    notes = module_of(microscope, bit_depth=16).notes
    assert any(
        "the brightest level of a sample of images is 15 of 255, so they look wrongly scaled" in note for note in notes
    )
    notes = module_of(microscope, bit_depth=10).notes
    assert any("has values up to 4095, and all above 1023 is white" in note for note in notes)
    with pytest.raises(ValueError, match="bit_depth=0: must be from 1 to 32"):
        DataConfig(bit_depth=0)


def test_a_set_of_fractions_is_measured(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(10):
            (tmp_path / "set" / name / f"{number}.tif").write_bytes(tiff((RAMP * 255).astype("<f4")))
    assert module_of(tmp_path / "set").bit_depth == 8


def test_arrays_of_few_levels_are_warned_of(tmp_path):
    x, y = np.ones((20, 8, 8, 3), np.uint8), np.arange(20) % 2
    np.savez(tmp_path / "set.npz", train_x=x, train_y=y, test_x=x, test_y=y)
    module = ImageDataModule(DataConfig(name="npz", root=str(tmp_path / "set.npz")), seed=0)
    module.setup()
    assert any("the brightest level of a sample of images is 1 of 255" in note for note in module.notes)


def test_predictions_read_files_as_training_did(microscope, tmp_path, capsys):
    """A single dark image of 12 bits must not be taken for one of 8 or 16."""
    content = saved_runs.content({"num_experts": 4}, class_names=("a", "b"))
    content[ENTRY]["bit_depth"] = 12
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    torch.save(content, tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert load_checkpoint(tmp_path / "run").bit_depth == 12
    dark = tmp_path / "dark.png"
    Image.fromarray(levels(8)).save(dark)
    Image.fromarray(load_image(dark, 12)).save(tmp_path / "eight.png")
    answers = {}
    for name in ("dark", "eight"):
        assert main(["predict", str(tmp_path / "run"), str(tmp_path / f"{name}.png")]) == 0
        answers[name] = capsys.readouterr().out.partition(": ")[2]
    assert answers["dark"] == answers["eight"]
    saved_runs.save_run(tmp_path / "other", {"num_experts": 4}, class_names=("a", "b"))
    assert main(["predict", str(tmp_path / "other"), str(microscope / "val")]) == 0
    assert "white is 4095" in capsys.readouterr().err


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def test_values_of_other_splits_that_are_cut_off_are_warned_of(microscope):
    write(microscope / "val" / "a" / "0.png", levels(16))
    notes = module_of(microscope).notes
    line = f"warning: data.bit_depth=12: val of {microscope} has values up to 65535, and all above 4095 is white"
    assert sum(note.startswith(line) for note in notes) == 1
    assert not any("warning: data.bit_depth" in note for note in module_of(microscope, bit_depth=16).notes)


def test_values_below_0_are_warned_of(tmp_path):
    for name in ("a", "b"):
        for number in range(10):
            write(tmp_path / "set" / name / f"{number}.tif", (RAMP * 3999).astype(np.int32) - 1000)
    assert any(
        "has values down to -1000, and all below 0 is black" in note for note in module_of(tmp_path / "set").notes
    )


def test_a_few_outliers_do_not_hide_the_depth_of_the_others(microscope):
    write(microscope / "train" / "a" / "0.png", levels(14))
    notes = module_of(microscope).notes
    assert any("white is 16383 (data.bit_depth=14); 9 of 10 files have no values above 4095" in note for note in notes)


def save_run(folder, bit_depth):
    content = saved_runs.content({"num_experts": 4}, {"name": "folder", "val_fraction": 0}, class_names=("a", "b"))
    content[ENTRY]["bit_depth"] = bit_depth
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(content, folder / "checkpoints" / "best.ckpt")
    return folder


def test_explore_takes_fractions(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for number in range(4):
        (tmp_path / "images" / f"{number}.tif").write_bytes(tiff((RAMP * (number + 1) / 4).astype("<f4")))
    run = save_run(tmp_path / "run", 1)
    options = ["--images", str(tmp_path / "images"), "--out", str(tmp_path / "out")]
    code = main(["explore", str(run), *options])
    said = capsys.readouterr().err
    assert code == 0 and "left out" not in said, said


def test_evaluate_keeps_the_depth_of_the_checkpoint(microscope, tmp_path, capsys):
    for picture in (microscope / "val").rglob("*.png"):  # of values that 8 bits hold, which would be measured
        write(picture, levels(8))
    options = ["--root", str(microscope), "--out", str(tmp_path / "out")]
    run = save_run(tmp_path / "run", 12)
    (microscope / "train").rename(tmp_path / "train")
    assert main(["evaluate", str(run), *options]) == 0
    assert "the brightest level of a sample of images is 15 of 255" in capsys.readouterr().err


@pytest.mark.parametrize("bit_depth", [None, 12, 10])
@pytest.mark.parametrize("name", ["colour.png", "gray.png", "fractions.tif"])
def test_an_upload_is_read_as_by_predict(tmp_path, bit_depth, name):
    pytest.importorskip("fastapi")
    from vmoe.cli.inputs import depth_of
    from vmoe.serve.uploads import UploadReader

    cv2.imwrite(str(tmp_path / "colour.png"), np.dstack([levels(12)] * 3))
    write(tmp_path / "gray.png", levels(12))
    (tmp_path / "fractions.tif").write_bytes(tiff((RAMP * 255).astype("<f4")))
    path = tmp_path / name
    expected = eval_crop(load_image(path, depth_of(bit_depth, [path])), 16)
    assert np.array_equal(UploadReader(16, "centre", 2, bit_depth, None)._decode(path.read_bytes()), expected)
