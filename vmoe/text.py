"""Text from outside, such as names of files and classes, on its way to a terminal, a picture or a table."""

import sys


def printable(text: str) -> str:
    r"""The text with its control characters as escapes, such as \x1b: no name moves the cursor or hides what is beside
    it, and any can be written.
    """
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in readable(text))


def readable(name: str) -> str:
    r"""A file's name as it is meant: where the locale knows no UTF-8, Python gives "caf\udcc3\udca9" for "café"."""
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # halves of letters that no file's name has
        return name


def replace_what_cannot_be_shown() -> None:
    """Has the terminal show "?" for characters that its encoding lacks, instead of ending the job."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # no stand-in
            stream.reconfigure(errors="replace")


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
