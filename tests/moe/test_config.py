"""`MoeConfig`: which layers it chooses and what it refuses."""

import dataclasses

import pytest

from vmoe import MoeConfig


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [
        ("every-2", 12, [1, 3, 5, 7, 9, 11]),
        ("every-2", 7, [1, 3, 5]),
        ("every-3", 12, [2, 5, 8, 11]),
        ("every-1", 3, [0, 1, 2]),
        ("last-2", 8, [5, 7]),
        ("last-2", 9, [5, 7]),
        ("last-1", 4, [3]),
        ([3, 0], 4, [0, 3]),
        ([], 4, []),
    ],
)
def test_layers(layers, count, expected):
    assert MoeConfig(layers=layers).select_layers(count) == expected


@pytest.mark.parametrize(("layers", "count"), [("last-3", 4), ("every-5", 4), ([4], 4)])
def test_layers_that_a_model_does_not_have(layers, count):
    with pytest.raises(ValueError, match="layers="):
        MoeConfig(layers=layers).select_layers(count)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", "odd"),
        ("layers", "every-0"),
        ("layers", [-1]),
        ("layers", [1, 1]),
        ("layers", [True]),
        ("num_experts", 0),
        ("num_experts", 2.5),
        ("top_k", 0),
        ("top_k", 9),
        ("router", "dice"),
        ("route", "batch"),
        ("shared_router", True),
        ("capacity_factor", 0.0),
        ("capacity_factor", float("inf")),
        ("capacity_factor", 1e300),
        ("eval_capacity_factor", -1.0),
        ("capacity_rounding", "floor"),
        ("capacity_multiple_of", 0),
        ("batch_priority", "yes"),
        ("group", 0),
        ("group", "images"),
        ("noise_std", -0.1),
        ("noise_std", float("nan")),
        ("expert_width", 0),
        ("expert_width", 17.0),
        ("expert_dropout", 1.0),
        ("experts_start", "same"),
        ("shared_experts", -1),
        ("ensemble", 0),
        ("ensemble", 3),
        ("importance_loss_weight", -1.0),
        ("load_loss_weight", float("inf")),
        ("inject_auxiliary_loss", 1),
        ("cosine_dim", 16),
        ("cosine_bias", True),
    ],
)
def test_a_bad_value_is_named(field, value):
    with pytest.raises(ValueError, match=f"^{field}="):
        MoeConfig(**{field: value})


@pytest.mark.parametrize(
    ("router", "field", "value"),
    [("cosine", "cosine_dim", 0), ("cosine", "cosine_dim", True), ("soft", "capacity_rounding", "tutel")],
)
def test_a_value_that_the_router_does_not_take_is_named(router, field, value):
    with pytest.raises(ValueError, match=f"^{field}="):
        MoeConfig(router=router, **{field: value})


@pytest.mark.parametrize(
    "options",
    [{"top_k": 3}, {"router": "sigmoid", "noise_std": 0}, {"shared_experts": 1}],
    ids=lambda options: next(iter(options)),
)
def test_what_an_ensemble_cannot_have_is_named(options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))}=.* with ensemble=4"):
        MoeConfig(ensemble=4, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"capacity_factor": 1.05},
        {"eval_capacity_factor": 2.0},
        {"batch_priority": True},
        {"group": "image"},
        {"router": "hash", "noise_std": 0},
        {"router": "soft"},
        {"ensemble": 2},
    ],
    ids=lambda options: next(iter(options.items())),
)
def test_what_routing_of_images_cannot_have_is_named(options):
    with pytest.raises(ValueError, match=f'^{next(iter(options))}=.* with route="image"'):
        MoeConfig(**{"route": "image", "capacity_factor": None, **options})


@pytest.mark.parametrize("router", ["expert_choice", "soft"])
def test_where_experts_have_slots_a_top_k_means_nothing(router):
    assert MoeConfig(router=router, num_experts=1).num_experts == 1


@pytest.mark.parametrize(("factor", "expected"), [(1, 90), (0.5, 48), (0.25, 24), (0.01, 8), (2, 184)])
def test_an_expert_s_width_is_a_multiple_of_8_unless_it_is_the_mlp_s(factor, expected):
    assert MoeConfig(expert_width=factor).hidden_width(92 if factor == 2 else 90) == expected


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MoeConfig().top_k = 1


def test_another_router_brings_its_own_defaults():
    slots = MoeConfig(router="expert_choice")
    assert slots.group is None and slots.noise_std is None
    assert slots.resolved().group == "image" and slots.resolved().noise_std == 1.0
    assert dataclasses.replace(slots, router="token_choice") == MoeConfig()
    sigmoid = dataclasses.replace(MoeConfig(), router="sigmoid")
    assert sigmoid.resolved().noise_std == 0.0
    again = dataclasses.replace(sigmoid, router="token_choice").resolved()
    assert (again.noise_std, again.group, again.capacity_rounding, again.capacity_multiple_of) == (1.0, 8, "ceil", 4)
    assert again.resolved() == again
