"""Deterministic stratified choices: validation splits and parts of a training set.

All functions map labels to positions, independent of images.
"""

from collections.abc import Callable, Sequence

import numpy as np

from vmoe.data.config import SubsetConfig, nearest
from vmoe.errors import UserError
from vmoe.text import named


def pick(labels: np.ndarray, count: Callable[[int, int], int], seed: int) -> np.ndarray:
    """Picks `count(class, images of the class)` random images of each class.

    Each class is shuffled by (seed, class), and its first images are taken. So a larger count contains a smaller one.

    Args:
        labels: (n,) integers.
        count: Maps a class and its number of images to the number to take.
        seed: The seed, not negative.

    Returns:
        Ascending positions in `labels`.
    """
    chosen = [np.empty(0, dtype=np.int64)]
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = np.random.default_rng([seed, int(label)]).permutation(len(members))
        chosen.append(members[order[: count(int(label), len(members))]])
    return np.sort(np.concatenate(chosen))


def split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits off a stratified share: `fraction` of each class, rounded, at least one image, but never its last one.

    Args:
        labels: (n,) integers.
        fraction: Over 0 and under 1.
        seed: The seed, not negative.

    Returns:
        Ascending positions of the rest and of the share.
    """
    picked = pick(labels, lambda _, size: min(_rounded_share(fraction, size), size - 1), seed)
    return np.setdiff1d(np.arange(len(labels)), picked), picked


def choose_training(labels: np.ndarray, config: SubsetConfig, class_names: Sequence[str], seed: int) -> np.ndarray:
    """Ascending positions of the training images that `config` keeps: a fraction, a number per class, or a long tail.

    Raises:
        UserError: A class has fewer than `per_class` images.
    """
    if config.per_class is not None:
        wanted = config.per_class
        sizes = np.bincount(labels, minlength=len(class_names))
        if len(labels) and sizes.min() < wanted:
            short = int(sizes.argmin())
            raise UserError(
                f"data.subset.per_class={wanted}: class {class_names[short]!r} has only {sizes[short]} training "
                f"images; ask for at most {sizes[short]} or leave the class out"
            )
        return pick(labels, lambda _, __: wanted, seed)
    if config.fraction is not None:
        fraction = config.fraction
        return pick(labels, lambda _, size: _rounded_share(fraction, size), seed)
    if config.imbalance is not None:
        last = max(len(class_names) - 1, 1)
        return pick(labels, lambda label, size: max(1, int(size * config.imbalance ** (-label / last))), seed)
    return np.arange(len(labels))


def find_classes(wanted: Sequence[str | int], class_names: Sequence[str]) -> list[int]:
    """Indices of classes given by name or by index. A name takes precedence over an equal index.

    Raises:
        UserError: A class is unknown (the message has the nearest names) or given twice.
    """
    by_name = {name: index for index, name in enumerate(class_names)}
    found: list[int] = []
    for item in wanted:
        if str(item) in by_name:
            index = by_name[str(item)]
        elif str(item) in map(str, range(len(class_names))):  # so 010 is no index
            index = int(item)
        else:
            hint = nearest(str(item), class_names) or f"the {len(class_names)} classes are {named(class_names)}"
            raise UserError(f"data.subset.classes: no class {item!r} in this data set; {hint}")
        if index in found:
            raise UserError(f"data.subset.classes: class {class_names[index]!r} is given twice; name it once")
        found.append(index)
    return found


def _rounded_share(fraction: float, size: int) -> int:
    """`fraction` of `size` rounded half up, at least 1."""
    return max(1, int(fraction * size + 0.5))
