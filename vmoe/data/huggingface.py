"""Reads sets of Hugging Face's `datasets`: from `save_to_disk`, a folder of Parquet files, or the hub."""

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from vmoe.data.config import DataConfig, TableConfig, is_huggingface, is_saved_dataset, nearest
from vmoe.data.folders import split_of
from vmoe.data.images import decode_image
from vmoe.data.imageset import ImageSet, ImageStore, flags_of, require_training_of_each
from vmoe.data.tables import cell_text, labels_in, labels_of_columns
from vmoe.errors import UserError
from vmoe.extras import require_module

if TYPE_CHECKING:
    from datasets import Dataset

_LABELS = ("label", "labels", "class", "target", "category")
_NO_LABEL = -1  # test splits of competitions have it


@dataclass(frozen=True)
class HuggingFaceImages(ImageStore):
    """The pictures of one split: its rows, with the content of each file in `column`, and its name.

    `bit_depth` and `channels` are as in `load_image`.
    """

    rows: "Dataset"
    column: str
    name: str
    bit_depth: int | None = None
    channels: int | None = None

    def read(self, position: int) -> np.ndarray:
        return decode_image(self.open(position), self.place(position), None, self.bit_depth, self.channels)

    def open(self, position: int) -> BinaryIO:
        """The file of an image."""
        cell = self.rows[int(position)][self.column]
        if cell is None:
            raise UserError(f"{self.place(position)}: holds no picture; remove the row")
        if cell["bytes"] is not None:
            return io.BytesIO(cell["bytes"])
        try:
            with open(cell["path"], "rb") as file:
                return io.BytesIO(file.read())
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{self.place(position)}: its file {cell['path']} cannot be read ({reason})") from error

    def place(self, position: int) -> str:
        return f"{self.name}[{position}]"


def load_huggingface(config: DataConfig) -> tuple[dict[str, ImageSet], list[str], list[str]]:
    """Opens a set; its pictures stay in their files.

    Returns:
        The images of each split, by "train", "val" and "test", or "train" alone; the class names; and lines on ignored
        parts.

    Raises:
        UserError: The set cannot be read, or a column is missing or ambiguous.
    """
    require_module("datasets")
    opened = _opened(config.root)
    parts = opened if isinstance(opened, dict) else {"train": opened}
    if len(parts) == 1:
        parts = {"train": next(iter(parts.values()))}
    splits: dict[str, Dataset] = {}
    notes = []
    for name, rows in parts.items():
        split = split_of(name)
        if split is None or split in splits or not len(rows):
            reason = "its name is no split's" if split is None else f"{split} is there already"
            reason = reason if len(rows) else "it has no rows"
            notes.append(f"{config.root}: {name}: ignored: {reason}")
        else:
            splits[split] = rows
    if not splits:
        of_rows = " and has rows" if not all(map(len, parts.values())) else ""
        raise UserError(
            f"{config.root}: none of its splits {', '.join(parts)} is train, val or test{of_rows}; rename them"
        )
    main = splits.get("train") or next(iter(splits.values()))
    picture = _picture_column(config, main)
    label = None if config.table.columns is not None else _label_column(config, main)
    for split, rows in splits.items():
        if missing := {picture, label or picture} - set(rows.column_names):
            raise UserError(f"{config.root}: {split} has no column {min(missing)}, which {main.split} has; add it")
    if label is None:
        classes, numbers = _flags_by_column(config, splits, main, picture)
    else:
        classes, numbers = _numbered(config, splits, main, label)
    sets = {}
    for split, labels in numbers.items():
        is_missing = (labels == _NO_LABEL).reshape(len(labels), -1).any(1)
        if is_missing.all() and len(numbers) > 1:
            notes.append(f"{config.root}: {split}: ignored: it has no labels")
            continue
        if is_missing.any():
            row = int(np.flatnonzero(is_missing)[0])
            raise UserError(f"{config.root}: row {row} of {split} has no label; label it, or remove it")
        sets[split] = ImageSet.all_of(_images_of(config.root, split, splits[split], picture), labels)
    if "train" in sets:
        require_training_of_each(config.root, sets, classes)
    return sets, classes, notes


