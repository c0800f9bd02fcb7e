"""Consistency, agreement and saturation of routings worked out by hand."""

import pytest
import torch

from vmoe.explain.explorer.maps import LayerMaps
from vmoe.explain.explorer.probes import Agreement, Consistency, Saturation, flipped, moved, probe
from vmoe.explain.explorer.subject import Subject


def maps_of(choices, grid, experts=3) -> LayerMaps:
    """A layer's maps of choices (B, N) or (B, N, K)."""
    choices = torch.tensor(choices)
    choices = choices[..., None] if choices.dim() == 2 else choices
    gates = torch.zeros(*choices.shape[:2], experts)
    none = torch.zeros_like(choices[..., 0])
    return LayerMaps(gates, choices, gates, None, none, none == 0, None, grid, 0, ())


def test_a_mirrored_map_is_mirrored_back():
    plain = maps_of([[0, 1, 2, 2], [0, 0, 0, 0]], (2, 2))
    mirrored = maps_of([[1, 0, 2, 1], [0, 0, 1, 1]], (2, 2))  # first image: 0 1 / 1 2 mirrored back
    shifted = maps_of([[0, 1, 2, 2], [0, 0, 0, 1]], (2, 2))
    consistency = Consistency()
    consistency.update(plain, mirrored, shifted)
    found = consistency.result()
    assert found["flip"]["value"] == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert found["shift"]["value"] == pytest.approx((1 + 3 / 4) / 2)
    # shares 5/8, 1/8, 2/8
    assert found["flip"]["chance"] == found["shift"]["chance"] == pytest.approx((25 + 1 + 4) / 64)


def test_patches_without_an_expert_do_not_count():
    consistency = Consistency()
    plain = maps_of([[-1, 1, 2, 2]], (1, 4))
    consistency.update(plain, maps_of([[2, 2, 1, 1]], (1, 4)), maps_of([[1, 1, -1, 0]], (1, 4)))
    assert consistency.result()["flip"]["value"] == pytest.approx(1)
    assert consistency.result()["shift"]["value"] == pytest.approx(1 / 2)


def test_agreement_is_of_cuts_not_of_numbers():
    generator = torch.Generator().manual_seed(0)
    one = torch.randint(0, 3, (50, 4), generator=generator)
    renumbered = torch.tensor([2, 0, 1])[one]
    found = Agreement()
    found.update(maps_of(one.tolist(), (2, 2)), maps_of(renumbered.tolist(), (2, 2)), generator)
    assert found.result()["value"] == 1 and found.result()["null_high"] < 0.6
    stranger = torch.randint(0, 3, (50, 4), generator=generator)
    found = Agreement()
    found.update(maps_of(one.tolist(), (2, 2)), maps_of(stranger.tolist(), (2, 2)), generator)
    assert found.result()["value"] < found.result()["null_high"] + 0.05


def test_agreement_by_position_alone_is_chance():
    generator = torch.Generator().manual_seed(0)
    same = maps_of([[0, 1, 2, 0]] * 30, (2, 2))
    found = Agreement()
    found.update(same, same, generator)
    assert found.result() == {"value": 1, "null_mean": 1, "null_high": 1}


def test_saturation_is_the_share_of_choices_made_already():
    last = maps_of([[[0, 1], [1, 2], [-1, -1]]], (1, 3))
    early = maps_of([[[1, 0], [0, 1], [2, 0]]], (1, 3))
    found = Saturation()
    found.update(early, last)
    assert found.result() == 3 / 4


def test_images_are_mirrored_and_moved():
    images = torch.arange(128.0).expand(1, 1, 2, 128)
    assert flipped(images)[0, 0, 0, :2].tolist() == [127, 126]
    assert moved(images)[0, 0, 0, :5].tolist() == [0, 0, 0, 1, 2] and moved(images).shape == images.shape
    assert moved(images[..., :8])[0, 0, 0, :3].tolist() == [0, 0, 1]


def test_a_run_agrees_with_its_own_last_checkpoint(make_model, make_batches):
    subject = Subject("", make_model(), list("abcde"), (0.5,) * 3, (0.5,) * 3)
    early = Subject("", make_model(seed=1), list("abcde"), (0.5,) * 3, (0.5,) * 3)
    found = probe(subject, make_batches(), snapshots=[early, subject])
    assert set(found.consistency) == {"blocks.1.mlp", "blocks.3.mlp"}
    assert found.saturation[1] == {"blocks.1.mlp": 1, "blocks.3.mlp": 1}
    assert 0.2 < found.saturation[0]["blocks.1.mlp"] < 0.9
