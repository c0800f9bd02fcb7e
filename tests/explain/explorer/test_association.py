"""Planted specialists are found, routers that know nothing score at their null."""

import numpy as np
import pytest
import torch

from vmoe.data.patchwork import GRID, OBJECTS, PATCH_NAMES, make_patchwork
from vmoe.explain.explorer.association import Draws, GridCodes, LayerAssociation
from vmoe.explain.explorer.features import COLOUR_NAMES, Levels, colour_bins, patch_features
from vmoe.explain.explorer.measures import normalised_mutual_information

IMAGES = 240
PLACES = GRID * GRID


@pytest.fixture(scope="module")
def patchwork():
    """Pixels (n, 3, 48, 48) in [0, 1], labels (n,), patch labels (n, N)."""
    pixels, labels, patches = make_patchwork(IMAGES, seed=7)
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return pixels, torch.from_numpy(labels), torch.from_numpy(patches).flatten(1).int()


def measure(patchwork, choices, experts, seed=0, replicates=100, block=IMAGES, pixels=None):
    """The specialisation of a layer that sends patch n of image i to the experts choices[i, n]."""
    shown, labels, patches = patchwork
    grid = GridCodes((GRID, GRID))
    association = LayerAssociation(grid, experts, len(OBJECTS), len(PATCH_NAMES), replicates, torch.device("cpu"))
    codes = grid.encode(patch_features(shown if pixels is None else pixels, grid.grid))
    generator = torch.Generator().manual_seed(seed)
    choices = choices if choices.dim() == 3 else choices[..., None]
    for start in range(0, IMAGES, block):
        part = slice(start, start + block)
        draws = Draws.of(replicates, len(labels[part]), generator)
        association.update(choices[part], labels[part], codes[part], patches[part], draws)
    return association


def specialisation(*arguments, **options):
    return {name: tables.specialisation() for name, tables in measure(*arguments, **options).tables.items()}


def test_experts_of_patch_labels_are_found(patchwork):
    found = specialisation(patchwork, patchwork[2].long(), experts=len(PATCH_NAMES))
    label = found["patch label"]
    assert label.nmi == pytest.approx(1) and label.low > 0.999
    assert label.null_high < 0.02 and label.beats_null and label.p == pytest.approx(1 / 101)
    assert not found["position"].beats_null
    assert found["edges"].beats_null  # a plain patch has none, and its expert goes with that


def test_experts_that_err_are_found_as_far_as_they_align(patchwork):
    random = torch.Generator().manual_seed(0)
    errs = torch.rand(IMAGES, PLACES, generator=random) < 0.5
    anywhere = torch.randint(0, len(PATCH_NAMES), (IMAGES, PLACES), generator=random)
    label = specialisation(patchwork, torch.where(errs, anywhere, patchwork[2].long()), len(PATCH_NAMES))["patch label"]
    assert 0.2 < label.nmi < 0.6 and label.beats_null and label.high - label.low < 0.05


