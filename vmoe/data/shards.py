"""Images in webdataset's tar shards: which there are and where, so that any of them can be read by itself.

A folder holds train-000000.tar, train-000001.tar, ..., and so on for val and test; names as published sets have them
serve too, such as imagenet1k-validation-00.tar. A sample is an image and its label, KEY.jpg (or another format) and
KEY.cls (or KEY.json with a "label"), side by side in a shard. classes.json, a list of names, is optional.

The place of every image is found once, by reading the shards' headers, and kept beside them in index-SPLIT.npz. Since
images are read by their places and not in the order of the file, order and resumption are as with any other set.
"""

import io
import json
import re
import tarfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vmoe.data.folders import SPLIT_NAMES, split_of
from vmoe.data.image_files import IMAGE_SUFFIXES
from vmoe.data.images import decode_image
from vmoe.data.imageset import ImageSet, Splits, given_splits
from vmoe.errors import UserError
from vmoe.files import atomic_write

CLASSES_FILE = "classes.json"
LABEL_KEYS = ("label", "cls", "target")  # of a .json, the first that is there


@dataclass(frozen=True)
class ShardedImages:
    """Images in tar files: of each (n,) its shard, where its bytes begin, how many they are, and its name.

    `bit_depth` is as in `load_image`.
    """

    paths: list[str]
    shards: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    names: np.ndarray
    bit_depth: int | None = None

    def read(self, position: int) -> np.ndarray:
        return decode_image(self.open(position), self.place(position), bit_depth=self.bit_depth)

    def open(self, position: int) -> BinaryIO:
        """The bytes of an image."""
        with open(self.paths[self.shards[position]], "rb") as file:
            file.seek(self.offsets[position])
            return io.BytesIO(file.read(int(self.sizes[position])))

    def place(self, position: int) -> str:
        return f"{self.paths[self.shards[position]]}/{self.names[position].decode()}"

    def patch_labels(self, position: int) -> np.ndarray | None:
        return None

    @property
    def side(self) -> None:
        return None


def load_shards(root: str | Path) -> Splits:
    """The splits that a folder has shards of; one of val and test may be missing.

    Raises:
        UserError: the folder has no shards of training or of any other images, or one is damaged.
    """
    root = Path(root)
    found, others = _find_shards(root)
    if not found or list(found) == ["train"]:
        beside = f", which has {', '.join(others[:3])} besides" if others else ""
        raise UserError(
            f"data.root={root}: webdataset needs train-*.tar and val-*.tar (or test-*.tar) in this folder{beside}; "
            "give the right folder, or make shards by `vmoe make-shards`"
        )
    sets = {split: _image_set(root, split, paths) for split, paths in found.items()}
    names = _read_class_names(root, 1 + max(int(part.labels.max(initial=0)) for part in sets.values()))
    tars = f"{len(others)} tar files" if len(others) > 1 else "1 tar file"
    notes = [f"{root}: passed over: {tars} of no split, such as {others[0]}"] if others else []
    return given_splits(sets, names, notes)


