"""Fractals: pictures are functions of their numbers, in whole numbers, and come again only where that is asked for."""

import hashlib

import numpy as np
import pytest
import torch

from vmoe.data import AugmentConfig, DataConfig, FractalConfig, ImageDataModule, MixConfig, SubsetConfig
from vmoe.data.fractals import pictures
from vmoe.data.fractals.pictures import UNCOUNTED_STEPS, PictureMaker, Varied, count_points, spread_chances
from vmoe.data.fractals.systems import CHOICE_ONE, FARTHEST, MATRIX_ONE, PLACE_ONE, draw_systems

CPU = torch.device("cpu")
SMALL = FractalConfig(classes=20, epoch_images=160)


def maker(config=SMALL, size=16, seed=0, stream=1, device=CPU):
    return PictureMaker(config, size, seed, stream, device)


def varied(count, size=16, config=SMALL):
    labels = torch.arange(count) % config.classes
    return Varied(*maker(config, size)._varied(labels, torch.arange(count)))


def module(name="fractals", pipeline="device", fractals=SMALL, batch_size=16, seed=0, part=0, parts=1, **options):
    options = {"augment": AugmentConfig(preset="none")} | options
    config = DataConfig(name=name, pipeline=pipeline, fractals=fractals, batch_size=batch_size, **options)
    data = ImageDataModule(config, seed, part=part, parts=parts)
    data.setup()
    return data


def epochs(data, *numbers):
    """The batches of these epochs."""
    batches = []
    for number in numbers:
        data.train_sampler.set_epoch(number)
        batches += list(data.train_dataloader())
    return batches


def pictures_of(batches):
    """Every picture as bytes, with its label, in order."""
    return [
        (image.numpy().tobytes(), int(label))
        for batch in batches
        for image, label in zip(batch.images, batch.labels, strict=True)
    ]


# The pictures


def test_a_picture_does_not_depend_on_the_batch():
    make, labels, numbers = maker(), torch.arange(30) % 20, torch.arange(30)
    whole = make(labels, numbers)
    assert whole.shape == (30, 3, 16, 16) and whole.dtype == torch.uint8
    assert torch.equal(make(labels[7:8], numbers[7:8])[0], whole[7])
    assert torch.equal(make(labels.flip(0), numbers.flip(0)), whole.flip(0))


def test_pictures_stay_the_same_bytes():
    """In whole numbers throughout: what runs of today have seen, those of tomorrow and on other machines see."""
    seen = maker(size=24)(torch.arange(16), 1000 + torch.arange(16))
    assert hashlib.sha256(seen.numpy().tobytes()).hexdigest()[:16] == "dac073167fd207cb"


