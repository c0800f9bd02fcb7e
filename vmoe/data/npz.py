"""Loads data sets of the user's own arrays from one .npz file, which is never unpickled."""

import zipfile
from pathlib import Path

import numpy as np

from vmoe.data.folders import SPLIT_NAMES
from vmoe.data.imageset import ArrayImages, ImageSet
from vmoe.errors import UserError


def load_npz(root: str, channels: int | None = None) -> tuple[dict[str, ImageSet], list[str], int]:
    """Loads `train_x, train_y` and, if present, the same of `val` and `test`, and `class_names` from one file.

    Images are (n, H, W, 3), (n, H, W, 1) or (n, H, W) uint8; labels (n,) integers from 0, or (n, classes) of 0 and 1
    for images of several classes. With `channels` images are (n, H, W, channels) of any numbers.

    Returns:
        The images of each split, the class names, and the shorter side of the training images in pixels.

    Raises:
        UserError: The file or one of its arrays is missing or malformed; the line names it.
    """
    arrays = _read_npz(Path(root))
    _require_arrays(root, list(arrays))
    sets = {name: _npz_set(root, arrays, name, channels) for name in SPLIT_NAMES if f"{name}_x" in arrays}
    of_several = any(part.is_multi_label for part in sets.values())
    names = (_names_of_columns if of_several else _names_of_numbers)(root, sets, arrays)
    return sets, names, min(arrays["train_x"].shape[1:3])


def _require_arrays(root: str, found: list[str]) -> None:
    """Refuses a split without images or labels, and training alone beside arrays of other names."""
    known = {split: {f"{split}_x", f"{split}_y"} for split in SPLIT_NAMES}
    given = [split for split in SPLIT_NAMES if split == "train" or known[split].intersection(found)]
    if given == ["train"] and set(found) - known["train"] - {"class_names"}:
        given = ["train", "test"]
    if missing := sorted(set().union(*(known[split] for split in given)).difference(found)):
        raise UserError(
            f"{root}: has no array {missing[0]!r} (it has {', '.join(found) or 'none'}); a data set needs "
            "train_x, train_y, test_x and test_y, or train_x and train_y alone"
        )


def _names_of_numbers(root: str, sets: dict[str, ImageSet], arrays: dict[str, np.ndarray]) -> list[str]:
    number = 1 + max(int(part.labels.max(initial=0)) for part in sets.values())
    if number > len(sets["train"]):
        raise UserError(
            f"{root}: labels go up to {number - 1}, but there are {len(sets['train'])} training images; "
            "number the classes from 0 on, without gaps"
        )
    names = [str(name) for name in arrays.get("class_names", range(number))]
    if len(names) < number:
        starts = min(int(part.labels.min()) for part in sets.values())
        fix = "number the labels from 0" if starts == 1 and len(names) == number - 1 else "name all"
        raise UserError(f"{root}: class_names has {len(names)} names, but labels go up to {number - 1}; {fix}")
    return names


def _names_of_columns(root: str, sets: dict[str, ImageSet], arrays: dict[str, np.ndarray]) -> list[str]:
    shapes = {part.labels.shape[1:] for part in sets.values()}
    if len(shapes) > 1:
        found = ", ".join(f"{name}_y {part.labels.shape}" for name, part in sets.items())
        raise UserError(f"{root}: the labels' shapes differ in classes: {found}; give all a column per class")
    number = sets["train"].labels.shape[1]
    names = [str(name) for name in arrays.get("class_names", range(number))]
    if len(names) != number:
        raise UserError(f"{root}: class_names has {len(names)} names, and train_y {number} columns; name each")
    return names


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        inside = sorted(file.name for file in path.glob("*.npz")) if path.is_dir() else []
        hint = f"it is a folder that holds {', '.join(inside)}" if inside else "there is no such file"
        raise UserError(f"data.root={path}: for 'npz' this must be the .npz file itself; {hint}")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: is no .npz file, or is cut short; write it with numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # for a damaged header NumPy may raise any type
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{path}: cannot be read as an .npz file ({reason}); write it again with numpy.savez"
        ) from error


def _npz_set(root: str, arrays: dict[str, np.ndarray], name: str, channels: int | None) -> ImageSet:
    """The images and labels of one split, checked. Gray images may leave out the channel axis."""
    images, labels = arrays[f"{name}_x"], arrays[f"{name}_y"]
    if images.ndim == 3:
        images = images[..., None]
    numbers = (1, 3) if channels in (None, 1, 3) else (channels,)
    if images.ndim != 4 or images.shape[3] not in numbers or not images.size:
        gray = " or (n, H, W)" if 1 in numbers else f", by data.channels={channels}"
        needed = f"(n, H, W, {channels or 3}){gray}"
        raise UserError(f"{root}: {name}_x has shape {arrays[f'{name}_x'].shape}; it must be {needed}")
    if channels is not None:
        if images.dtype.kind not in "uif":
            raise UserError(f"{root}: {name}_x is {images.dtype}; it must hold numbers")
    elif images.dtype != np.uint8:
        raise UserError(f"{root}: {name}_x is {images.dtype}; it must be uint8, 0 to 255")
    is_multi_label = labels.ndim == 2 and labels.shape[1] > 1
    if labels.shape[: 1 if is_multi_label else None] != images.shape[:1]:
        needed = f"one label for each of the {len(images)} images"
        raise UserError(f"{root}: {name}_y is of shape {labels.shape}; it must hold {needed}")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise UserError(f"{root}: {name}_y holds {labels.dtype} from {labels.min()}; it must hold integers from 0")
    if is_multi_label and labels.max() > 1:
        raise UserError(
            f"{root}: {name}_y is of shape {labels.shape} and holds {labels.max()}; a column per class must hold 0 or 1"
        )
    return ImageSet.all_of(ArrayImages(images, f"{root}:{name}_x"), labels)
