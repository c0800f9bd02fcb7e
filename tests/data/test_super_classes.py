"""Super-classes of a set's classes, from files that are right and wrong."""

from collections import Counter

import pytest

from vmoe.data.super_classes import match_super_classes, read_super_classes
from vmoe.errors import UserError

NAMES = ["no", "00014", "bike"]


def matched(tmp_path, text, experts=2, names=NAMES):
    file = tmp_path / "super.yaml"
    file.write_text(text)
    return match_super_classes(str(file), names, experts)


@pytest.mark.parametrize(
    "text",
    [
        "bike: wheels\nno: words\n00014: words\n",
        '{"00014": "words", "no": "words", "bike": {"wheels": 1}}',
    ],
)
def test_classes_are_found_by_name_in_any_order(tmp_path, text):
    found = matched(tmp_path, text)
    assert found.names == ["wheels", "words"]  # sorted: the experts do not depend on the order of lines
    assert found.shares == [[0, 1], [0, 1], [1, 0]]


def test_a_class_may_be_shared(tmp_path):
    found = matched(tmp_path, "no: a\n00014: b\nbike: {a: 0.333, b: 0.666}\n")
    assert found.shares[2] == pytest.approx([1 / 3, 2 / 3])


def test_cifar100_has_its_coarse_classes():
    names = sorted(read_super_classes("cifar100"))
    found = match_super_classes("cifar100", names, 20)
    owners = [found.names[shares.index(1)] for shares in found.shares]
    assert len(names) == 100 and set(Counter(owners).values()) == {5}
    assert dict(zip(names, owners, strict=True))["willow_tree"] == "trees"


@pytest.mark.parametrize(
    ("text", "experts", "line"),
    [
        ("no: a\n00014: b\nbyke: a\n", 2, "do not have 1 of 3 classes (byke) that it names; give the names of"),
        ("no: a\n00014: b\n", 2, "has no super-class for 1 of 3 classes (bike) of the data; add a line for each"),
        ("no: a\n00014: b\nbike: a\n", 3, "has 2 super-classes, and moe.num_experts is 3; give as many"),
        ("no: a\n00014: b\nbike: c\n", 2, "has 3 super-classes, and moe.num_experts is 2; give as many"),
        ("no: a\n00014: b\nbike: {a: 0.5, b: 0.2}\n", 2, "bike: must have the name of a super-class, or names with"),
        ("no: a\n00014: b\nbike: [a]\n", 2, "bike: must have the name of a super-class, or names with shares"),
        ("no: a\nno: b\n", 2, "is not YAML: no is given twice"),
        ("- no\n", 2, "must hold a line per class, such as maple_tree: trees"),
        ("no: [", 2, "is not YAML: "),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, text, experts, line):
    with pytest.raises(UserError, match=r"^loss\.super_classes") as refused:
        matched(tmp_path, text, experts)
    assert line in str(refused.value) and "\n" not in str(refused.value)
