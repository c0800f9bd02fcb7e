"""Reads class folders, SPLIT/CLASS/IMAGE or CLASS/IMAGE, for training and make-shards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmoe.data.image_files import ARRAY_SUFFIX, IgnoredFiles, find_pictures, list_class_folders
from vmoe.errors import UserError

# Split -> the possible names of its folder, ignoring case
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


@dataclass(frozen=True)
class ClassFolders:
    """The pictures of some splits, with labels from the class folders of training."""

    classes: list[str]
    samples: dict[str, list[tuple[str, int]]]  # the files and labels of each split
    ignored: IgnoredFiles


def read_class_folders(splits: Mapping[str, Path], arrays: bool = False) -> ClassFolders:
    """Reads SPLIT/CLASS/IMAGE of every split, each real file once. Class folders may have subfolders.

    Args:
        splits: The folder of each split. The class folders of "train" (or of the first split) are the classes. Other
            splits may lack some of them.
        arrays: Whether .npy files count as pictures.

    Raises:
        UserError: A split is a link to another, has no class folders or one that training lacks, or a class has no
            training picture.
    """
    ignored = IgnoredFiles()
    names = {split: list_class_folders(folder, ignored) for split, folder in splits.items()}
    asked = [(split, name) for split, found in names.items() for name in found]
    folders = [splits[split] / name for split, name in asked]
    pictures = dict(zip(asked, find_pictures(folders, ignored, arrays), strict=True))
    _refuse_the_same_folder(splits)
    main = "train" if "train" in splits else next(iter(splits))
    classes = [name for name in names[main] if pictures[main, name] is not None]
    if not classes:
        raise UserError(f"{splits[main]}: has no class folders; put each class's images in a folder of its own")
    for name in classes:
        if not pictures[main, name]:
            left = f" (ignored: {ignored})" if ignored else ""
            advice = ", or read .npy arrays by data.channels" if f"({ARRAY_SUFFIX}" in left else ""
            raise UserError(
                f"{splits[main]}: class folder {name!r} holds no picture{left}; add some, or remove it{advice}"
            )
    number = {name: label for label, name in enumerate(classes)}
    samples: dict[str, list[tuple[str, int]]] = {split: [] for split in splits}
    for (split, name), files in pictures.items():
        if files is None:
            continue
        if name not in number:
            raise UserError(f"{splits[split]}: class folder {name!r} is not in {splits[main]}; add or remove it")
        samples[split] += [(file, number[name]) for file in files]
    return ClassFolders(classes, samples, ignored)


def _refuse_the_same_folder(splits: Mapping[str, Path]) -> None:
    taken: dict[Path, Path] = {}
    for folder in splits.values():
        first = taken.setdefault(folder.resolve(), folder)
        if first is not folder:
            raise UserError(f"{folder}: is the same folder as {first}, by a link; give each split images of its own")


def _refuse_without_classes(root: Path, names: Sequence[str]) -> None:
    """Refuses splits that all lack class folders, as ImageNet's val after unpacking. Pictures in test are allowed."""
    for name in names:
        if not has_pictures(root / name):
            raise UserError(f"data.root={root}: {name} holds no class folders; fill it, or remove it")
        if split_of(name) != "test":
            raise UserError(
                f"data.root={root}: {name} holds pictures without class folders; put each class's pictures in a folder "
                "of its own"
            )


def has_pictures(folder: Path) -> bool:
    """Whether a folder directly holds pictures."""
    ignored = IgnoredFiles()
    list_class_folders(folder, ignored)
    return ignored.counts["outside"] > 0


def split_of(name: str) -> str | None:
    """The split of a name such as "Train" or "validation": "train", "val" or "test"; None for other names."""
    return next((split for split, names in SPLIT_NAMES.items() if name.lower() in names), None)


def find_split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split in ROOT, in the order train, val, test; empty if ROOT holds the classes themselves.

    If no folder has class folders, there are no splits: a class may be called "train". A test folder with unlabelled
    pictures beside other splits is no split.

    Raises:
        UserError: A split has two folders or, beside another split, no class folders; or the splits are one level
            deeper than ROOT.
    """
    folders = list_class_folders(root, IgnoredFiles())
    inside = {name: list_class_folders(root / name, IgnoredFiles()) for name in folders}
    found: dict[str, Path] = {}
    for name in folders:
        split = split_of(name)
        if split is not None and inside[name]:
            if split in found:
                raise UserError(f"data.root={root}: has {found[split].name} and {name} for one split; remove one")
            found[split] = root / name
    if not found:
        if folders and all(map(split_of, folders)):
            named = " and ".join(folders)
            raise UserError(f"data.root={root}: no class folders in {named}; put each class's images in one of its own")
        for name in folders:
            if {"train"} < {split_of(deeper) for deeper in inside[name]}:
                raise UserError(f"data.root={root}: the splits are in its folder {name}; give data.root={root / name}")
    else:
        _refuse_without_classes(root, [name for name in folders if split_of(name) is not None and not inside[name]])
    return {split: found[split] for split in SPLIT_NAMES if split in found}
