"""Reading one image of any mode, and what evaluation makes of it."""

import numpy as np
import pytest
import torch
from PIL import Image

from vmoe.data import eval_crop, eval_transform, load_image, normalise
from vmoe.errors import UserError

RED, BLUE = (255, 0, 0), (0, 0, 255)


def save(image, path, **options):
    image.save(path, **options)
    return path


def test_rgb_is_read_as_it_is(tmp_path, rng):
    pixels = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    read = load_image(save(Image.fromarray(pixels), tmp_path / "a.png"))
    assert read.dtype == np.uint8 and np.array_equal(read, pixels)
    read[0] = 0  # memory of its own


def test_gray_becomes_three_equal_channels(tmp_path, rng):
    pixels = rng.integers(0, 256, (5, 7), dtype=np.uint8)
    read = load_image(save(Image.fromarray(pixels), tmp_path / "a.png"))
    assert np.array_equal(read, np.stack([pixels] * 3, axis=2))


def test_sixteen_bit_gray_is_scaled_to_eight(tmp_path):
    pixels = np.array([[0, 257, 65535], [1000, 32896, 65534]], dtype=np.uint16)
    read = load_image(save(Image.fromarray(pixels), tmp_path / "a.png"))
    assert read[..., 0].tolist() == [[0, 1, 255], [3, 128, 254]]


def test_transparent_pixels_are_white(tmp_path):
    image = Image.new("RGBA", (2, 1), (*RED, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))  # black, but fully transparent
    assert load_image(save(image, tmp_path / "a.png"))[0].tolist() == [[255, 0, 0], [255, 255, 255]]


def test_palette_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    assert load_image(save(image, tmp_path / "a.png"))[0].tolist() == [list(RED), list(BLUE)]
    transparent = save(image, tmp_path / "b.png", transparency=1)
    assert load_image(transparent)[0].tolist() == [list(RED), [255, 255, 255]]


def test_cmyk_jpeg(tmp_path):
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # all magenta and yellow ink: red
    read = load_image(save(image, tmp_path / "a.jpg", quality=100))
    assert np.abs(read.astype(int) - np.array(RED)).max() < 10


def test_bilevel(tmp_path):
    assert load_image(save(Image.new("1", (2, 2), 1), tmp_path / "a.png")).min() == 255


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_orientation_is_applied(tmp_path, orientation, turns):
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, :8] = RED
    exif = Image.Exif()
    exif[0x0112] = orientation
    read = load_image(save(Image.fromarray(pixels), tmp_path / "a.png", exif=exif))
    assert np.array_equal(read, np.rot90(pixels, turns))


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    path = save(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(path)[0, 0].tolist() == list(RED)


def bad_files(folder):
    """Name -> how the file is bad."""
    whole = save(
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), folder / "w.png"
    )
    (folder / "text.jpg").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes(whole.read_bytes()[:3000])
    save(Image.fromarray(np.ones((2, 2), dtype=np.float32)), folder / "float.tiff")
    (folder / "folder.png").mkdir()
    return ["text.jpg", "empty.png", "cut.png", "float.tiff", "folder.png", "missing.png"]


def test_unreadable_files_are_named_in_one_line(tmp_path):
    for name in bad_files(tmp_path):
        with pytest.raises(UserError) as caught:
            load_image(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_decompression_bomb_is_refused(tmp_path, monkeypatch):
    path = save(Image.new("RGB", (64, 64)), tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"bomb\.png: cannot be read"):
        load_image(path)


def test_eval_crop_takes_the_central_square():
    image = np.zeros((4, 10, 3), dtype=np.uint8)
    image[:, 3:7] = 200
    assert eval_crop(image, 4).tolist() == np.full((4, 4, 3), 200).tolist()
    assert eval_crop(image.transpose(1, 0, 2), 2).min() == 200


def test_pictures_of_another_shape_are_cropped_squashed_or_framed():
    image = np.zeros((40, 120, 3), np.uint8)
    image[:, 40:80] = 200  # the central third
    assert np.unique(eval_crop(image, 20)).tolist() == [200]
    assert eval_crop(image, 20, "squash")[0, :, 0].tolist().count(200) == pytest.approx(7, abs=1)
    framed = eval_crop(image, 20, "letterbox")
    assert np.unique(framed[:6]).tolist() == np.unique(framed[-6:]).tolist() == [127]
    assert framed[10, 10, 0] == 200 and framed[10, 1, 0] == 0
    assert np.array_equal(eval_crop(framed, 20, "letterbox"), framed)


def test_an_image_size_may_be_of_any_shape():
    image = np.random.default_rng(0).integers(0, 256, (40, 120, 3), dtype=np.uint8)
    assert np.array_equal(eval_crop(image, (20, 30)), eval_crop(image[:, 30:90], (20, 30), "squash"))
    assert np.array_equal(eval_crop(image, (20, 60)), eval_crop(image, (20, 60), "letterbox"))
    assert [eval_crop(image, (17, 9), crop).shape for crop in ("centre", "squash", "letterbox")] == [(17, 9, 3)] * 3


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 3000, 3), (3000, 3, 3), (50, 40, 3)])
def test_eval_crop_gives_the_image_size(shape):
    assert eval_crop(np.zeros(shape, dtype=np.uint8), 16).shape == (16, 16, 3)


def test_shrinking_averages_areas():
    board = np.indices((8, 8)).sum(0) % 2 * 200  # a checkerboard, which sampling alone would alias
    image = np.repeat(board[..., None], 3, axis=2).astype(np.uint8)
    assert np.unique(eval_crop(image, 4)).tolist() == [100]


def test_eval_transform_normalises_by_channel(rng):
    image = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    expected = (image.transpose(2, 0, 1) / 255 - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
    result = eval_transform(6, mean, std)(image)
    assert result.dtype == torch.float32 and result.is_contiguous()
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-5)


def test_normalised_values_do_not_depend_on_the_batch(rng):
    images = rng.integers(0, 256, (5, 7, 7, 3), dtype=np.uint8)
    batch = normalise(images, (0.4,) * 3, (0.2,) * 3)
    for image, result in zip(images, batch, strict=True):
        assert torch.equal(eval_transform(7, (0.4,) * 3, (0.2,) * 3)(image), result)
