"""Presets and their determinism."""

import io
import itertools
import pickle
import random
import warnings
from collections import Counter

import albumentations as A
import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from vmoe.config_values import from_plain, to_plain
from vmoe.data import AugmentConfig, DataConfig, ImageDataModule
from vmoe.data.augment import Augmenter
from vmoe.errors import UserError

MEAN = (0.5, 0.4, 0.3)
PIPELINE = A.Compose([
    A.RandomResizedCrop((30, 20), scale=(0.5, 1)),
    A.OneOf([A.ToGray(p=1), A.GaussianBlur(p=1)], p=0.5),
    A.RandomBrightnessContrast(p=1),
])  # fmt: skip


def augmenter(size=32, flip=0.5, seed=0, **config):
    return Augmenter(AugmentConfig(**config), size, MEAN, flip, seed)


@pytest.fixture
def image(rng):
    return rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("preset", ["none", "light", "strong", "autoaugment", "augmix", "three_augment"])
@pytest.mark.parametrize(
    ("shape", "size"), [((32, 32), 32), ((8, 8), 16), ((40, 70), 80), ((1, 1), 16), ((2, 900), 96)]
)
def test_any_image_gets_the_image_size(preset, shape, size, rng):
    original = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = original.copy()
    result = augmenter(size, preset=preset)(image, 0, 0)
    assert result.shape == (size, size, 3) and result.dtype == np.uint8
    assert np.array_equal(image, original)


@pytest.mark.parametrize(
    "config",
    [
        {"preset": "light"},
        {"preset": "strong"},
        {"preset": "strong", "randaugment_magnitude": (0, 30)},
        {"preset": "autoaugment"},
        {"preset": "augmix"},
        {"preset": "three_augment"},
        {"albumentations": PIPELINE},
    ],
)
@pytest.mark.parametrize("size", [32, 96])
def test_result_is_a_function_of_seed_epoch_and_index(config, size, image):
    keys = [(epoch, index) for epoch in range(3) for index in range(5)]
    first = augmenter(size, **config)
    forward = {key: first(image, *key) for key in keys}
    other = pickle.loads(pickle.dumps(augmenter(size, **config)))  # as a spawned worker gets it
    for key in reversed(keys):
        assert np.array_equal(other(image, *key), forward[key])
    for changed in ((0, 1), (1, 0), (2, 3)):
        assert not np.array_equal(forward[changed], forward[0, 0])
    seeded = augmenter(size, seed=1, **config)
    assert any(not np.array_equal(seeded(image, *key), forward[key]) for key in keys)


class _OldPickler(pickle.Pickler):
    """Writes generators as NumPy below 2 does: their bit generator is copied, whoever else holds it."""

    def reducer_override(self, obj):
        if isinstance(obj, np.random.Generator):
            return _old_generator, (type(obj.bit_generator), obj.bit_generator.state)
        return NotImplemented


def _old_generator(kind, state):
    bits = kind()
    bits.state = state
    return np.random.Generator(bits)


@pytest.mark.parametrize("preset", ["light", "strong"])
def test_a_spawned_worker_draws_the_same_also_with_numpy_below_2(preset, image):
    first, content = augmenter(preset=preset), io.BytesIO()
    _OldPickler(content).dump(first)
    other = pickle.loads(content.getvalue())
    for key in [(3, 1), (0, 0), (0, 4), (0, 0)]:
        assert np.array_equal(other(image, *key), first(image, *key))


def test_global_random_state_is_untouched(image):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    make = augmenter(preset="strong")
    for index in range(10):
        make(image, 0, index)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_global_seeds_do_not_matter(image):
    results = []
    for seed in (1, 2):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        results.append(augmenter(preset="strong")(image, 0, 0))
    assert np.array_equal(*results)


def test_none_changes_nothing(image):
    assert np.array_equal(augmenter(preset="none")(image, 5, 5), image)


def test_light_is_a_window_of_the_padded_image_perhaps_flipped(image):
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    windows = {}
    for flipped in (False, True):
        for top in range(9):
            for left in range(9):
                window = padded[top : top + 32, left : left + 32]
                windows[(window[:, ::-1] if flipped else window).tobytes()] = (top, left, flipped)
    make = augmenter(preset="light")
    seen = [windows[make(image, 0, index).tobytes()] for index in range(400)]
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(9))
    assert 150 < sum(flipped for _, _, flipped in seen) < 250


def test_flip_is_by_set_unless_configured(image):
    def flips(**options):
        make = augmenter(crop_padding=0, **options)
        return sum(not np.array_equal(make(image, 0, index), image) for index in range(50))

    assert flips(flip=0.0) == 0  # as digits
    assert 10 < flips(flip=0.5) < 40
    config = AugmentConfig(crop_padding=0, flip=1.0)
    assert np.array_equal(Augmenter(config, 32, MEAN, 0.0, 0)(image, 0, 0), image[:, ::-1])


def test_crop_scale_works_on_small_images_too(rng):
    image = np.tile(np.arange(32, dtype=np.uint8)[None, :, None], (32, 1, 3))  # gray level = column
    make = augmenter(crop_scale=(0.25, 0.25), flip=0.0)
    spans = [int(np.ptp(make(image, 0, index))) for index in range(50)]
    assert min(spans) >= 12 and max(spans) <= 20  # a quarter of the area: about 16 columns, by aspect ratio


