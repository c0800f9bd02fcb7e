"""Converts configs to nested dicts, lists, strings, numbers and None, and back with a check of each field's type."""

import dataclasses
import re
import types
import typing
from typing import Any, Literal

from vmoe.errors import UserError


def to_plain(value: Any) -> Any:
    """A config as nested dicts, lists, strings, numbers and None, for YAML, JSON and checkpoints."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, list | tuple) else value


def from_plain(kind: type, plain: dict[str, Any], prefix: str = "") -> Any:
    """The dataclass `kind` from nested dicts. Missing fields take their defaults.

    Raises:
        UserError: An option is unknown or its value not allowed. The message has its dotted name.
    """
    hints = typing.get_type_hints(kind)
    values = {}
    for name, value in plain.items():
        if name not in hints:
            raise UserError(f"{prefix}{name}: no such option in this version")
        if value is None and type(None) not in choices(hints[name]):
            raise UserError(f"{prefix}{name}: must not be null; leave it out for its default")
        section = section_type(hints[name])
        if section is not None and value is not None:
            if not isinstance(value, dict):
                raise UserError(f"{prefix}{name}={value!r}: must be a section of options")
            value = from_plain(section, value, f"{prefix}{name}.")
        elif isinstance(value, list) and _holds_tuple(hints[name]):  # YAML and checkpoints know only lists
            value = tuple(value)
        if section is None and not _fits(value, hints[name]):
            raise UserError(f"{prefix}{name}={value!r}: must be {describe_type(hints[name])}")
        values[name] = value
    try:
        return kind(**values)
    except ValueError as error:
        raise UserError(with_section(str(error), kind, prefix)) from error


def with_section(line: str, kind: type, prefix: str) -> str:
    """An error line of a config dataclass with the section's prefix before each of its options.

    Args:
        line: Such as "logit_adjustment=1.0: must be 0 with name=bce". It begins with an option.
        kind: The dataclass.
        prefix: The dotted section, such as "loss.", perhaps behind a file's name as in "FILE: loss."; or "".
    """
    names = (f.name if "_" in f.name else rf"{f.name}(?==|\.[a-z])" for f in dataclasses.fields(kind))
    section = prefix.rpartition(": ")[2]
    first, colon, rest = line.partition(": ")
    return prefix + first + colon + re.sub(rf"(?<![\w./='\"-])(?=(?:{'|'.join(names)})\b)", section, rest)


def section_type(hint: Any) -> type | None:
    """The config dataclass that a field's type holds, `X` or `X | None`; None for a plain value."""
    return next((choice for choice in choices(hint) if dataclasses.is_dataclass(choice)), None)


def choices(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of a field's type. The dataclass itself checks the words of a Literal."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, choice) for choice in parts)
    if origin is Literal:
        return any(type(value) is type(choice) for choice in parts)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is Any:
        return True
    return type(value) in ((int, float) if hint is float else (hint,))


def describe_type(hint: Any) -> str:
    """A field's type in a user's words: the words of a Literal, or the kind of value."""
    return " or ".join(_describe_one(choice) for choice in choices(hint))


def _describe_one(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(str(word) for word in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        return "a list of numbers" if ... in parts else f"a list of {len(parts)} numbers"
    if dataclasses.is_dataclass(hint):
        return "a section of options"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return (names | {list: "a list", dict: "keys and values"})[typing.get_origin(hint) or hint]


def _holds_tuple(hint: Any) -> bool:
    return any(typing.get_origin(choice) is tuple for choice in choices(hint))
