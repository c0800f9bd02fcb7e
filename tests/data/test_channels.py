"""Pictures of other channels than RGB, and of more than 8 bits: read without loss, from every kind of set."""

import io
import tarfile

import albumentations as A
import cv2
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps

import vmoe
from vmoe.data import DataConfig, ImageDataModule
from vmoe.data.bit_depth import depth_of_files
from vmoe.data.channels import count_values, displayed, displayed_line, upright
from vmoe.data.images import load_image, to_pixels
from vmoe.data.inspection import inspect_images
from vmoe.errors import UserError

ORIENTATION = 274
RNG = np.random.default_rng(0)
DEEP = RNG.integers(0, 65536, (5, 7, 13), dtype=np.uint16)
BANDS = {"photometric": "minisblack", "planarconfig": "contig"}


def bands(channels):
    return BANDS if channels > 1 else {"photometric": "minisblack"}


def levels(path, channels, white=65535):
    values = load_image(path, channels=channels)
    assert values.dtype == np.float32 and values.shape[2] == channels
    return np.rint(values.astype(np.float64) * white).astype(int)


def write_png(path, pixels):
    """OpenCV takes blue first."""
    order = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[pixels.shape[2]]
    assert cv2.imwrite(str(path), pixels[..., order])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_png_of_16_bits_is_read_without_loss(tmp_path, channels):
    write_png(tmp_path / "a.png", DEEP[..., :channels])
    assert np.array_equal(levels(tmp_path / "a.png", channels), DEEP[..., :channels])


@pytest.mark.parametrize("compression", [None, "lzw", "deflate"])
@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_bands_of_a_tiff_are_read_without_loss(tmp_path, channels, compression):
    tifffile.imwrite(tmp_path / "a.tif", DEEP[..., :channels].squeeze(), compression=compression, **bands(channels))
    assert np.array_equal(levels(tmp_path / "a.tif", channels), DEEP[..., :channels])


def test_bands_one_after_the_other_and_colours_of_a_tiff(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.moveaxis(DEEP, 2, 0), photometric="minisblack", planarconfig="separate")
    assert np.array_equal(levels(tmp_path / "a.tif", 13), DEEP)
    tifffile.imwrite(tmp_path / "b.tif", DEEP[..., :3], photometric="rgb")
    assert np.array_equal(levels(tmp_path / "b.tif", 3), DEEP[..., :3])
    tifffile.imwrite(tmp_path / "c.tif", np.float32([[-2.5, 40.0], [np.nan, 1.0]]), photometric="minisblack")
    assert load_image(tmp_path / "c.tif", channels=1)[..., 0].tolist() == [[-2.5, 40.0], [0.0, 1.0]]  # not clipped


@pytest.mark.parametrize("channels", [None, 1])
def test_missing_values_do_not_decide_the_depth_and_are_0(tmp_path, channels):
    """NaN, infinity, and the smallest float32, which programs for maps write; one of them made all images black."""
    values = np.float32([[0.2, np.nan, np.inf], [-np.inf, np.finfo(np.float32).min, 1.0]])
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        tifffile.imwrite(tmp_path / name / "0.tif", values)
        tifffile.imwrite(tmp_path / name / "1.tif", np.zeros((2, 1), np.float32))
    data = ImageDataModule(tmp_path, channels=channels, image_size=2, val_fraction=0, check=False)
    assert data.bit_depth == 1
    white = 255 if channels is None else 1
    read = load_image(tmp_path / "a" / "0.tif", data.bit_depth, channels)[..., 0]
    np.testing.assert_allclose(read / white, [[0.2, 0, 0], [0, 0, 1]], atol=1e-6)


