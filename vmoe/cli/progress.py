"""The progress of jobs on stderr: a bar in a terminal, else a line every 10 seconds."""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import length_hint

from vmoe.progress import shown
from vmoe.text import printable

EVERY = 10.0  # seconds


class Tracked:
    """Batches, or other steps of a job, that show the job's progress during each iteration."""

    def __init__(self, steps: Iterable, description: str) -> None:
        self._steps, self._description = steps, description

    def __iter__(self) -> Iterator:
        return iter(shown(self._steps, self._description, True)) if sys.stderr.isatty() else self._with_lines()

    def _with_lines(self) -> Iterator:
        total, done = length_hint(self._steps), 0
        of = f" of {total:,}" if total else ""
        with working(lambda: f"{self._description}: {done:,}{of}"):
            for step in self._steps:
                yield step
                done += 1


def begin_job() -> None:
    """Starts a job: its first line comes after 10 seconds, whatever ran before it in this process."""
    _lines.restart()


@contextmanager
def working(description: str | Callable[[], str]) -> Iterator[None]:
    """Prints the job's current activity every 10 seconds, also during a long step. In nested blocks the inner counts.

    Args:
        description: The activity, such as "exporting", or a function that returns the progress.
    """
    said = description if callable(description) else lambda: description
    _lines.begin(said)
    try:
        yield
    finally:
        _lines.end(said)


class _Lines:
    """A thread that writes lines while a block is active."""

    def __init__(self) -> None:
        self._said: list[tuple[Callable[[], str], float]] = []  # descriptions, and their start times
        self._last = self._ended = -EVERY  # times of the last line, and of the end of the last block
        self._over = threading.Event()

    def restart(self) -> None:
        self._last = time.monotonic()

    def begin(self, said: Callable[[], str]) -> None:
        now = time.monotonic()
        self._said.append((said, now))
        if len(self._said) == 1 and not sys.stderr.isatty():  # a terminal shows bars, which lines would break
            if now - self._ended >= EVERY / 10:  # else many short steps would never print a line
                self._last = now
            self._over = threading.Event()
            threading.Thread(target=self._write, args=(self._over,), daemon=True).start()

    def end(self, said: Callable[[], str]) -> None:
        self._said = [(each, since) for each, since in self._said if each is not said]
        if not self._said:
            self._ended = time.monotonic()
            self._over.set()

    def _write(self, over: threading.Event) -> None:
        while not over.wait(max(0.0, self._last + EVERY - time.monotonic())):
            self._last = time.monotonic()
            for said, since in self._said[-1:]:
                print(printable(f"{said()}, {self._last - since:.0f} s"), file=sys.stderr, flush=True)


_lines = _Lines()
