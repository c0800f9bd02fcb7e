"""Reads images in webdataset's tar shards by random access.

A folder holds train-000000.tar, train-000001.tar, ..., and the same for val and test. Names of published sets work too,
such as imagenet1k-validation-00.tar. A sample is an image and its label, KEY.jpg (or another format) and KEY.cls (or
KEY.json with a "label"), side by side in a shard. classes.json, a list of names, is optional. With several labels per
image KEY.json holds a list of names or numbers, or with a separator KEY.txt holds a text.

An index, index-SPLIT.npz beside the shards, has the position of every image. It is made once from the shards' headers.
Images are read by position and not in the order of the file, so order and resumption are as with any other set.

The folder may be an address of fsspec, such as hf://datasets/USER/NAME, s3://BUCKET/FOLDER or https://HOST/FOLDER. An
index there is used if its shards have the recorded sizes. Otherwise the headers are read once, and the index is stored
in the user's cache folder.
"""

import hashlib
import io
import json
import os
import re
import tarfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vmoe.data.addresses import RemoteFile, is_address, list_files, read_part, read_through, read_whole, shard_folder
from vmoe.data.folders import SPLIT_NAMES, split_of
from vmoe.data.image_files import IMAGE_SUFFIXES
from vmoe.data.images import decode_image
from vmoe.data.imageset import ImageSet, ImageStore, flags_of
from vmoe.data.tables import labels_in
from vmoe.errors import UserError
from vmoe.files import atomic_write
from vmoe.text import named

CLASSES_FILE = "classes.json"
Labels = int | list[str]  # labels of an image: its class by number, or several by name or number
Samples = list[tuple[int, int, str, Labels]]  # (offset, size, name, labels) of each image of a shard
LABEL_KEYS = ("label", "cls", "target")  # keys of a .json; the first one present counts


