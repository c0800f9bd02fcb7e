"""Shows the library's progress over many images: a bar, in a terminal and in a notebook."""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Progress = bool | Callable[[Iterable[Any], str], Iterable[Any]]


def shown(steps: Iterable[Any], description: str, progress: Progress) -> Iterable[Any]:
    """The steps, shown as `progress` asks: not at all, with a bar, or by a function of steps and description."""
    if not isinstance(progress, bool):
        return progress(steps, description)
    return _WithBar(steps, description) if progress else steps


class _WithBar:
    """Steps with a bar in each iteration, in a terminal or notebook."""

    def __init__(self, steps: Iterable[Any], description: str) -> None:
        self._steps, self._description = steps, description

    def __iter__(self) -> Iterator[Any]:
        from tqdm.auto import tqdm  # here: most users of this module show no bar

        is_watched = (sys.stderr is not None and sys.stderr.isatty()) or "ipykernel" in sys.modules
        return iter(tqdm(self._steps, desc=self._description, leave=False, disable=not is_watched))
