"""The options of a run by their dotted names: all names, the nearest to a wrong one, and Lightning's names for some."""

import difflib
from collections.abc import Mapping
from typing import Any, get_type_hints

from vmoe.config_values import section_type
from vmoe.errors import UserError

# Names that Lightning's users know -> ours
LIGHTNING_NAMES = {"trainer.max_epochs": "trainer.epochs", "trainer.accumulate_grad_batches": "trainer.accumulate"}


def option_names(kind: type, prefix: str = "") -> list[str]:
    """The dotted names of all options of a config dataclass, sections included."""
    return list(option_types(kind, prefix))


def option_types(kind: type, prefix: str = "") -> dict[str, Any]:
    """The types of all options of a config dataclass, sections included, by dotted name."""
    found = {}
    for name, hint in get_type_hints(kind).items():
        found[prefix + name] = hint
        if section := section_type(hint):
            found |= option_types(section, f"{prefix}{name}.")
    return found


def with_our_names(content: dict[str, Any], path: str) -> dict[str, Any]:
    """Replaces Lightning's option names by ours.

    Args:
        content: The content of a config file.
        path: The path of that file.

    Raises:
        UserError: An option is given by both names with different values.
    """
    content = {key: dict(value) if isinstance(value, dict) else value for key, value in content.items()}
    for theirs, ours in LIGHTNING_NAMES.items():
        section, _, name = ours.partition(".")
        options, other = content.get(section), theirs.partition(".")[2]
        if isinstance(options, dict) and other in options:
            value = options.pop(other)
            if options.setdefault(name, value) != value:
                raise UserError(f"{path}: {theirs}={value} and {ours}={options[name]} mean the same; give one of them")
    return content


def check_keys(
    plain: Mapping[str, Any], kind: type, path: str, names: list[str] | None = None, prefix: str = ""
) -> None:
    """Refuses keys that no config has.

    Args:
        plain: A config's content.
        kind: Its dataclass.
        path: The path of its file, or another name for the message.
        names: All dotted names; None takes those of `kind`.
        prefix: The dotted section of the keys.

    Raises:
        UserError: There is such a key. The message has the nearest valid names.
    """
    names = option_names(kind) if names is None else names
    hints = get_type_hints(kind)
    for key, value in plain.items():
        dotted = f"{prefix}{key}"
        if key not in hints:
            raise UserError(f"{path}: unknown key {dotted}; {nearest_option(dotted, names)}")
        section = section_type(hints[key])
        if section is not None and isinstance(value, dict):
            check_keys(value, section, path, names, f"{dotted}.")


def nearest_option(name: str, names: list[str]) -> str:
    """The valid names that are nearest to `name`: with the same or a similar last part, or similar as a whole."""
    last = name.rpartition(".")[2]
    close = [known for known in names if difflib.get_close_matches(last, [known.rpartition(".")[2]], cutoff=0.75)]
    close = difflib.get_close_matches(name, close or names, n=3, cutoff=0 if close else 0.75)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"the sections are {', '.join(known for known in names if '.' not in known)}; see --help-all"
