"""Super-classes found in a confusion matrix."""

import numpy as np
import pytest

import vmoe
from vmoe.data.super_classes import match_super_classes
from vmoe.errors import UserError
from vmoe.evaluation.super_classes import group_classes

NAMES = ["cat", "car", "dog", "bus", "van", "cow"]
GROUPS = [["cat", "dog", "cow"], ["car", "bus", "van"]]


def blocks():
    """Cats, dogs and cows are taken for one another, and so are cars, buses and vans; a cow once for a bus."""
    confusion = np.zeros((6, 6), dtype=int)
    for group in GROUPS:
        places = [NAMES.index(name) for name in group]
        confusion[np.ix_(places, places)] = 5
    np.fill_diagonal(confusion, 80)
    confusion[5, 3] = 10
    return confusion


@pytest.mark.parametrize("soft", [False, True])
def test_what_is_confused_comes_together(soft):
    found = group_classes(blocks(), NAMES, 2, soft)
    assert found.groups == {"group-0": GROUPS[0], "group-1": GROUPS[1]}
    assert found.errors_within == pytest.approx(60 / 70) and found.pairs_within == pytest.approx(12 / 30)
    shares = match_super_classes(found.of_classes, NAMES, 2).shares  # as `loss.super_classes` takes them
    assert shares[3] == [0, 1]
    assert shares[5] == (pytest.approx([0.9, 0.1]) if soft else [1, 0])


def test_many_groups_keep_the_order_of_the_experts():
    found = group_classes(np.ones((12, 12), dtype=int), [str(number) for number in range(12)], 11)
    assert list(found.groups) == sorted(found.groups) and all(found.groups.values())


def test_a_model_without_confusion_is_refused():
    with pytest.raises(UserError, match="confuses no two classes"):
        group_classes(np.eye(6, dtype=int), NAMES, 2)


def test_only_a_model_with_more_classes_is_grouped(tmp_path):
    with pytest.raises(UserError, match="does not know its classes"):
        vmoe.super_classes(vmoe.create_model("vit_tiny_patch16_224", moe=False), 2)
    two = vmoe.create_model("vit_tiny_patch16_224", moe=False, num_classes=2)
    vmoe.save(two, tmp_path / "two.safetensors", ["a", "b"])
    with pytest.raises(UserError, match="knows 2 classes; super-classes need 3 or more"):
        vmoe.super_classes(vmoe.load(tmp_path / "two.safetensors"), 2)
