"""Corruptions: a function of their arguments, stronger with severity, each what its name says."""

import cv2
import numpy as np
import pytest

from vmoe.data import DataConfig, ImageDataModule
from vmoe.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from vmoe.data.samples import load_photograph

# Where the tables make images no less like the original in pixels: elastic shifts get shorter but finer, glass is now
# blurred and now shuffled, and ImageNet-C's fog gets lighter with its grain.
NOT_MONOTONE = {(name, side) for name in ("elastic_transform", "glass_blur") for side in (32, 224)} | {("fog", 224)}
MONOTONE = [(name, side) for name in CORRUPTIONS for side in (32, 224) if (name, side) not in NOT_MONOTONE]


@pytest.fixture(scope="module")
def images():
    """A photograph at CIFAR's and at ImageNet's size, by its side."""
    picture = load_photograph("china.jpg")[:427, 100:527]
    return {side: cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA) for side in (32, 224)}


def distance(image, name, severity, draws=8):
    corrupted = [corrupt(image, name, severity, 0, index).astype(float) for index in range(draws)]
    return np.mean([np.abs(part - image).mean() for part in corrupted])


@pytest.mark.parametrize("side", [32, 224])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_a_function_of_its_arguments(images, name, side):
    image, before = images[side], images[side].copy()
    np.random.seed(1)
    one = corrupt(image, name, 3, 7, 11)
    np.random.seed(2)
    assert one.dtype == np.uint8 and one.shape == image.shape
    assert (corrupt(image, name, 3, 7, 11) == one).all()
    assert (image == before).all()
    assert (one != image).any()


@pytest.mark.parametrize("name", ["gaussian_noise", "glass_blur", "motion_blur", "snow", "fog", "elastic_transform"])
def test_every_image_seed_and_severity_has_draws_of_its_own(images, name):
    one = corrupt(images[32], name, 3, 0, 0)
    assert (corrupt(images[32], name, 3, 0, 1) != one).any()
    assert (corrupt(images[32], name, 3, 1, 0) != one).any()


@pytest.mark.parametrize("name, side", MONOTONE)
def test_images_change_more_with_severity(images, name, side):
    changes = [distance(images[side], name, severity) for severity in SEVERITIES]
    if name == "pixelate":
        changes = changes[1:]  # 30 and 28 pixels for 32 are equally off
    assert changes == sorted(changes) and changes[-1] > 1.3 * changes[0]


def test_the_noises_have_the_strength_of_the_tables(images):
    gray = np.full((32, 32, 3), 128, dtype=np.uint8)

    def spread(name, severity):
        return np.std([corrupt(gray, name, severity, 0, index) for index in range(50)]) / 255

    assert spread("gaussian_noise", 5) == pytest.approx(0.10, rel=0.02)
    assert spread("shot_noise", 5) == pytest.approx((128 / 255 / 50) ** 0.5, rel=0.02)
    large = np.full((224, 224, 3), 128, dtype=np.uint8)
    hit = corrupt(large, "impulse_noise", 5, 0, 0)
    assert (hit != 128).mean() == pytest.approx(0.27, abs=0.005)
    assert (hit == 255).sum() == pytest.approx((hit == 0).sum(), rel=0.05)


def test_brightness_contrast_and_pixels(images):
    image = images[224]
    assert corrupt(image, "brightness", 5, 0, 0).max(2).mean() > image.max(2).mean() + 40
    assert corrupt(image, "contrast", 5, 0, 0).std() == pytest.approx(0.05 * image.std(), rel=0.3)
    coarse = corrupt(image, "pixelate", 5, 0, 0)  # 56 pixels enlarged four times
    assert (coarse[0:4, 0:4] == coarse[0, 0]).all()


@pytest.mark.parametrize("name", ["defocus_blur", "motion_blur", "zoom_blur", "glass_blur"])
def test_blurs_keep_flat_images_and_take_detail(images, name):
    flat = np.full((32, 32, 3), 90, dtype=np.uint8)
    assert np.abs(corrupt(flat, name, 5, 0, 0).astype(int) - 90).max() <= 1
    if name != "glass_blur":  # which moves pixels
        before, after = (
            np.abs(np.diff(part.astype(float), axis=1)).mean()
            for part in (images[224], corrupt(images[224], name, 5, 0, 0))
        )
        assert after < 0.6 * before


def test_motion_blurs_along_a_line():
    dot = np.zeros((65, 65, 3), dtype=np.uint8)
    dot[32, 32] = 255
    rows, columns = np.nonzero(corrupt(dot, "motion_blur", 5, 0, 0)[..., 0])
    assert len(rows) >= 8
    line = np.polyfit(columns, rows, 1)
    assert np.abs(np.polyval(line, columns) - rows).max() <= 1.0 and abs(line[0]) <= 1.05


def test_a_corrupted_loader_gives_the_split_in_order_whatever_the_workers(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        f"{split}_x": rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        for split, count in (("train", 20), ("test", 10))
    }
    np.savez(tmp_path / "set.npz", **arrays, train_y=np.arange(20) % 2, test_y=np.arange(10) % 2)

    def batches(name, severity=3, **changes):
        data = ImageDataModule(DataConfig(name="npz", root=str(tmp_path / "set.npz"), **changes), seed=1)
        data.setup()
        return list(data.corrupted_dataloader("test", name, severity)), list(data.test_dataloader())

    (one,), (clean,) = batches("contrast", batch_size=16)
    assert (one.labels == clean.labels).all()
    expected = [corrupt(image, "contrast", 3, 0, index) for index, image in enumerate(arrays["test_x"])]
    assert np.allclose((one.images.permute(0, 2, 3, 1) * 0.5 + 0.5).numpy() * 255, expected, atol=1e-3)
    several, _ = batches("contrast", batch_size=4, workers=1)
    assert all((part.images == one.images[4 * index : 4 * index + 4]).all() for index, part in enumerate(several))
    (other,), _ = batches("gaussian_noise", batch_size=16, split_seed=5)
    assert (other.images != batches("gaussian_noise", batch_size=16)[0][0].images).any()