@dataclass(frozen=True)
class ShardedImages(ImageStore):
    """Images in tar files: for each (n,) its shard, the start and number of its bytes, and its name.

    `bit_depth` and `channels` are as in `load_image`.
    """

    paths: list[str]
    shards: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    names: np.ndarray
    bit_depth: int | None = None
    channels: int | None = None

    def read(self, position: int) -> np.ndarray:
        return decode_image(self.open(position), self.place(position), None, self.bit_depth, self.channels)

    def open(self, position: int) -> BinaryIO:
        """The bytes of an image."""
        path, offset, size = self.paths[self.shards[position]], self.offsets[position], self.sizes[position]
        if is_address(path):
            return io.BytesIO(read_part(path, int(offset), int(size)))
        with open(path, "rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(int(size)))

    def place(self, position: int) -> str:
        return f"{self.paths[self.shards[position]]}/{self.names[position].decode()}"


def load_shards(root: str | Path, separator: str | None = None) -> tuple[dict[str, ImageSet], list[str], list[str]]:
    """Reads a folder of shards.

    Args:
        root: The folder, or its address.
        separator: The separator of an image's labels in KEY.txt, KEY.cls or a text of KEY.json.

    Returns:
        The images of each split, by "train", "val" and "test"; the class names; and lines to print.

    Raises:
        UserError: The folder has no shards, or one is damaged, or it has others beside those of training.
    """
    if is_address(root):
        files = list_files(str(root))
        where: _Folder | _RemoteFolder = _RemoteFolder(shard_folder(str(root)), {file.name: file for file in files})
    else:
        where = _Folder(Path(root))
    found, others = _find_shards(where.tars())
    needs = f"data.root={root}: webdataset needs train-*.tar and val-*.tar (or test-*.tar) in this folder"
    if list(found) == ["train"] and others:
        raise UserError(
            f"{needs}; it has train-*.tar and {others[0]}, which is of no split; rename it, or move it away to have a "
            "part of train tested on"
        )
    if not found:
        beside = f", but it has {named(others, 3)}" if others else ""
        raise UserError(
            f"{needs}, or train-*.tar alone{beside}; give the right folder, or make shards by `vmoe make-shards`"
        )
    read = {split: _image_set(where, split, names, separator) for split, names in found.items()}
    sets = {split: part for split, (part, _) in read.items()}
    of_several = {split: words for split, (_, words) in read.items() if words is not None}
    if of_several:
        sets, names = _with_several(where, sets, of_several)
    else:
        names = _read_class_names(where, 1 + max(int(part.labels.max(initial=0)) for part in sets.values()))
    tars = f"{len(others)} tar files" if len(others) > 1 else "1 tar file"
    notes = [f"{root}: ignored: {tars} of no split, such as {others[0]}"] if others else []
    return sets, names, notes


class _Folder:
    """A folder of shards on this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def tars(self) -> list[str]:
        """The names of the tar files."""
        return sorted(path.name for path in self.root.glob("*.tar") if path.is_file())

    def path(self, name: str) -> str:
        return str(self.root / name)

    def read_through(self, name: str, read: Callable[[BinaryIO], Samples]) -> Samples:
        """Passes a shard to `read` and returns its result."""
        with open(self.root / name, "rb") as file:
            return read(file)

    def text(self, name: str) -> bytes | None:
        """The content of a small file, or None if there is no such file."""
        path = self.root / name
        return path.read_bytes() if path.exists() else None

    def stamp(self, names: list[str]) -> np.ndarray:
        """An index's description of its shards: names, sizes, and a value that changes with their content."""
        facts = [(name, (self.root / name).stat()) for name in names]
        return np.array([f"{name} {fact.st_size} {fact.st_mtime_ns}" for name, fact in facts])

    def kept_index(self, file: str, names: list[str]) -> dict[str, np.ndarray] | None:
        return _kept_columns(self.root / file, self.stamp(names))

    def place_for_index(self, file: str) -> Path:
        return self.root / file


class _RemoteFolder:
    """A folder of shards at an address, with the methods of `_Folder`."""

    def __init__(self, root: str, files: dict[str, RemoteFile]) -> None:
        self.root, self.files = root, files

    def tars(self) -> list[str]:
        return sorted(self.files)

    def path(self, name: str) -> str:
        return self.files[name].address

    def read_through(self, name: str, read: Callable[[BinaryIO], Samples]) -> Samples:
        return read_through(self.path(name), read)

    def text(self, name: str) -> bytes | None:
        return read_whole(f"{self.root}/{name}")

    def stamp(self, names: list[str]) -> np.ndarray:
        return np.array([f"{name} {self.files[name].size} {self.files[name].version}" for name in names])

    def kept_index(self, file: str, names: list[str]) -> dict[str, np.ndarray] | None:
        kept = _kept_columns(self.place_for_index(file), self.stamp(names))
        if kept is not None:
            return kept
        beside = self.text(file)
        sizes = np.array([f"{name} {self.files[name].size}" for name in names])
        return None if beside is None else _kept_columns(io.BytesIO(beside), sizes, of_sizes=True)

    def place_for_index(self, file: str) -> Path:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return caches / "vmoe" / "shards" / hashlib.sha256(self.root.encode()).hexdigest()[:16] / file


def _find_shards(tars: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The shards of each split, and the names of tar files without a split."""
    found: dict[str, list[str]] = {}
    others = []
    for name in tars:
        words = [word.rstrip("0123456789") for word in re.split(r"[-_.]", name.removesuffix(".tar"))]
        splits = [split for word in words if (split := split_of(word)) is not None]
        if name.startswith("."):
            continue
        if splits:
            found.setdefault(splits[-1], []).append(name)
        else:
            others.append(name)
    return {split: found[split] for split in SPLIT_NAMES if split in found}, others


def _read_class_names(where: _Folder | _RemoteFolder, count: int) -> list[str]:
    content, place = where.text(CLASSES_FILE), f"{where.root}/{CLASSES_FILE}"
    if content is None:
        return [str(label) for label in range(count)]
    try:
        names = json.loads(content.decode("utf-8"))
    except ValueError as error:
        raise UserError(f"{place}: is not JSON; write a list of the classes' names, or remove it") from error
    if not isinstance(names, list) or len(names) < count:
        raise UserError(f"{place}: must be a list of at least {count} names, one per label; mend or remove it")
    return [str(name) for name in names]


def _with_several(
    where: _Folder | _RemoteFolder, sets: dict[str, ImageSet], words: dict[str, list[str]]
) -> tuple[dict[str, ImageSet], list[str]]:
    """The splits with labels (n, classes) of all classes, and the class names.

    Args:
        where: The folder.
        sets: The splits, with labels of the words that each has.
        words: The names of each split's labels, or their numbers in classes.json.
    """
    if one := sorted(split for split in sets.keys() - words.keys() if len(sets[split])):
        raise UserError(f"{where.root}: {one[0]} has one label per sample, and {next(iter(words))} lists; write lists")
    known = {word for each in words.values() for word in each}
    if not known:
        raise UserError(f"{where.root}: no sample has a label; label them")
    numbers = [int(word) for word in known if word.isdecimal()]
    if len(numbers) == len(known) or where.text(CLASSES_FILE) is not None:
        names = _read_class_names(where, 1 + max(numbers, default=0))
    elif numbers:
        raise UserError(f"{where.root}: some labels are names and some numbers; write all alike, or add {CLASSES_FILE}")
    else:
        names = sorted(known)
    if lost := sorted(word for word in known if not word.isdecimal() and word not in names):
        raise UserError(f"{where.root}/{CLASSES_FILE}: does not hold the label {lost[0]!r}; add or mend it")
    wide = {}
    for split, part in sets.items():
        labels = np.zeros((len(part), len(names)), dtype=np.int8)
        for column, word in enumerate(words.get(split, ())):
            labels[:, int(word) if word.isdecimal() else names.index(word)] |= part.labels[:, column]
        wide[split] = replace(part, labels=labels)
    return wide, names


def _image_set(
    where: _Folder | _RemoteFolder, split: str, names: list[str], separator: str | None
) -> tuple[ImageSet, list[str] | None]:
    """All images of a split, by the index that is there or a new one; where they may have several labels, also the
    words that these are, one for each column of the labels.
    """
    file = f"index-{split}.npz"
    columns = where.kept_index(file, names)
    if columns is not None and str(columns.pop("separator", "")) != (separator or ""):
        columns = None
    if columns is None:
        columns = _scan_headers(where, names, separator)
        of_separator = {} if separator is None else {"separator": np.array(separator)}
        place = where.place_for_index(file)
        try:
            if isinstance(where, _RemoteFolder):
                place.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(place) as temporary, open(temporary, "wb") as opened_file:
                np.savez(opened_file, stamp=where.stamp(names), **of_separator, **columns)
        except (UserError, OSError) as error:  # a read-only folder: the next run reads the headers again
            warnings.warn(f"the index of the shards is not kept: {error}", stacklevel=2)
    labels, words = columns.pop("labels"), columns.pop("words", None)
    images = ImageSet.all_of(ShardedImages([where.path(name) for name in names], **columns), labels)
    return images, None if words is None else words.tolist()


def _kept_columns(source: Path | BinaryIO, stamp: np.ndarray, of_sizes: bool = False) -> dict[str, np.ndarray] | None:
    """An index that was written for exactly these shards (with `of_sizes`: for these names and sizes), or None."""
    try:
        with np.load(source) as content:
            columns = dict(content)
    except Exception:  # for a damaged file NumPy may raise any type
        return None
    known = columns.pop("stamp", None)
    if of_sizes and known is not None:
        known = np.array([str(each).rpartition(" ")[0] for each in known])
    return columns if np.array_equal(known, stamp) else None


def _scan_headers(where: _Folder | _RemoteFolder, names: list[str], separator: str | None) -> dict[str, np.ndarray]:
    rows = [(number, *row) for number, name in enumerate(names) for row in _samples_in(where, name, separator)]
    shards, offsets, sizes, places, labels = zip(*rows, strict=True) if rows else ((),) * 5
    numbers = {"shards": shards, "offsets": offsets, "sizes": sizes}
    columns = {name: np.array(column, dtype=np.int64) for name, column in numbers.items()}
    columns["names"] = np.char.encode(np.array(places, dtype=str))
    is_list = [isinstance(each, list) for each in labels]
    if not any(is_list):
        return columns | {"labels": np.array(labels, dtype=np.int64)}
    if not all(is_list):
        row = is_list.index(False)
        place = f"{where.path(names[shards[row]])}/{places[row]}"
        raise UserError(f"{place}: has one label, and other samples have lists; write lists in all")
    words = sorted({word for each in labels for word in each})
    return columns | {"labels": flags_of(labels, words), "words": np.array(words, dtype=str)}


def _samples_in(where: _Folder | _RemoteFolder, shard: str, separator: str | None) -> Samples:
    path = where.path(shard)
    try:
        return where.read_through(shard, lambda file: _samples_of(file, path, separator))
    except OSError as error:
        raise _damaged(path, error) from error


def _damaged(path: str, error: Exception) -> UserError:
    return UserError(f"{path}: is damaged ({' '.join(str(error).split())}); make or fetch it again")


def _samples_of(file: BinaryIO, path: str, separator: str | None) -> Samples:
    images: dict[str, tuple[int, int, str]] = {}
    labels: dict[str, Labels] = {}
    descriptions: dict[str, tarfile.TarInfo] = {}
    texts: dict[str, Labels] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                key, _, form = base.partition(".")  # webdataset's rule: the key ends at the first dot of the name
                if not member.isfile() or base.startswith("."):
                    continue
                if f".{form.lower()}" in IMAGE_SUFFIXES:
                    images[f"{folder}/{key}"] = (member.offset_data, member.size, member.name)
                elif form.lower() == "cls":
                    labels[f"{folder}/{key}"] = _label(path, member.name, tar.extractfile(member).read(), separator)
                elif form.lower() == "txt" and separator is not None:  # without a separator it is a caption
                    texts[f"{folder}/{key}"] = _label(path, member.name, tar.extractfile(member).read(), separator)
                elif form.lower() == "json":
                    descriptions[f"{folder}/{key}"] = member
            labels |= texts
            for key in images.keys() & descriptions.keys() - labels.keys():
                member = descriptions[key]
                labels[key] = _label_in_json(path, member.name, tar.extractfile(member).read(), separator)
    except (tarfile.TarError, EOFError) as error:
        raise _damaged(path, error) from error
    alone = next((key for key in {**images, **labels} if key not in images or key not in labels), None)
    if alone is not None:
        missing = "no image" if alone not in images else "no label (.cls or .json)"
        raise UserError(f"{path}: sample {alone.lstrip('/')} has {missing}; make or fetch the shard again")
    return [(*image, labels[key]) for key, image in images.items()]


def _label_in_json(path: str, name: str, content: bytes, separator: str | None) -> Labels:
    try:
        described = json.loads(content)
    except ValueError as error:
        raise UserError(f"{path}/{name}: is not JSON; make or fetch the shard again") from error
    label = next((described[key] for key in LABEL_KEYS if key in described), None) if type(described) is dict else None
    if isinstance(label, list):
        return _labels_in_list(path, name, label)
    if label is None:
        raise UserError(f"{path}/{name}: has no {' or '.join(LABEL_KEYS)}, and there is no .cls; label the sample")
    return _label(path, name, str(label).encode(), separator)


def _labels_in_list(path: str, name: str, labels: Sequence[object]) -> list[str]:
    for label in labels:
        is_label = (type(label) is int and label >= 0) or (isinstance(label, str) and label.strip())
        if not is_label:
            raise UserError(f"{path}/{name}: lists {label!r}; a label must be a name or a whole number from 0")
        if type(label) is int and labels.count(label) > 1:
            raise UserError(
                f"{path}/{name}: lists {label} twice; a list must hold the classes of its image, not a 0 or 1 per class"
            )
    return list(dict.fromkeys(str(label).strip() for label in labels))


def _label(path: str, name: str, content: bytes, separator: str | None) -> Labels:
    text = content.decode("utf-8", "replace").strip()
    if separator is not None:
        return labels_in(text, separator)
    if not text.isdecimal():
        raise UserError(f"{path}/{name}: holds {text[:20]!r}; a label must be a whole number from 0")
    return int(text)