def test_experts_of_positions_are_found_and_nothing_else(patchwork):
    by_place = (torch.arange(PLACES) // GRID // 2).expand(IMAGES, -1)
    found = specialisation(patchwork, by_place, experts=3)
    assert found["position"].beats_null and found["position"].nmi > 0.4
    assert not any(part.beats_null for name, part in found.items() if name != "position")


def test_experts_of_classes_are_found(patchwork):
    found = specialisation(patchwork, patchwork[1][:, None].expand(-1, PLACES), experts=len(OBJECTS))
    assert found["class"].nmi == pytest.approx(1) and found["class"].beats_null
    assert not found["position"].beats_null


def test_experts_of_brightness_and_colour_are_found(patchwork):
    colour = patch_features(patchwork[0], (GRID, GRID)).colour
    by_brightness = specialisation(patchwork, (colour.mean(-1) > 0.5).long(), experts=2)
    assert by_brightness["brightness"].beats_null and by_brightness["brightness"].nmi > 0.2
    by_colour = specialisation(patchwork, colour_bins(colour), experts=len(COLOUR_NAMES))
    assert by_colour["colour"].nmi == pytest.approx(1) and by_colour["colour"].beats_null


def test_a_random_router_scores_at_the_null_in_every_seed(patchwork):
    ranks, claims = [], 0
    for seed in range(12):
        choices = torch.randint(0, 8, (IMAGES, PLACES, 2), generator=torch.Generator().manual_seed(seed))
        for part in specialisation(patchwork, choices, experts=8, seed=seed).values():
            ranks.append(part.p)
            claims += part.beats_null
            assert abs(part.nmi - part.null_mean) < 3 * (part.null_high - part.null_mean)
    assert claims == 0
    assert 0.35 < np.mean(ranks) < 0.65 and np.mean(np.array(ranks) <= 0.05) < 0.15


def test_images_that_each_keep_an_expert_at_random_are_no_class_specialists(patchwork):
    """Patches of an image are one draw, not 36: a null that permutes patches would claim classes here."""
    claims = 0
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        of_image = torch.randint(0, 8, (IMAGES, 1), generator=generator).expand(-1, PLACES)
        association = measure(patchwork, of_image, experts=8, seed=seed)
        found = association.tables["class"].specialisation()
        claims += found.beats_null
        mixed = of_image.flatten()[torch.randperm(IMAGES * PLACES, generator=generator)].view(IMAGES, PLACES)
        by_patches = measure(patchwork, mixed, experts=8, seed=seed).tables["class"]
        assert found.nmi > 10 * float(normalised_mutual_information(by_patches.value))
    assert claims == 0


def test_smooth_maps_meet_smooth_maps_in_the_null(patchwork):
    """Each image is halved along a random line, in routing and in colour, by lines of their own."""
    claims = dict.fromkeys(("position", "brightness"), 0)
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        routing, shade = (_halves(generator) for _ in range(2))
        pixels = shade.float().view(IMAGES, 1, GRID, GRID).repeat_interleave(8, 2).repeat_interleave(8, 3)
        found = specialisation(patchwork, routing, 2, seed=seed, pixels=pixels.expand(-1, 3, -1, -1))
        for name in claims:
            claims[name] += found[name].beats_null
    assert claims == {"position": 0, "brightness": 0}


def _halves(generator: torch.Generator) -> torch.Tensor:
    angle = torch.rand(IMAGES, 1, generator=generator) * 2 * torch.pi
    y, x = (torch.arange(PLACES) // GRID - 2.5, torch.arange(PLACES) % GRID - 2.5)
    offset = torch.rand(IMAGES, 1, generator=generator) * 3 - 1.5
    return (angle.cos() * x + angle.sin() * y > offset).long()


def test_blocks_count_what_the_whole_does_and_what_is_not_chosen_does_not_count(patchwork):
    choices = patchwork[2].long() % 4
    whole, parts = measure(patchwork, choices, 4), measure(patchwork, choices, 4, block=50)
    for name, tables in whole.tables.items():
        assert torch.equal(tables.value, parts.tables[name].value)
        assert float(tables.value.sum()) == IMAGES * PLACES
        assert torch.equal(tables.null.sum((1, 2)), torch.full((100,), float(IMAGES * PLACES)))
    some = choices.masked_fill(torch.arange(PLACES) % 2 == 0, -1)
    assert float(measure(patchwork, some, 4).tables["class"].value.sum()) == IMAGES * PLACES / 2


def test_an_image_of_several_classes_counts_for_each_of_them(patchwork):
    pixels, labels, patches = patchwork
    choices = patches.long() % 4
    single = measure(patchwork, choices, 4).tables["class"]
    flags = torch.nn.functional.one_hot(labels, len(OBJECTS)).to(torch.int8)
    alone = measure((pixels, flags, patches), choices, 4).tables["class"]
    for name in ("value", "bootstrap", "null"):
        assert torch.equal(getattr(alone, name), getattr(single, name))
    first, second = torch.ones(IMAGES, 1).long(), (labels == 2)[:, None].long()
    flags = torch.cat([first, second, torch.zeros(IMAGES, len(OBJECTS) - 2).long()], 1)
    value = measure((pixels, flags, patches), choices, 4).tables["class"].value
    by_image = torch.nn.functional.one_hot(choices, 4).sum(1).double()
    assert torch.equal(value[:2], torch.stack([by_image.sum(0), by_image[labels == 2].sum(0)])) and not value[2:].any()


def test_the_interval_is_that_of_resampled_images(patchwork):
    choices = torch.where(patchwork[1][:, None] < 3, patchwork[2].long() % 4, 3)
    found = measure(patchwork, choices, 4, replicates=400).tables["class"].specialisation()
    by_image = torch.nn.functional.one_hot(choices, 4).sum(1).double()
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(400):
        rows = torch.from_numpy(random.integers(0, IMAGES, IMAGES))
        table = torch.zeros(len(OBJECTS), 4, dtype=torch.float64).index_add(0, patchwork[1][rows], by_image[rows])
        drawn.append(float(normalised_mutual_information(table)))
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * np.std(drawn), rel=0.2)


def test_features_of_patches_worked_out_by_hand():
    pixels = torch.zeros(1, 3, 4, 8)
    pixels[:, 0, :, 4:] = 1  # right half red
    features = patch_features(pixels, (1, 2))
    assert features.colour.tolist() == [[[0, 0, 0], [1, 0, 0]]]
    assert features.brightness[0].tolist() == pytest.approx([0, 0.2126])
    # central differences: a quarter of each half's pixels stand at the edge, with a slope of 0.2126 / 2
    assert features.edges[0].tolist() == pytest.approx([0.2126 / 8] * 2)
    named = [COLOUR_NAMES[index] for index in colour_bins(features.colour)[0]]
    assert named == ["dark grey", "red"]
    wheel = torch.tensor([[1, 0.75, 0], [0.25, 1, 0], [0, 1, 0.25], [0, 1, 1], [0, 0.2, 1], [0.6, 0, 1], [1, 0, 0.8]])
    assert [COLOUR_NAMES[index] for index in colour_bins(wheel)] == list(COLOUR_NAMES[4:])
    greys = torch.tensor([[0.1, 0.1, 0.15], [0.5, 0.5, 0.5], [0.95, 0.9, 1.0]])
    assert [COLOUR_NAMES[index] for index in colour_bins(greys)] == list(COLOUR_NAMES[:3])


def test_levels_hold_equal_shares_of_what_came_first():
    levels = Levels()
    values = torch.rand(100, 80, generator=torch.Generator().manual_seed(0)) ** 3
    assert torch.bincount(levels(values).flatten(), minlength=8).tolist() == pytest.approx([1000] * 8, abs=2)
    assert levels(torch.tensor([-1.0, 2.0])).tolist() == [0, 7]


def test_fine_grids_share_positions():
    position, count = GridCodes((32, 7)).positions(torch.device("cpu"))
    assert count == 16 * 7 and position.shape == (32, 7)
    assert torch.bincount(position.flatten()).tolist() == [2] * count
    assert position[0].tolist() == position[1].tolist() == list(range(7))
