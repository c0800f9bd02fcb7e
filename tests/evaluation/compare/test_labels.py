"""Labels of a study's arms tell what tells their recipes apart, and nothing else."""

from dataclasses import asdict

from vmoe.checkpoints import flatten
from vmoe.evaluation.compare.labels import arm_labels
from vmoe.moe import MoeConfig


def labels(*arms):
    """Each arm: options of its MoE layers or None, and others by dotted name."""
    sections = [(None if moe is None else asdict(MoeConfig(**moe)), rest) for moe, rest in arms]
    base = {"optim.lr": 1e-3, "trainer.epochs": 40, "model.moe_drop_path": None, "data.subset.fraction": None}
    return arm_labels([(base | flatten({"moe": moe}) | rest, moe) for moe, rest in sections])


def test_the_arms_of_a_study():
    found = labels(
        (None, {}),
        ({"top_k": 1}, {}),
        ({"top_k": 2, "expert_width": 0.5}, {}),
        ({"top_k": 1, "expert_width": 0.5, "shared_experts": 1}, {}),
        ({"top_k": 1, "batch_priority": True}, {}),
        ({"top_k": 1, "layers": "last-2"}, {}),
        ({"top_k": 1, "layers": [5, 7]}, {}),
        ({"top_k": 1, "capacity_factor": None}, {}),
        ({"top_k": 1, "num_experts": 32}, {}),
        ({"router": "soft", "soft_scale": 10.0}, {}),
        ({"router": "expert_choice", "num_experts": 16}, {}),
        ({"router": "hash", "top_k": 1}, {}),
    )
    assert found == [
        "dense",
        "E=8 K=1",
        "E=8 K=2 width 0.5",
        "E=8 K=1 width 0.5 1 shared",
        "E=8 K=1 batch priority",
        "E=8 K=1 last-2",
        "E=8 K=1 layers 5,7",
        "E=8 K=1 no capacity factor",
        "E=32 K=1",
        "Soft MoE E=8 soft scale 10",
        "expert choice E=16",
        "hash routing E=8 K=1",
    ]


def test_what_all_v_moes_share_is_not_told():
    shared = {"layers": "last-2", "batch_priority": True}
    assert labels((None, {}), (shared, {}), (shared | {"top_k": 1}, {})) == ["dense", "E=8 K=2", "E=8 K=1"]


def test_other_options_are_told_where_most_arms_have_another_value():
    most = [(None, {}), ({}, {}), ({"top_k": 1}, {})]
    assert labels(*most, ({}, {"trainer.epochs": 150, "optim.lr": 5e-4}))[1:] == [
        "E=8 K=2",
        "E=8 K=1",
        "E=8 K=2 lr 0.0005 150 epochs",
    ]
    assert labels((None, {}), (None, {"data.subset.fraction": 0.1})) == ["dense", "dense 0.1 of the data"]
    name = "data.augment.randaugment_magnitude"
    assert labels((None, {name: 9}), (None, {name: [0, 30]}))[1] == "dense randaugment magnitude 0,30"
    assert labels((None, {"trainer.epochs": 20}), (None, {})) == ["dense 20 epochs", "dense 40 epochs"]


def test_labels_are_unlike():
    # A value of null is not told, nor is one that most have.
    assert labels(({}, {}), ({}, {}), ({}, {})) == ["E=8 K=2", "E=8 K=2 (2)", "E=8 K=2 (3)"]


def test_names_that_two_options_share_bring_their_section():
    found = labels((None, {"a.rate": 1, "b.rate": 2}), (None, {"a.rate": 3, "b.rate": 4}))
    assert found == ["dense a rate 1 b rate 2", "dense a rate 3 b rate 4"]


def test_layers_of_another_version_have_a_label():
    recipes = [({"moe.router": "new"}, {"router": "new", "num_experts": 4, "top_k": 1}), ({}, None)]
    assert arm_labels(recipes) == ["new E=4 K=1", "dense"]