def _find_shards(root: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """The shards of each split, and the names of tar files that belong to none."""
    found: dict[str, list[Path]] = {}
    others = []
    for path in sorted(root.glob("*.tar")):
        words = [word.rstrip("0123456789") for word in re.split(r"[-_.]", path.stem)]
        splits = [split for word in words if (split := split_of(word)) is not None]
        if not path.is_file() or path.name.startswith("."):
            continue
        if splits:
            found.setdefault(splits[-1], []).append(path)
        else:
            others.append(path.name)
    return {split: found[split] for split in SPLIT_NAMES if split in found}, others


def _read_class_names(root: Path, count: int) -> list[str]:
    path = root / CLASSES_FILE
    if not path.exists():
        return [str(label) for label in range(count)]
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is not JSON; write a list of the classes' names, or remove it") from error
    if not isinstance(names, list) or len(names) < count:
        raise UserError(f"{path}: must be a list of at least {count} names, one per label; mend or remove it")
    return [str(name) for name in names]


def _image_set(root: Path, split: str, paths: list[Path]) -> ImageSet:
    """All images of a split, by the index that is there or a new one."""
    stamp = np.array([f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths])
    index = root / f"index-{split}.npz"
    columns = _read_kept_index(index, stamp)
    if columns is None:
        columns = _scan_headers(paths)
        try:
            with atomic_write(index) as temporary, open(temporary, "wb") as file:
                np.savez(file, stamp=stamp, **columns)
        except UserError as error:  # a folder that must not be written to: the next run reads the headers again
            warnings.warn(f"the index of the shards is not kept: {error}", stacklevel=2)
    labels = columns.pop("labels")
    return ImageSet.all_of(ShardedImages([str(path) for path in paths], **columns), labels)


def _read_kept_index(path: Path, stamp: np.ndarray) -> dict[str, np.ndarray] | None:
    """What was written for these very shards; None where it was not, or for others."""
    try:
        with np.load(path) as content:
            columns = dict(content)
    except Exception:  # a damaged file makes NumPy fail in any way it can
        return None
    return columns if np.array_equal(columns.pop("stamp", None), stamp) else None


def _scan_headers(paths: list[Path]) -> dict[str, np.ndarray]:
    rows = [(number, *row) for number, path in enumerate(paths) for row in _samples_in(path)]
    shards, offsets, sizes, names, labels = zip(*rows, strict=True) if rows else ((),) * 5
    numbers = {"shards": shards, "offsets": offsets, "sizes": sizes, "labels": labels}
    return {name: np.array(column, dtype=np.int64) for name, column in numbers.items()} | {
        "names": np.char.encode(np.array(names, dtype=str))
    }


def _samples_in(path: Path) -> list[tuple[int, int, str, int]]:
    """(offset, size, name, label) of every image of a shard."""
    images: dict[str, tuple[int, int, str]] = {}
    labels: dict[str, int] = {}
    descriptions: dict[str, tarfile.TarInfo] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                key, _, form = base.partition(".")  # webdataset's rule: the key ends at the first dot of the name
                if not member.isfile() or base.startswith("."):
                    continue
                if f".{form.lower()}" in IMAGE_SUFFIXES:
                    images[f"{folder}/{key}"] = (member.offset_data, member.size, member.name)
                elif form.lower() == "cls":
                    labels[f"{folder}/{key}"] = _label(path, member.name, tar.extractfile(member).read())
                elif form.lower() == "json":
                    descriptions[f"{folder}/{key}"] = member
            for key in images.keys() & descriptions.keys() - labels.keys():
                member = descriptions[key]
                labels[key] = _label_in_json(path, member.name, tar.extractfile(member).read())
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path}: is damaged ({' '.join(str(error).split())}); make or fetch it again") from error
    alone = next((key for key in {**images, **labels} if key not in images or key not in labels), None)
    if alone is not None:
        missing = "no image" if alone not in images else "no label (.cls or .json)"
        raise UserError(f"{path}: sample {alone.lstrip('/')} has {missing}; make or fetch the shard again")
    return [(*image, labels[key]) for key, image in images.items()]


def _label_in_json(path: Path, name: str, content: bytes) -> int:
    try:
        described = json.loads(content)
    except ValueError as error:
        raise UserError(f"{path}/{name}: is not JSON; make or fetch the shard again") from error
    label = next((described[key] for key in LABEL_KEYS if key in described), None) if type(described) is dict else None
    if type(label) is int and label >= 0:
        return label
    if label is None:
        raise UserError(f"{path}/{name}: has no {' or '.join(LABEL_KEYS)}, and there is no .cls; label the sample")
    return _label(path, name, str(label).encode())


def _label(path: Path, name: str, content: bytes) -> int:
    text = content.decode("utf-8", "replace").strip()
    if not text.isdecimal():
        raise UserError(f"{path}/{name}: holds {text[:20]!r}; a label must be a whole number from 0")
    return int(text)
