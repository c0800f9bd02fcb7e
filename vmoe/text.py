"""Prepares text for a terminal, a picture or a table: foreign names, such as those of files, and numbers."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from vmoe.errors import UserError

_STDERR = 2  # its file descriptor


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
    """Makes the terminal show "?" for characters that its encoding lacks, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not a replacement, such as a notebook's
            stream.reconfigure(errors="replace")


@contextlib.contextmanager
def readers_may_leave() -> Iterator[None]:
    """Lets a job continue, to write its files, after the reader of its output has closed the pipe, as `head` does.

    Raises:
        UserError: The output cannot be written for another reason, such as a full disk.
    """
    streams = [None if stream is None else _Unread(stream) for stream in (sys.stdout, sys.stderr)]  # None: `>&-`
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        is_failing = False
        try:
            yield
        except (Exception, KeyboardInterrupt):  # not SystemExit, by which argparse ends a --help
            is_failing = True
            raise
        finally:
            for stream in filter(None, streams):
                with contextlib.suppress(*[UserError] * is_failing):  # the first error is the one to report
                    stream.flush()  # flush now, since a flush at Python's exit would fail


def counted(count: int, one: str, many: str | None = None) -> str:
    """A number with its noun, such as "1 epoch" and "1,200 epochs".

    Args:
        count: The number.
        one: The singular.
        many: The plural; by default the singular with an s.
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def named(names: Sequence[str], most: int = 5) -> str:
    """The names in a line, such as "a, b, c". With more than `most` it ends with ", ..."."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


class _Unread:
    """A stream that discards its text once nobody reads it any more."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        with open(os.devnull, "w") as nowhere:  # so that Python's own flush at its exit does not fail
            os.dup2(nowhere.fileno(), self._stream.fileno())
        if not isinstance(error, BrokenPipeError) and self._stream.fileno() != _STDERR:  # there no line can be printed
            raise UserError(f"the output cannot be written ({error.strerror or error}); make room") from error