def _opened(root: str) -> "Dataset | dict[str, Dataset]":
    import datasets

    folder = Path(root)
    name, _, config = root.partition(":")
    try:
        if is_saved_dataset(folder):
            return datasets.load_from_disk(folder)
        if folder.is_dir():
            if not is_huggingface(folder):
                raise UserError(
                    f"data.root={root}: holds neither what save_to_disk writes nor Parquet files; give the right folder"
                )
            return datasets.load_dataset(os.fspath(folder))
        if folder.exists() or name.count("/") > 1 or folder.is_absolute():
            raise UserError(
                f"data.root={root}: no such folder, and no set of this name on the hub; give a folder, or USER/NAME"
            )
        return datasets.load_dataset(name, config or None)
    except UserError:
        raise
    except Exception as error:  # the library may raise any type
        reason = (" ".join(str(error).split()) or type(error).__name__)[:300]
        raise UserError(
            f"data.root={root}: cannot be read by datasets ({reason}); give a folder that save_to_disk wrote, one of "
            "Parquet files, or a set of the hub as USER/NAME or USER/NAME:CONFIG"
        ) from error


def _picture_column(config: DataConfig, rows: "Dataset") -> str:
    """The column of pictures: the named one, or else the only one."""
    import datasets

    given, held = config.table.path, [name for name, kind in rows.features.items() if _holds_pictures(kind)]
    if given is not None:
        _require_column(config, "path", given, rows)
        if given not in held:
            raise UserError(f"data.table.path={given}: this column of {config.root} holds no pictures")
        return given
    typed = [name for name in held if isinstance(rows.features[name], datasets.Image)] or held
    if len(typed) > 1:
        raise UserError(f"{config.root}: both {typed[0]} and {typed[1]} hold pictures; name one as data.table.path")
    if not typed:
        raise UserError(f"{config.root}: no column holds pictures; it has {', '.join(rows.column_names)}")
    return typed[0]


def _holds_pictures(kind: Any) -> bool:
    """Whether a column holds pictures, or file contents without the type of pictures."""
    import datasets

    is_struct = isinstance(kind, dict) and set(kind) == {"bytes", "path"}
    is_binary = isinstance(kind, datasets.Value) and kind.dtype in ("binary", "large_binary")
    return isinstance(kind, datasets.Image) or is_struct or is_binary


def _label_column(config: DataConfig, rows: "Dataset") -> str:
    """The column of labels: the named one, one with a known name, or else the only one with classes."""
    given = config.table.label
    if given is not None:
        _require_column(config, "label", given, rows)
        return given
    found = [name for name in rows.column_names if name.lower() in _LABELS]
    found = found or [name for name, kind in rows.features.items() if _classes_of(kind) is not None]
    if len(found) > 1:
        raise UserError(f"{config.root}: both {found[0]} and {found[1]} may be the label; name one as data.table.label")
    if not found:
        names = ", ".join(rows.column_names)
        raise UserError(f"{config.root}: no column is named label or so; it has {names}; name one as data.table.label")
    return found[0]


def _require_column(config: DataConfig, role: str, given: str, rows: "Dataset") -> None:
    if given not in rows.column_names:
        hint = nearest(given, rows.column_names)
        raise UserError(
            f"data.table.{role}={given}: {config.root} has no such column; it has {', '.join(rows.column_names)}"
            + (f"; {hint}" if hint else "")
        )


