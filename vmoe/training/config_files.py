"""Reads config files (YAML).

An option of type text (a class, a path) is read as it is written. YAML alone reads a class 00014 as 12, and a class
"no" as false.
"""

import re
import typing
from pathlib import Path
from typing import Any

import yaml

from vmoe.config_values import choices, section_type
from vmoe.errors import UserError
from vmoe.training.config import TrainConfig

_MOST_VALUES = 100_000  # values in a config
_DECIMAL = re.compile(r"[-+]?[0-9]+")


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice in one section (YAML would keep the last), and reads 010 as ten."""

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
        UserError: It cannot be read, is not a YAML mapping, gives a key twice, or expands without end.
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
    """One line of YAML that jsonargparse reads as exactly these values: all texts are quoted."""
    return yaml.dump(content, Dumper=_Quoting, default_flow_style=True, width=float("inf"), sort_keys=False).strip()


def as_written(text: str, hint: Any) -> str:
    """The value of an option on the command line. Within lists, items of type text are quoted.

    Args:
        text: The given value.
        hint: The option's type.
    """
    if _DECIMAL.fullmatch(text):
        return text if str in choices(hint) else str(int(text))
    try:
        content = _loaded(text, hint)
    except (yaml.YAMLError, RecursionError, ValueError, _TooLarge):
        return text  # jsonargparse refuses it with a message
    return as_yaml(content) if isinstance(content, list | dict) else text


class _TooLarge(Exception):
    """The file has too many values, with each alias counted as its content."""


class _Quoting(yaml.SafeDumper):
    """A YAML dumper that quotes every text and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
# 1e-3 is a number, as in jsonargparse; in YAML 1.1 it is a text
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
_Quoting.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def _loaded(text: str, hint: Any) -> Any:
    """The content of YAML. Where `hint` expects texts, they stay as written.

    Raises:
        yaml.YAMLError: It is no valid YAML.
        _TooLarge: It is too large or has no end.
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
    """The node's content: `content`, with texts as written where the type expects texts."""
    kinds = choices(hint)
    if isinstance(node, yaml.ScalarNode):
        is_null = content is None and type(None) in kinds
        # also where a list of texts is expected: the message then shows the value as it was written
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
    """Whether the content is small. Aliases of aliases, or an alias within itself, may expand without end."""
    seen, waiting = 0, [content]
    while waiting and seen <= _MOST_VALUES:
        value, seen = waiting.pop(), seen + 1
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return not waiting
