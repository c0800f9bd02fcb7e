"""Completes `vmoe` commands for the Tab key. The shell asks the command itself, by argcomplete's script."""

import argparse
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args, get_origin

import argcomplete
from argcomplete.completers import ChoicesCompleter, FilesCompleter

from vmoe.cli.main import JOBS
from vmoe.cli.options import ParserFound, asked_for_parser
from vmoe.config_values import choices, section_type
from vmoe.data.config import SetName
from vmoe.training.config import TrainConfig
from vmoe.training.options import option_types
from vmoe.training.recipes import recipe_names

_TRAIN_TOO = ("data", "plan")  # jobs that also accept the options of training
# Options with the path of a file or folder -> the words that they take beside it
_PATHS = {
    **dict.fromkeys(("output_dir", "data.root", "data.augment.albumentations", "distill.teacher"), ()),
    "init_from": ("pretrained",),
    "loss.super_classes": ("cifar100",),
}


def complete(exit_method: Callable[..., Any] = os._exit) -> None:
    """Prints the completions that a shell asks for, and ends the process.

    Args:
        exit_method: Called with the exit code.
    """
    line = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
    words = f"{line}|".split()  # the user is typing the last one
    before = words[int(os.environ["_ARGCOMPLETE"]) : -1]  # the words between `vmoe` and the last one
    if not before:
        parser = argparse.ArgumentParser()
        parser.add_argument("job").completer = ChoicesCompleter(JOBS)  # type: ignore[attr-defined]
    elif "--" in before:  # the words after it are for the training that the job starts
        parser = _with_options_of_training(argparse.ArgumentParser(allow_abbrev=False))
        _begin_at(words.index("--"))
    else:
        parser = _parser_of(before[0])
        _begin_at(words.index(before[0]))
    argcomplete.autocomplete(parser, always_complete_options=False, exit_method=exit_method)


def _begin_at(place: int) -> None:
    """Makes argcomplete treat the word at this position as the command."""
    os.environ["_ARGCOMPLETE"] = str(place + 1)


def _parser_of(job: str) -> argparse.ArgumentParser:
    if job not in JOBS:
        return argparse.ArgumentParser()
    if job == "train":
        parser = argparse.ArgumentParser(allow_abbrev=False)
        sets = [name for name in get_args(SetName)]
        parser.add_argument("images", nargs="?").completer = _words_and_files(sets)  # type: ignore[attr-defined]
        for flag in ("--find_lr", "--find_batch_size", "--print_config", "--help-all"):
            parser.add_argument(flag, action="store_true")
        return _with_options_of_training(parser)
    module = importlib.import_module(f"vmoe.cli.{job.replace('-', '_')}")
    try:
        with asked_for_parser():
            module.main([])
    except ParserFound as found:
        return _with_options_of_training(found.parser) if job in _TRAIN_TOO else found.parser
    return argparse.ArgumentParser()


def _with_options_of_training(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    types = {name: hint for name, hint in option_types(TrainConfig).items() if section_type(hint) is None}
    for name, hint in {"config": str, **types}.items():
        if f"--{name}" not in parser._option_string_actions:
            option = parser.add_argument(f"--{name}", nargs="?" if name == "resume" else None)
            option.completer = _completer(name, hint)  # type: ignore[attr-defined]
    return parser


def _completer(name: str, hint: Any) -> Any:
    """The completer of an option's value, or None."""
    if name == "config":
        return _words_and_files(recipe_names())
    if name in _PATHS:
        return _words_and_files(_PATHS[name])
    words = [str(word) for kind in choices(hint) if get_origin(kind) is Literal for word in get_args(kind)]
    words += ["true", "false"] if bool in choices(hint) else []
    return ChoicesCompleter(words)  # numbers and texts have no completions


def _words_and_files(words: Sequence[str]) -> Callable[..., list[str]]:
    files = FilesCompleter()
    return lambda prefix, **_: [*(word for word in words if word.startswith(prefix)), *files(prefix)]
