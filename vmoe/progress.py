"""What the library shows while it goes through many images: a bar, in a terminal and in a notebook."""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Progress = bool | Callable[[Iterable[Any], str], Iterable[Any]]


def shown(steps: Iterable[Any], description: str, progress: Progress) -> Iterable[Any]:
    """The steps, with what `progress` asks for: nothing, a bar, or what a function of both makes of them."""
    if not isinstance(progress, bool):
        return progress(steps, description)
    return _WithBar(steps, description) if progress else steps


class _WithBar:
    """Steps with a bar where somebody watches, each time they are gone through."""

    def __init__(self, steps: Iterable[Any], description: str) -> None:
        self._steps, self._description = steps, description

    def __iter__(self) -> Iterator[Any]:
        from tqdm.auto import tqdm  # here, since most of what imports this module shows no bar

        is_watched = (sys.stderr is not None and sys.stderr.isatty()) or "ipykernel" in sys.modules
        return iter(tqdm(self._steps, desc=self._description, leave=False, disable=not is_watched))
