"""Opens the images of a set before a long run, so that unreadable files are found before the training."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vmoe.data.images import load_image
from vmoe.data.imageset import ImageSet
from vmoe.errors import UserError

_OPENED_IN_SECONDS = 1_000  # images that are opened in seconds
_MANY = 200_000
_LONG = 5  # number of times that a run reads each training image: opening all once then adds less than a fifth


def is_worth_checking(count: int, passes: int) -> bool:
    """Whether opening `count` images is little work compared with a run that reads training images `passes` times."""
    return count <= _OPENED_IN_SECONDS or (count <= _MANY and passes >= _LONG)


def damaged_images(images: ImageSet, threads: int, part: int = 0, parts: int = 1) -> list[str]:
    """Decodes every image of a split, or every `parts`-th from `part` on.

    Args:
        images: The split.
        threads: Number of threads; decoders release the GIL.
        part: The rank of this process.
        parts: Number of processes that share the work.

    Returns:
        A line for each image that cannot be read, with its name.
    """
    lines = _in_threads(lambda index: _reading_fault(images, index), range(part, len(images), parts), threads)
    return [line for line in lines if line is not None]


def readable_files(
    paths: Sequence[Path], threads: int, bit_depth: int | None = None, channels: int | None = None
) -> tuple[list[Path], list[str]]:
    """Decodes image files, `threads` at once. `bit_depth` and `channels` are as in `load_image`.

    Returns:
        The readable files, and a line for each other one with its name.
    """

    def fault(path: Path) -> str | None:
        try:
            load_image(path, bit_depth, channels)
        except UserError as error:
            return str(error)
        return None

    lines = _in_threads(fault, paths, threads)
    readable = [path for path, line in zip(paths, lines, strict=True) if line is None]
    return readable, [line for line in lines if line is not None]


def refusal(lines: Sequence[str]) -> str:
    """One line on unreadable images of validation and test, from a line for each of them."""
    first, others = lines[0], [line.partition(": ")[0] for line in lines[1:]]
    if not others:
        return first
    more = ", ..." if len(others) > 5 else ""
    return f"{first}; the same of {len(others)} other images of validation and test: {', '.join(others[:5])}{more}"


def _in_threads(function: Callable, values: Iterable, threads: int) -> list:
    pool = ThreadPoolExecutor(threads)
    try:
        return list(pool.map(function, values))
    finally:
        pool.shutdown(cancel_futures=True)  # a signal may interrupt the work


def _reading_fault(images: ImageSet, index: int) -> str | None:
    try:
        images.read(index)
    except UserError as error:
        return str(error)
    return None
