"""Super-classes: groups of classes, one per expert, for the guidance of a router of images.

C classes; E super-classes, as many as experts.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vmoe.errors import UserError
from vmoe.text import counted, named

_OPTION = "loss.super_classes"
_CIFAR100 = Path(__file__).with_name("super_classes_cifar100.yaml")


@dataclass(frozen=True)
class SuperClasses:
    """The super-classes of the classes of a set.

    Attributes:
        names: (E,) sorted names of the super-classes; the first belongs to expert 0.
        shares: (C, E) share of each class in each super-class; a row sums to 1.
    """

    names: list[str]
    shares: list[list[float]]


def read_super_classes(source: str | Path) -> dict[str, Any]:
    """Reads the super-class of each class from a file; "cifar100" gives its 20 coarse classes.

    The file is YAML or JSON, a line per class: `maple_tree: trees`. A class may be shared by several super-classes:
    `bicycle: {vehicles: 0.8, people: 0.2}`.

    Raises:
        UserError: The file cannot be read, or is not of this form.
    """
    path = _CIFAR100 if source == "cifar100" else Path(source)
    try:
        # Every name is a text: YAML would read a class 00014 as 12, and one that is called no as false
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Texts)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise UserError(
            f"{_OPTION}={source}: cannot be read ({reason}); give a YAML or JSON file, or cifar100", everywhere=True
        ) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{_OPTION}={source}: is not YAML: {' '.join(str(error).split())}", everywhere=True) from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"{_OPTION}={source}: must hold a line per class, such as maple_tree: trees", everywhere=True)
    return content


def match_super_classes(source: str | Mapping[str, Any], class_names: Sequence[str], num_experts: int) -> SuperClasses:
    """Matches super-classes to the classes of a set, by name.

    Args:
        source: A file, "cifar100", or the content of a file by `read_super_classes`.
        class_names: (C,) names of the set's classes.
        num_experts: E.

    Raises:
        UserError: The file cannot be read, names a class that the set does not have, leaves one out, or has another
            number of super-classes than there are experts.
    """
    content = read_super_classes(source) if isinstance(source, str) else source
    of_classes = {str(name): _shares_of(str(name), each) for name, each in content.items()}
    known = set(class_names)
    if unknown := [name for name in of_classes if name not in known]:
        raise UserError(
            f"{_OPTION}: the data do not have {_quoted(unknown, of_classes)} that it names; give the names of the "
            "data's classes",
            everywhere=True,
        )
    if missing := [name for name in class_names if name not in of_classes]:
        raise UserError(
            f"{_OPTION}: has no super-class for {_quoted(missing, class_names)} of the data; add a line for each",
            everywhere=True,
        )
    names = sorted({name for shares in of_classes.values() for name in shares})
    if len(names) != num_experts:
        raise UserError(
            f"{_OPTION}: has {counted(len(names), 'super-class', 'super-classes')}, and moe.num_experts is "
            f"{num_experts}; give as many super-classes as experts",
            everywhere=True,
        )
    return SuperClasses(names, [[of_classes[each].get(name, 0.0) for name in names] for each in class_names])


def _shares_of(name: str, given: Any) -> dict[str, float]:
    """The share of a class in each of its super-classes."""
    if isinstance(given, str) and given:
        return {given: 1.0}
    try:
        shares = {str(each): float(share) for each, share in given.items()}
    except (AttributeError, TypeError, ValueError):
        shares = {}
    total = sum(shares.values())
    if not (shares and min(shares.values()) >= 0 and abs(total - 1) < 0.01):
        raise UserError(
            f"{_OPTION}: {name}: must have the name of a super-class, or names with shares that sum to 1, such as "
            "{trees: 0.8, people: 0.2}",
            everywhere=True,
        )
    return {each: share / total for each, share in shares.items() if share > 0}


def _quoted(names: Sequence[str], of: Collection[str]) -> str:
    return f"{len(names)} of {counted(len(of), 'class', 'classes')} ({named(names)})"


class _Texts(yaml.BaseLoader):
    """Keeps every value as text, and refuses a class that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(str(key.value) for key, _ in node.value)
        if twice := [key for key, count in keys.items() if count > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)
