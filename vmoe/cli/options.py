"""Options that several jobs share."""

import argparse
import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vmoe.cli.short_help import SHORT, HelpAll, help_of_job, wide
from vmoe.cli.threads import choose_threads
from vmoe.errors import UserError

if TYPE_CHECKING:
    import torch


class ParserFound(Exception):
    """Carries a job's parser to the shell's completion."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


@contextlib.contextmanager
def asked_for_parser() -> Iterator[None]:
    """Within it a job raises `ParserFound` where it would parse its arguments."""
    _UserParser.is_asked_for = True
    try:
        yield
    finally:
        _UserParser.is_asked_for = False


class _UserParser(argparse.ArgumentParser):
    """Reports a wrong command line like any other mistake of the user: one line, exit code 2.

    A job with many options has a short help. `format_all` lists all options.
    """

    job = ""
    is_asked_for = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if _UserParser.is_asked_for:
            raise ParserFound(self)
        return super().parse_known_args(args, namespace)

    def format_help(self) -> str:
        return help_of_job(self.job, self) if self.job in SHORT else self.format_all()

    def format_all(self) -> str:
        return super().format_help()

    def error(self, message: str) -> None:
        raise UserError(f"{message}; see `{self.prog} --help`")


def new_parser(job: str, description: str) -> argparse.ArgumentParser:
    """A parser for `vmoe JOB`. Its errors are `UserError`s, and options cannot be abbreviated."""
    parser = _UserParser(prog=f"vmoe {job}", description=description, formatter_class=wide, allow_abbrev=False)
    parser.job = job
    shown = "explain all options" if job in SHORT else argparse.SUPPRESS  # for other jobs it equals --help
    parser.add_argument("--help-all", action=HelpAll, help=shown)
    return parser


def capacity_factor(text: str) -> float:
    """Reads a capacity factor above 0; inf drops nothing."""
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not factor > 0:  # NaN included
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0, or inf to drop nothing")
    return factor


def count(text: str, least: int = 1) -> int:
    """Reads a whole number that is at least `least`, which is 0 or more."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number >= {least}")
    return int(text)


def probability(text: str) -> float:
    """The type of an option that is a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 0 to 1")
    return value


def choose_device(name: str) -> "torch.device":
    """The device that `--device` names; "auto" is a GPU if there is one.

    Raises:
        UserError: torch knows no such device, or this machine has none.
    """
    import torch  # here, so that --help and mistyped options do not wait for it

    choose_threads()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not available here; use cpu or auto") from error
    return device


def split_options(argv: list[str]) -> tuple[list[str], list[str]]:
    """Splits arguments into a job's own, and those after `--` for the training that it starts."""
    place = argv.index("--") if "--" in argv else len(argv)
    return argv[:place], argv[place + 1 :]
