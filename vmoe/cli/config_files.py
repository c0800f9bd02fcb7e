"""Config files: YAML that is read with care, and the version that a run's was written by."""

import re
from pathlib import Path
from typing import Any

import yaml

from vmoe.errors import UserError
from vmoe.training.config import WRITTEN_BY
from vmoe.version import __version__

_MOST_VALUES = 100_000  # of a config


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is given twice in one section, of which YAML would keep the last."""

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
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise UserError(
            f"--config {path}: cannot be read ({error.strerror}); give a YAML file or a recipe's name, such as digits"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"--config {path}: is not YAML: {' '.join(str(error).split())}") from error
    if not _is_small(content):
        raise UserError(f"--config {path}: is too large: it must hold at most {_MOST_VALUES} values, aliases counted")
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: must hold keys such as data, model and optim, not {type(content).__name__}")
    return content


def newer_version(path: str) -> str | None:
    """The version that a run's config.yaml was written by, if it is newer than this one."""
    try:
        first = Path(path).read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, UnicodeDecodeError):
        return None
    version = first.removeprefix(WRITTEN_BY) if first.startswith(WRITTEN_BY) else ""
    parts, ours = (re.findall(r"\d+", text)[:3] for text in (version, __version__))
    return version if list(map(int, parts)) > list(map(int, ours)) else None


def _is_small(content: Any) -> bool:
    """Whether it can be gone through: aliases of aliases, or one in itself, would have no end."""
    seen, waiting = 0, [content]
    while waiting and seen <= _MOST_VALUES:
        value, seen = waiting.pop(), seen + 1
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return not waiting