def _numbered(
    config: DataConfig, splits: "Mapping[str, Dataset]", main: "Dataset", column: str
) -> tuple[list[str], dict[str, np.ndarray]]:
    """The class names, and each split's labels: (n,) numbers, or (n, classes) of 0 and 1 where an image may have
    several. `_NO_LABEL` stands where a cell is empty.
    """
    root, kind = config.root, main.features[column]
    is_several = config.table.separator is not None or _is_list(kind)
    cells = {}
    for split, rows in splits.items():
        place = f"{root}: {split}"
        cells[split] = _labels_of(place, rows, column, kind, config.table.separator)
        is_empty = all(each is None for each in cells[split])
        if config.table.separator is None and _is_list(rows.features[column]) != is_several and not is_empty:
            raise UserError(f"{root}: column {column} holds lists in one split and one label in another; mend it")
    known = {each for part in cells.values() for cell in part for each in cell or ()}
    if len({isinstance(each, str) for each in known}) > 1:
        raise UserError(f"{root}: column {column} holds texts in one split and numbers in another; write both alike")
    classes = _classes_of(kind)
    ordered = sorted(known) if classes is None else list(classes.names)
    if is_several and not known:
        raise UserError(f"{root}: no picture has a label in column {column}; fill it in")
    number = {each: index for index, each in enumerate(ordered)}
    labels = {}
    for split, part in cells.items():
        unknown = next((each for cell in part for each in cell or () if each not in number), None)
        if unknown is not None:
            first = "train" if "train" in splits else next(iter(splits))
            raise UserError(f"{root}: class {unknown!r} of {split} is none of the classes of {first}; mend its name")
        if is_several:
            labels[split] = flags_of([cell or () for cell in part], ordered)
            labels[split][[cell is None for cell in part]] = _NO_LABEL
        else:
            labels[split] = np.array([_NO_LABEL if cell is None else number[cell[0]] for cell in part])
    return [str(each) for each in ordered], labels


def _labels_of(
    place: str, rows: "Dataset", column: str, main: Any, separator: str | None
) -> list[Sequence[str | int] | None]:
    """The labels of each image of a split: by name where they are of classes, in the split's own order of them or else
    that of the feature `main`; None where a cell is empty.
    """
    kind, cells = rows.features[column], rows[column][:]
    if separator is not None:
        if not all(each is None or isinstance(each, str) for each in cells):
            raise UserError(
                f"data.table.separator: column {column} of {place} holds {kind}, and no texts; leave the separator out"
            )
        return [None if each is None else labels_in(each, separator) for each in cells]
    is_list = _is_list(kind)
    labels = cells if is_list else [None if each is None else [each] for each in cells]
    flat = [each for cell in labels for each in cell or ()]
    if not all(isinstance(each, str | int) for each in flat):
        raise UserError(f"{place}: column {column} holds {kind}; a label must be a text or a whole number")
    for row, cell in enumerate(labels if is_list else ()):
        if cell and isinstance(cell[0], int) and len(set(cell)) < len(cell):
            raise UserError(
                f"{place}: row {row}: column {column} repeats a number; a list must hold the classes of its picture, "
                "not a 0 or 1 per class"
            )
    classes = _classes_of(kind) or _classes_of(main)
    if classes is None or any(isinstance(each, str) for each in flat):
        return labels
    if not is_list:  # competitions write it instead of a label
        labels = [None if cell == [_NO_LABEL] else cell for cell in labels]
    numbers = dict(enumerate(classes.names))
    if unknown := {each for cell in labels for each in cell or ()} - set(numbers):
        raise UserError(f"{place}: label {min(unknown)} is of none of the {len(classes.names)} classes; mend it")
    return [None if cell is None else [numbers[each] for each in cell] for cell in labels]


def _is_list(kind: Any) -> bool:
    """Whether the cells of a column are lists. The library has several types for them."""
    return hasattr(kind, "feature")


def _classes_of(kind: Any) -> Any:
    """The `ClassLabel` of a column's cells or of its lists' items, or None."""
    import datasets

    held = getattr(kind, "feature", kind)
    return held if isinstance(held, datasets.ClassLabel) else None


def _flags_by_column(
    config: DataConfig, splits: "Mapping[str, Dataset]", main: "Dataset", picture: str
) -> tuple[list[str], dict[str, np.ndarray]]:
    """The class names, and whether each image has each, (n, classes) int8 per split, from a column per class."""
    names = config.table.columns or []
    if names == "others":
        names = [name for name in main.column_names if name != picture]
    labels = {}
    for split, rows in splits.items():
        table = {name: [] for name in rows.column_names}  # all names, for hints on mistyped ones
        for name in names:
            if name in table and name != picture:
                table[name] = [cell_text(cell) for cell in rows[name][:]]
        places = [f"row {row}" for row in range(len(rows))]
        columns = TableConfig(columns=list(names))
        _, labels[split] = labels_of_columns(f"{config.root}: {split}", table, columns, [picture], places)
    return list(names), labels


def _images_of(root: str, split: str, rows: "Dataset", column: str) -> HuggingFaceImages:
    import datasets

    pictures = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return HuggingFaceImages(pictures, column, f"{root}:{split}")