@pytest.mark.parametrize("channels", [None, 1])
def test_values_of_more_than_32_bits_have_the_largest_depth_that_a_checkpoint_holds(tmp_path, channels):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            tifffile.imwrite(tmp_path / name / f"{number}.tif", np.float32([[1, 2**40 + number]]))
    data = ImageDataModule(tmp_path, channels=channels, image_size=2, val_fraction=0)
    assert data.bit_depth == 32
    is_clipped = any("all above 4294967295 is white; save smaller ones" in line for line in data.notes)
    assert is_clipped == (channels is None)


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1)])
def test_an_array_in_a_file_and_in_memory(tmp_path, axes):
    array = DEEP.transpose(axes)
    np.save(tmp_path / "a.npy", array)
    assert np.array_equal(levels(tmp_path / "a.npy", 13), DEEP)
    assert np.array_equal(to_pixels(array, channels=13), load_image(tmp_path / "a.npy", channels=13))
    content = io.BytesIO((tmp_path / "a.npy").read_bytes())
    assert count_values(content, 13) == DEEP.size


def test_bit_depth_says_which_value_is_1(tmp_path):
    np.save(tmp_path / "a.npy", np.uint16([[[0, 4095]]]))
    assert load_image(tmp_path / "a.npy", bit_depth=12, channels=2).tolist() == [[[0.0, 1.0]]]
    assert to_pixels(np.uint8([[[0, 255]]]), bit_depth=12, channels=2).tolist() == [[[0.0, 1.0]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_exif(tmp_path, orientation):
    turned = upright(DEEP[..., :4], orientation)
    image = Image.fromarray(DEEP[..., :3].astype(np.uint8))
    image.getexif()[ORIENTATION] = orientation
    assert np.array_equal(ImageOps.exif_transpose(image), turned[..., :3].astype(np.uint8))
    for channels, form in ((1, bands(1)), (4, BANDS), (3, {"photometric": "rgb"})):
        tag = [(ORIENTATION, 3, 1, orientation, True)]
        tifffile.imwrite(tmp_path / "a.tif", DEEP[..., :channels].squeeze(), extratags=tag, **form)
        assert np.array_equal(levels(tmp_path / "a.tif", channels), turned[..., :channels])


def test_gray_and_colours_are_turned_into_each_other(tmp_path):
    rgb = DEEP[..., :3].astype(np.uint8)
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    Image.fromarray(rgb[..., 0]).save(tmp_path / "gray.png")
    assert np.array_equal(levels(tmp_path / "gray.png", 3, 255), np.repeat(rgb[..., :1], 3, 2))
    luma = levels(tmp_path / "rgb.png", 1, 255)[..., 0]
    assert np.abs(luma - np.array(Image.fromarray(rgb).convert("L"), int)).max() <= 1
    clear = np.dstack([DEEP[..., :3], np.zeros(DEEP.shape[:2], np.uint16)])
    write_png(tmp_path / "clear.png", clear)
    assert (load_image(tmp_path / "clear.png", channels=3) == 1).all()  # over white
    assert np.array_equal(levels(tmp_path / "clear.png", 4), clear)  # opacity is a channel like others


@pytest.mark.parametrize(
    ("name", "found"),
    [("a.png", "has 1 channel"), ("b.tif", r"is of shape \(5, 7, 13\)"), ("c.npy", r"is of shape \(5, 7, 5\)")],
)
def test_another_number_of_channels_is_refused_by_both_numbers(tmp_path, name, found):
    write_png(tmp_path / "a.png", DEEP[..., :1])
    tifffile.imwrite(tmp_path / "b.tif", DEEP, **BANDS)
    np.save(tmp_path / "c.npy", DEEP[..., :5])
    with pytest.raises(UserError, match=f"{name}: {found}, but data.channels=4;"):
        load_image(tmp_path / name, channels=4)


def test_damaged_files_have_one_line(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    tifffile.imwrite(tmp_path / "cut.tif", DEEP, **BANDS)
    (tmp_path / "cut.tif").write_bytes((tmp_path / "cut.tif").read_bytes()[:700])
    np.save(tmp_path / "row.npy", np.arange(4))
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match=f"{path.name}: cannot be read as an image"):
            load_image(path, channels=13)
    tifffile.imwrite(tmp_path / "bands.tif", DEEP, **BANDS)
    with pytest.raises(UserError, match=r"one of other channels than gray and RGB needs data\.channels"):
        load_image(tmp_path / "bands.tif")


def test_values_below_0_are_taken_as_they_are_in_every_job(tmp_path):
    """A model keeps that, so files with values above 0 alone are not measured by themselves."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(5):
            np.save(tmp_path / name / f"{number}.npy", RNG.normal(0, 40, (6, 6, 2)).astype(np.float32))
    module = ImageDataModule(tmp_path, channels=2, image_size=6, val_fraction=0.25)
    assert module.bit_depth == 1 and any("are taken as they are (data.bit_depth=1)" in note for note in module.notes)
    np.save(tmp_path / "bright.npy", np.full((6, 6, 2), 30, np.float32))
    assert depth_of_files([tmp_path / "bright.npy"], 2).bits == 8
    assert (load_image(tmp_path / "bright.npy", module.bit_depth, 2) == 30).all()


@pytest.fixture(scope="module")
def satellite(tmp_path_factory):
    """Four channels of 12 bits; the last tells two classes apart: as class folders, a table, shards and an .npz."""
    root = tmp_path_factory.mktemp("bands")
    folders, shards, rows, arrays = root / "folders", root / "shards", ["path,label,split"], {}
    shards.mkdir()
    rng = np.random.default_rng(1)
    for split, count in (("train", 12), ("test", 4)):
        images, labels = rng.integers(0, 2000, (count, 18, 18, 4), dtype=np.uint16), np.arange(count) % 2
        images[..., 3] += 2000 * labels[:, None, None].astype(np.uint16)
        images[0, 0, 0, 0] = 4095
        arrays |= {f"{split}_x": images, f"{split}_y": labels}
        with tarfile.open(shards / f"{split}-0.tar", "w") as tar:
            for number, (image, label) in enumerate(zip(images, labels, strict=True)):
                path = folders / split / str(label) / f"{number:02}.tif"
                path.parent.mkdir(parents=True, exist_ok=True)
                tifffile.imwrite(path, image, **BANDS)
                rows.append(f"folders/{split}/{label}/{path.name},{label},{split}")
                for ending, content in (("tif", path.read_bytes()), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{number:02}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    (root / "table.csv").write_text("\n".join(rows))
    np.savez(root / "arrays.npz", **arrays)
    return root


def module_of(root, **options):
    module = ImageDataModule(root, channels=4, image_size=16, batch_size=4, val_fraction=0.25, **options)
    module.setup()
    return module


def test_sets_of_every_kind_give_the_same_pictures(satellite):
    kinds = [module_of(satellite / name) for name in ("folders", "table.csv", "shards", "arrays.npz")]
    values = np.load(satellite / "arrays.npz")["train_x"] / 4095
    for module in kinds:
        assert (module.channels, module.bit_depth) == (4, 12)  # measured
        mean = np.array(module.mean) - values.mean((0, 1, 2))  # of a part of it, at the image size
        assert np.abs(mean).max() < 0.05 and len(module.std) == 4
    first, *others = (sorted(float(image.mean()) for image in unscaled(module)) for module in kinds)
    assert len(set(first)) == 4
    assert all(np.allclose(other, first, atol=1e-6) for other in others)


def unscaled(module):
    (batch,) = module.test_dataloader()
    assert batch.images.shape == (4, 4, 16, 16) and batch.images.dtype == torch.float32
    return batch.images * torch.tensor(module.std)[:, None, None] + torch.tensor(module.mean)[:, None, None]


def test_the_pictures_of_a_set_keep_their_16_bits(satellite):
    module = ImageDataModule(
        satellite / "arrays.npz", channels=4, image_size=18, mean=[0] * 4, std=[1] * 4, bit_depth=16
    )
    module.setup()
    images = torch.cat([batch.images for batch in module.test_dataloader()])
    stored = np.load(satellite / "arrays.npz")["test_x"]
    assert np.array_equal(np.rint(images.permute(0, 2, 3, 1).double().numpy() * 65535), stored)


def test_arrays_in_class_folders(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(5):
            np.save(tmp_path / name / f"{number}.npy", RNG.integers(0, 256, (6, 6, 2), dtype=np.uint8))
    module = ImageDataModule(tmp_path, channels=2, image_size=6, batch_size=2, val_fraction=0.25)
    module.setup()
    assert module.number_of_images("train") == 6 and module.bit_depth is None
    with pytest.raises(UserError, match=r"holds no picture.* or read \.npy arrays by data\.channels"):
        ImageDataModule(tmp_path).setup()


def test_training_pictures_are_varied_by_steps_that_know_no_colours(satellite):
    augment = {"preset": "strong", "randaugment_ops": 0, "color_jitter": 0, "erasing": 1.0}
    module = module_of(satellite / "arrays.npz", augment=augment)
    batch = next(iter(module.train_dataloader()))
    assert batch.images.shape == (4, 4, 16, 16)
    erased = batch.images.abs().amax(1) < 1e-6  # where all channels are their mean
    assert erased.flatten(1).any(1).all() and not erased.all()
    own = {"augment": {"albumentations": A.to_dict(A.Compose([A.VerticalFlip(p=1)]))}}
    plain, flipped = (module_of(satellite / "arrays.npz", **how) for how in ({"augment": {"preset": "none"}}, own))
    pair = [next(iter(module.train_dataloader())).images for module in (plain, flipped)]
    assert torch.equal(pair[0].flip(2), pair[1])
    with pytest.raises(UserError, match=r"albumentations: fails on an image .*1-channel or 3-channel"):
        module_of(satellite / "folders", augment={"albumentations": A.to_dict(A.Compose([A.ColorJitter(p=1)]))})


def test_a_set_is_looked_at(satellite):
    module = module_of(satellite / "folders")
    found = inspect_images(module, progress=False)
    values = np.load(satellite / "arrays.npz")["train_x"]
    assert np.allclose(found.mean, values.mean((0, 1, 2)) / 4095, atol=0.03) and len(found.std) == 4
    assert all(picture.shape == (16, 16, 3) and picture.dtype == np.uint8 for picture in module.training_pictures(0, 3))


def test_what_is_displayed():
    picture = np.zeros((10, 10, 4), np.float32)
    picture[..., 1] = np.linspace(0.01, 0.02, 10)
    assert displayed(picture)[0, :, 0].max() == 0 and displayed(picture)[0, -1, 1] == 255  # dark ones are spread
    assert np.array_equal(displayed(picture[..., 1:2])[..., 0], displayed(picture[..., 1:3])[..., 2])
    assert displayed_line(4) == "the first 3 of 4 channels as red, green and blue"


def test_pictures_of_another_number_of_channels_are_refused_before_the_run(satellite):
    with pytest.raises(UserError, match=r"tif: is of shape \(18, 18, 4\), but data.channels=13;"):
        ImageDataModule(satellite / "folders", channels=13).setup()
    with pytest.raises(UserError, match=r"train_x has shape .*must be \(n, H, W, 13\), by data.channels=13"):
        ImageDataModule(satellite / "arrays.npz", channels=13).setup()
    with pytest.raises(UserError, match="corruptions: change the colours of RGB"):
        module_of(satellite / "folders").corrupted_dataloader("test", "gaussian_noise", 1)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"channels": 0}, "channels=0: must be from 1 to 512"),
        ({"name": "cifar10"}, "is for sets of your own"),
        ({"pipeline": "device"}, "take data.pipeline=workers"),
        ({"augment": {"preset": "strong"}}, r"jitter of data\.augment\.preset=strong are for RGB"),
        ({"augment": {"preset": "augmix"}}, "augment.preset=augmix changes colours of RGB"),
        ({"mean": [0.5] * 3}, "must be 4 numbers, one per channel"),
        ({"std": [0, 1, 1, 1]}, "must be numbers over 0"),
    ],
)
def test_what_is_made_for_rgb_is_refused(options, line):
    with pytest.raises(UserError, match=line):
        ImageDataModule("folder", **({"channels": 4} | options))
    assert DataConfig(name="folder", channels=4, mean=(9.0, 0, 0, -1)).mean == (9.0, 0, 0, -1)


def test_prepare_image_takes_channels():
    image = vmoe.prepare_image(DEEP, 4, [0.5] * 13, [0.25] * 13, channels=13, crop="letterbox")
    assert image.shape == (13, 4, 4) and torch.allclose(image[:, 3], torch.tensor((127 / 255 - 0.5) / 0.25))
