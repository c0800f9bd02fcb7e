"""What the library shows while it goes through many images: a bar, where there is a terminal."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

Progress = bool | Callable[[Iterable[Any], str], Iterable[Any]]


def shown(steps: Iterable[Any], description: str, progress: Progress) -> Iterable[Any]:
    """The steps, with what `progress` asks for: nothing, a bar on stderr, or what a function of both makes of them."""
    if not isinstance(progress, bool):
        return progress(steps, description)
    return _WithBar(steps, description) if progress else steps


class _WithBar:
    """Steps with a bar on stderr, where that is a terminal, each time they are gone through."""

    def __init__(self, steps: Iterable[Any], description: str) -> None:
        self._steps, self._description = steps, description

    def __iter__(self) -> Iterator[Any]:
        from tqdm import tqdm  # here, since most of what imports this module shows no bar

        return iter(tqdm(self._steps, desc=self._description, leave=False, disable=None))  # None: unless in a terminal
