"""Config files: YAML that is read with care.

What is a text by its option's type (a class, a path) is taken as it is written. YAML alone reads a class 00014 as 12,
and one that is called no as false.
"""

import re
import typing
from pathlib import Path
from typing import Any

import yaml

from vmoe.config_values import choices, section_type
from vmoe.errors import UserError
from vmoe.training.config import TrainConfig

_MOST_VALUES = 100_000  # of a config
_DECIMAL = re.compile(r"[-+]?[0-9]+")


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice in one section, of which YAML would keep the last; 010 is ten."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        return int(text) if _DECIMAL.fullmatch(text) else super().construct_yaml_int(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_config(path: str) -> dict[str, Any]:
    """The content of a config file.

    Raises:
        UserError: it cannot be read, is no YAML of keys, gives a key twice, or grows without end.
    """
    try:
        content = _loaded(Path(path).read_text(encoding="utf-8"), TrainConfig)
    except OSError as error:
        raise UserError(
            f"--config {path}: cannot be read ({error.strerror}); give a YAML file or a recipe's name, such as digits"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"--config {path}: is not YAML: {' '.join(str(error).split())}") from error
    except _TooLarge as error:
        raise UserError(
            f"--config {path}: is too large: it must hold at most {_MOST_VALUES} values, aliases counted"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: must hold keys such as data, model and optim, not {type(content).__name__}")
    return content


def as_yaml(content: Any) -> str:
    """One line of YAML that jsonargparse reads as these very values: all texts are quoted."""
    return yaml.dump(content, Dumper=_Quoting, default_flow_style=True, width=float("inf"), sort_keys=False).strip()


def as_written(text: str, hint: Any) -> str:
    """The value of an option on the command line, with what is a text by the option's type quoted within lists.

    Args:
        text: what was given.
        hint: the type.
    """
    if _DECIMAL.fullmatch(text):
        return text if str in choices(hint) else str(int(text))
    try:
        content = _loaded(text, hint)
    except (yaml.YAMLError, RecursionError, ValueError, _TooLarge):
        return text  # for jsonargparse to refuse
    return as_yaml(content) if isinstance(content, list | dict) else text


class _TooLarge(Exception):
    """Too many values, aliases counted."""


class _Quoting(yaml.SafeDumper):
    """Writes every text in quotes, and nothing by an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
# As jsonargparse, but not as YAML 1.1: 1e-3 is a number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
_Quoting.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def _loaded(text: str, hint: Any) -> Any:
    """The content of YAML, with texts as they are written where `hint` has them.

    Raises:
        yaml.YAMLError: it is none.
        _TooLarge: it is too large, or has no end.
    """
    loader = _Loader(text)
    node = loader.get_single_node()
    if node is None:
        return None
    content = loader.construct_document(node)
    if not _is_small(content):
        raise _TooLarge
    return _typed(loader, node, content, hint)


def _typed(loader: _Loader, node: yaml.Node, content: Any, hint: Any) -> Any:
    """What a node holds: `content`, but for what is a text by its type."""
    kinds = choices(hint)
    if isinstance(node, yaml.ScalarNode):
        is_null = content is None and type(None) in kinds
        # Also where a list of texts is wanted: that it is none is said of the value as it was written
        words = [*kinds, *(part for kind in kinds if typing.get_origin(kind) is list for part in _item_types(kind))]
        return node.value if str in words and not is_null else content
    if isinstance(node, yaml.SequenceNode) and isinstance(content, list):
        items = next((typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) in (list, tuple)), Any)
        return [_typed(loader, *each, items) for each in zip(node.value, content, strict=True)]
    if isinstance(node, yaml.MappingNode) and isinstance(content, dict):
        section = section_type(hint)
        hints = typing.get_type_hints(section) if section is not None else {}
        nodes = {loader.construct_object(key, deep=True): value for key, value in node.value}
        return {key: _typed(loader, nodes[key], value, hints.get(key, Any)) for key, value in content.items()}
    return content


def _item_types(kind: Any) -> tuple[Any, ...]:
    """The types of a list's items."""
    return choices(typing.get_args(kind)[0])


def _is_small(content: Any) -> bool:
    """Whether it can be gone through: aliases of aliases, or one in itself, would have no end."""
    seen, waiting = 0, [content]
    while waiting and seen <= _MOST_VALUES:
        value, seen = waiting.pop(), seen + 1
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return not waiting