def test_erasing_fills_with_the_mean(image):
    make = augmenter(preset="strong", randaugment_ops=0, color_jitter=0.0, erasing=1.0, crop_padding=0, flip=0.0)
    colour = np.array([round(255 * value) for value in MEAN])
    changed = [(result := make(image, 0, index)) != image for index in range(10)]
    assert all(mask.any() for mask in changed)
    last = changed[-1].any(axis=2)
    assert (result[last] == colour).all()


def test_strong_can_be_switched_off_step_by_step(image):
    off = {"randaugment_ops": 0, "color_jitter": 0.0, "erasing": 0.0, "crop_padding": 0, "flip": 0.0}
    assert np.array_equal(augmenter(preset="strong", **off)(image, 0, 0), image)
    for name, value in (("randaugment_ops", 2), ("color_jitter", 0.5)):
        make = augmenter(preset="strong", **(off | {name: value}))
        assert sum(not np.array_equal(make(image, 0, index), image) for index in range(20)) > 5


@pytest.mark.parametrize(("magnitude", "expected"), [(9, [9]), ([9, 9], [9]), ([3, 7], [3, 4, 5, 6, 7])])
def test_every_operation_draws_its_own_magnitude(image, monkeypatch, magnitude, expected):
    seen = []
    monkeypatch.setattr(v2.RandAugment, "forward", lambda self, image: (seen.append(self.magnitude), image)[1])
    make = augmenter(preset="strong", randaugment_ops=2, randaugment_magnitude=magnitude)
    for index in range(1000):
        make(image, 0, index)
    pairs = Counter(zip(seen[::2], seen[1::2], strict=True))
    assert set(pairs) == set(itertools.product(expected, expected))
    mean = 1000 / len(pairs)
    assert 0.4 * mean < min(pairs.values()) and max(pairs.values()) < 1.6 * mean


@pytest.mark.parametrize(
    ("config", "name"), [({"preset": "light", "erasing": 0.5}, "erasing"), ({"preset": "none", "flip": 0.5}, "flip")]
)
def test_a_parameter_without_effect_is_warned_about(config, name):
    with pytest.warns(UserWarning, match=f"{name}=0.5 has no effect: preset '{config['preset']}'"):
        Augmenter(AugmentConfig(**config), 32, MEAN, 0.5, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        augmenter(preset="strong", erasing=0.5)


@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_a_pipeline_of_ones_own_is_the_same_from_memory_from_its_file_and_from_a_config(ending, tmp_path, image):
    path = tmp_path / f"mine.{ending}"
    A.save(PIPELINE, str(path), data_format=ending)
    config = AugmentConfig(albumentations=str(path))
    path.unlink()  # the config holds its content
    again = from_plain(AugmentConfig, to_plain(config))
    expected = augmenter(albumentations=PIPELINE)(image, 1, 2)
    assert expected.shape == (32, 32, 3)
    for each in (config, again):
        assert np.array_equal(Augmenter(each, 32, MEAN, 0.5, 0)(image, 1, 2), expected)


def test_a_pipeline_that_cannot_be_used_is_refused_at_once(tmp_path, npz):
    with pytest.warns(UserWarning, match="lambda"):
        unsaved = A.Compose([A.OneOf([A.Lambda(name="mine", image=lambda pixels, **_: pixels)])])
    text = tmp_path / "text.yaml"
    text.write_text("a: [1")
    for pipeline, line in (
        (unsaved, "its step Lambda cannot be saved"),
        (str(tmp_path / "lost.yaml"), "cannot be read .No such file"),
        (str(text), "cannot be read .is damaged"),
        ({"transform": 3}, "holds no pipeline of albumentations"),
        (3, "'int': holds no pipeline"),
    ):
        with pytest.raises(ValueError, match=line):
            AugmentConfig(albumentations=pipeline)
    with pytest.raises(ValueError, match="takes the place of a preset; leave out preset=strong, flip="):
        AugmentConfig(preset="strong", flip=0.5, albumentations=PIPELINE)
    for options in ({"albumentations": PIPELINE}, {"preset": "augmix"}):
        with pytest.raises(ValueError, match="take pipeline=workers"):
            DataConfig(pipeline="device", augment=AugmentConfig(**options))
    newer = {"transform": {"__class_fullname__": "Compose", "transforms": [{"__class_fullname__": "Unknown"}]}}
    with_tensors = A.Compose([A.Normalize()])
    too_large = A.Compose([A.RandomCrop(99, 99)])
    for pipeline, line in (
        (newer, "cannot make this pipeline"),
        (with_tensors, r"gives float32 of shape \(8, 8, 3\); .*leave out steps such as Normalize"),
        (too_large, "fails on an image of 8 x 8 pixels"),
    ):
        module = ImageDataModule(npz(), augment=AugmentConfig(albumentations=pipeline))
        with pytest.raises(UserError, match=f"data.augment.albumentations: .*{line}"):
            module.setup()


def test_three_augment_changes_every_picture_in_one_of_three_ways(image):
    own = augmenter(preset="three_augment", flip=0, crop_padding=0, color_jitter=0)
    results = [own(image, 0, index) for index in range(60)]
    solarized = np.where(image >= 128, 255 - image, image)
    are_gray = [bool((each[..., 0] == each[..., 1]).all()) for each in results]
    ways = Counter(zip(are_gray, (np.array_equal(each, solarized) for each in results), strict=True))
    assert set(ways) == {(True, False), (False, True), (False, False)} and min(ways.values()) > 8