@pytest.mark.parametrize("change", [{"seed": 1}, {"stream": 2}])
def test_seeds_and_streams_have_pictures_of_their_own(change):
    labels, numbers = torch.arange(10), torch.arange(10)
    one, other = maker()(labels, numbers), maker(**change)(labels, numbers)
    assert all(not torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_points_of_a_known_system_fall_where_they_should():
    """Four maps that halve the plane towards the corners of a square: every pixel gets nearly as many points."""
    half, corners = MATRIX_ONE // 2, [(-1, -1), (1, -1), (-1, 1), (1, 1)]
    maps = torch.tensor([[[half, 0, 0, half, x * PLACE_ONE // 2, y * PLACE_ONE // 2] for x, y in corners]])
    thresholds = torch.tensor([[CHOICE_ONE // 4, CHOICE_ONE // 2, 3 * CHOICE_ONE // 4]])
    chances = spread_chances(8)
    system = Varied(
        maps.int(), thresholds.int(), torch.zeros(1, 4, 3).int(), torch.tensor([[MATRIX_ONE, 0]]).int(),
        torch.zeros(1, len(chances)).int(),
    )  # fmt: skip
    counts = count_points(system, chances, UNCOUNTED_STEPS, 8)[0]
    assert counts.sum() == chances[UNCOUNTED_STEPS:].numel() and (counts.sum((1, 2)) == counts.sum() / 4).all()
    corners = [counts[0, :4, :4], counts[1, :4, 4:], counts[2, 4:, :4], counts[3, 4:, 4:]]
    assert sum(corner.sum() for corner in corners) == counts.sum()  # of each map only in its own
    quarter_turn = system._replace(turns=torch.tensor([[0, MATRIX_ONE]]).int())  # from across to down
    turned = count_points(quarter_turn, chances, UNCOUNTED_STEPS, 8)[0]
    assert turned[1, 4:, 4:].sum() == counts[1].sum() and turned[2, :4, :4].sum() == counts[2].sum()


def test_colour_is_the_mean_of_the_maps_and_brightness_the_logarithm_of_the_points():
    make = maker(size=8)
    counts, colours = torch.zeros(1, 4, 8, 8, dtype=torch.int32), torch.zeros(1, 4, 3, dtype=torch.int32)
    colours[0, 0], colours[0, 1] = torch.tensor([200, 100, 0]), torch.tensor([100, 100, 100])
    counts[0, 0, 0, 0], counts[0, :2, 3, 5] = 15, torch.tensor([1, 2])
    picture = make._painted(counts, colours)[0]
    assert picture[:, 0, 0].tolist() == [200, 100, 0]
    assert picture[:, 3, 5].tolist() == [133 * 127 // 255, 100 * 127 // 255, 66 * 127 // 255]  # log2(4) of log2(16)
    assert picture.sum() == 300 + 66 + 49 + 32


@pytest.mark.parametrize("strength", ["shape", "shift", "rotation", "colour"])
def test_each_strength_varies_what_its_name_says(strength):
    off = {"shape": 0.0, "shift": 0.0, "rotation": 0.0, "colour": 0.0}
    labels, numbers = torch.zeros(200, dtype=torch.long), torch.arange(200)
    kept = Varied(*maker(FractalConfig(classes=20, **off))._varied(labels, numbers))
    made = Varied(*maker(FractalConfig(classes=20, **(off | {strength: 0.25})))._varied(labels, numbers))
    changed = {
        "shape": (kept.maps[..., :4] != made.maps[..., :4]).any(),
        "shift": (kept.maps[..., 4:] != made.maps[..., 4:]).any(),
        "rotation": (kept.turns != made.turns).any(),
        "colour": (kept.colours != made.colours).any(),
    }
    assert {name for name, is_changed in changed.items() if is_changed} == {strength}
    if strength == "shift":
        most = (kept.maps - made.maps)[..., 4:].abs().max()
        assert 0.24 * PLACE_ONE < most <= 0.25 * PLACE_ONE
    assert torch.equal(kept.thresholds, made.thresholds)


def counted_one_by_one(system, chances, size):
    """The counts (B, M, S, S) of the chaos game as it is defined, in Python's unbounded integers."""
    counts = np.zeros((len(system.maps), 4, size, size), dtype=np.int32)
    parts = (system.maps, system.thresholds, system.turns, system.shifts)
    for found, maps, thresholds, (cos, sin), shifts in zip(counts, *(part.tolist() for part in parts), strict=True):
        points = []
        for chain in range(chances.shape[1]):
            x = y = 0
            for step, shift in enumerate(shifts):
                chance = (chances[step, chain].item() + shift) % CHOICE_ONE
                which = sum(chance >= threshold for threshold in thresholds)
                a, b, c, d, e, f = maps[which]
                x, y = rounded(a * x + b * y) + e, rounded(c * x + d * y) + f
                x, y = (max(-FARTHEST, min(FARTHEST, value)) for value in (x, y))
                if step >= UNCOUNTED_STEPS:
                    points.append((which, rounded(cos * x - sin * y), rounded(sin * x + cos * y)))
        ends = [(min(point[axis] for point in points), max(point[axis] for point in points)) for axis in (1, 2)]
        extent = max(high - low for low, high in ends)
        left, top = (low - (extent - (high - low)) // 2 for low, high in ends)
        for which, x, y in points:
            found[which, (y - top) * size // (extent + 1), (x - left) * size // (extent + 1)] += 1
    return torch.from_numpy(counts)


def rounded(product):
    return (product + MATRIX_ONE // 2) // MATRIX_ONE


def test_points_are_counted_as_defined_and_nothing_overflows():
    strongest = FractalConfig(classes=20, shape=0.5, shift=0.5, rotation=180.0, colour=1.0)
    chances = spread_chances(8)
    for system in (varied(2, 8), varied(6, 8, strongest)):
        assert torch.equal(count_points(system, chances, UNCOUNTED_STEPS, 8), counted_one_by_one(system, chances, 8))
    assert 2 * 1.5 * MATRIX_ONE * FARTHEST + MATRIX_ONE < 2**31  # no entry exceeds 1.5, and two are summed


@pytest.mark.skipif(pictures.kernel is None, reason="needs Triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the whole maker is checked")
def test_the_kernel_counts_as_the_plain_code_does():
    system, chances = varied(2, 8), spread_chances(8)
    found = pictures.kernel.count_points_on_gpu(system, chances, UNCOUNTED_STEPS, 8)
    assert torch.equal(found, count_points(system, chances, UNCOUNTED_STEPS, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("size", [16, 32, 40, 224])
def test_a_gpu_makes_the_same_bytes(size, fused):
    config, labels, numbers = FractalConfig(), torch.arange(64) * 60, 5_000_000_000 + torch.arange(64)
    device = torch.device("cuda")
    on_gpu = PictureMaker(config, size, 0, 1, device, fused)(labels.to(device), numbers.to(device))
    assert torch.equal(on_gpu.cpu(), maker(config, size)(labels, numbers))


# The classes


def test_a_class_is_the_same_among_fewer_and_among_more():
    few, many = draw_systems(8), draw_systems(40)
    assert all(torch.equal(a, b[:8]) for a, b in zip(few, many, strict=True))


def test_classes_are_drawn_by_their_singular_values():
    drawn = draw_systems(300)
    matrices = drawn.maps[..., :4].reshape(300, 4, 2, 2).double() / MATRIX_ONE
    singular = torch.linalg.svdvals(matrices)
    filling = (singular[..., 0] + 2 * singular[..., 1]).sum(1)
    assert singular.max() <= 1.001 and ((filling > 4.49) & (filling < 5.01)).double().mean() > 0.98
    shares = torch.diff(drawn.thresholds, dim=1, prepend=torch.zeros(300, 1), append=torch.full((300, 1), CHOICE_ONE))
    assert (shares > 0).all() and drawn.colours.min() >= 48 and drawn.colours.max() < 256
    assert len({tuple(one.flatten().tolist()) for one in drawn.maps}) == 300


def test_classes_can_be_told_apart():
    """By the nearest mean picture of 40 classes, far above chance: 2.5 %."""
    make = maker(FractalConfig(classes=40), stream=7)
    labels = torch.arange(40).repeat(12)
    seen = make(labels, torch.arange(480)).flatten(1).float()
    means = torch.stack([seen[:400][labels[:400] == label].mean(0) for label in range(40)])
    found = torch.cdist(seen[400:], means).argmin(1)
    assert (found == labels[400:]).float().mean() > 0.4


# The data set


def test_without_end_no_picture_comes_twice_and_every_class_is_shown_equally():
    seen = pictures_of(epochs(module(), 0, 1, 2))
    assert len({picture for picture, _ in seen}) == len(seen) == 480
    assert np.bincount([label for _, label in seen[:160]]).tolist() == [8] * 20


def test_a_number_of_images_comes_again_and_again_in_as_many_steps():
    endless, limited = module(), module(images=60)
    assert len(limited.train_dataloader()) == len(endless.train_dataloader()) == 10
    seen = pictures_of(epochs(limited, 0, 1, 2))
    assert len(seen) == 480 and len(set(seen)) == 60
    for first in range(0, 480, 60):  # each pass has all of them, across the ends of epochs
        assert len(set(seen[first : first + 60])) == 60
    assert seen[:60] != seen[60:120]


def test_more_images_than_an_epoch_has_are_seen_in_the_following_ones():
    seen = pictures_of(epochs(module(images=480), 0, 1, 2))
    assert len(set(seen)) == 480
    assert set(pictures_of(epochs(module(images=320), 0, 1))) < set(seen)  # fewer images are among more


def test_repeat_makes_epochs_longer():
    twice = module(repeat=2)
    assert len(twice.train_dataloader()) == 20
    assert sorted(pictures_of(epochs(twice, 0))) == sorted(pictures_of(epochs(module(), 0, 1)))


def test_order_is_of_the_seed_and_pictures_of_the_split_seed():
    one, other, apart = module(), module(seed=1), module(split_seed=1)
    seen = [pictures_of(epochs(data, 0)) for data in (one, other, apart)]
    assert seen[0] != seen[1] and sorted(seen[0]) == sorted(seen[1])
    assert not set(seen[0]) & set(seen[2])
    for split in ("val_dataloader", "test_dataloader"):
        assert pictures_of(getattr(one, split)()) == pictures_of(getattr(apart, split)())


def test_splits_share_no_picture():
    data = module()
    parts = [pictures_of(batches) for batches in (epochs(data, 0), data.val_dataloader(), data.test_dataloader())]
    assert [len(part) for part in parts] == [160, 20, 40] and len(set().union(*parts)) == 220


@pytest.mark.parametrize("images", [None, 9])
def test_both_pipelines_give_the_same(images):
    few = FractalConfig(classes=5, epoch_images=24)
    ours, theirs = (module(pipeline=pipeline, fractals=few, images=images) for pipeline in ("device", "workers"))
    assert pictures_of(epochs(ours, 0, 3)) == pictures_of(epochs(theirs, 0, 3))
    for make in ("val_dataloader", "test_dataloader", "train_eval_dataloader"):
        assert pictures_of(getattr(ours, make)()) == pictures_of(getattr(theirs, make)())


def test_an_epoch_goes_on_in_its_middle():
    data = module(images=60)
    whole = epochs(data, 2)
    data.train_sampler.start_batch = 4
    assert pictures_of(epochs(data, 2)) == pictures_of(whole[4:])


def test_processes_share_a_batch():
    parts = [epochs(module(part=part, parts=2), 1) for part in (0, 1)]
    joined = [picture for pair in zip(*parts, strict=True) for batch in pair for picture in pictures_of([batch])]
    assert joined == pictures_of(epochs(module(), 1))


@pytest.mark.parametrize("mix", [MixConfig(), MixConfig(mixup_alpha=1.0)])
def test_images_made_within_the_step_are_those_of_the_loader(mix):
    data = module(mix=mix)
    later = ImageDataModule(data.config, 0, in_step=True)
    later.setup()
    for plain, keys_only in zip(data.train_dataloader(), later.train_dataloader(), strict=True):
        expected = data.on_after_batch_transfer(plain, 0)
        assert keys_only.images is None
        found = later.made(later.on_after_batch_transfer(keys_only, 0))
        assert torch.equal(found.images, expected.images) and torch.equal(found.labels, expected.labels)
        assert (found.targets is None) == (expected.targets is None)
        assert found.targets is None or torch.equal(found.targets, expected.targets)


def test_pictures_are_made_at_the_image_size():
    data = module(image_size=24)
    assert data.image_size == 24 and next(iter(data.test_dataloader())).images.shape[1:] == (3, 24, 24)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"images": 19},
            "images=19: leaves classes without images; give at least as many as .*=20",
        ),
        (
            {"subset": SubsetConfig(fraction=0.5)},
            "subset: is not for data.name=fractals; data.images and data.fractals",
        ),
        ({"image_size": 4}, "image_size=4: must be from 8 to 512"),
        (
            {"name": "digits", "images": 60},
            "images=60: is for data.name=fractals; data.subset makes other",
        ),
    ],
)
def test_what_cannot_be_is_told_in_a_line(options, line):
    with pytest.raises(ValueError, match=line):
        DataConfig(**{"name": "fractals", "fractals": SMALL, **options})


@pytest.mark.parametrize(
    ("options", "line"),
    [({"classes": 1}, "classes=1: must be from 2"), ({"shape": 0.6}, "shape=0.6: must be from 0 to 0.5")],
)
def test_strengths_out_of_range_are_refused(options, line):
    with pytest.raises(ValueError, match=line):
        FractalConfig(**options)


@pytest.mark.gpu
def test_a_gpu_is_never_waited_for():
    config = DataConfig(name="fractals", pipeline="device", batch_size=512, mix=MixConfig(mixup_alpha=1.0))
    data = ImageDataModule(config, 0, "cuda", in_step=True)
    data.setup()
    loader = iter(data.train_dataloader())
    data.made(next(loader))  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = [data.made(next(loader)) for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cat([batch.images for batch in batches]).isfinite().all()
