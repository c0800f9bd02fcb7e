"""Reads tables of pictures: a CSV, TSV or Parquet file with a row per picture, with its path and its label."""

import csv
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vmoe.data.config import DataConfig, TableConfig, nearest
from vmoe.data.folders import split_of
from vmoe.data.imageset import FileImages, ImageSet, flags_of, require_training_of_each
from vmoe.errors import UserError
from vmoe.extras import require_module
from vmoe.text import counted

# Known names of columns, ignoring case
_KNOWN_COLUMNS = {
    "path": ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img"),
    "label": ("label", "class", "class_name", "target", "category", "y"),
    "split": ("split", "set", "subset", "partition"),
}

Table = dict[str, list[str]]  # the cells of each column


def load_table(config: DataConfig) -> tuple[dict[str, ImageSet], list[str]]:
    """Reads the rows of a table. A path that is not absolute is below the table's folder.

    Returns:
        The images of each split, by "train", "val" and "test", or "train" alone without a column of splits; and the
        class names, sorted, with integers by value.

    Raises:
        UserError: The table, a picture, a column, a path, a label or a split is missing. The message names the row.
    """
    path, columns = Path(config.root), config.table
    table, places = _read_table(path, columns)
    found = [_name_of(path, list(table), role, columns) for role in _roles(columns)]
    used = [name for name in found if name is not None]
    if len(set(used)) < len(used):
        raise UserError(f"data.table: one column of {path} cannot be two of path, label and split; name another")
    cells = {role: None if name is None else table[name] for role, name in zip(_roles(columns), found, strict=True)}
    paths, splits = cells["path"], cells["split"]
    assert paths is not None  # `_name_of` has checked it
    if not paths:
        raise UserError(f"{path}: has no row below its header; add one for each picture")
    _require_cells(path, {"path": paths}, places)
    if columns.columns is not None:
        names, labels = labels_of_columns(path, table, columns, used, places)
    elif columns.separator is not None:
        names, labels = _labels_of_cells(path, cells["label"] or [], columns.separator)
    else:
        more = ", or give data.table.separator where a picture may have several labels, or none"
        _require_cells(path, {"label": cells["label"] or []}, places, more)
        names, labels = _one_label_each(cells["label"] or [])
    files = _picture_files(path, paths, places)
    rows = _rows_of_splits(path, splits, places)
    sets = {
        split: ImageSet.all_of(FileImages([files[row] for row in chosen]), labels[chosen])
        for split, chosen in rows.items()
    }
    if "train" in sets:
        require_training_of_each(path, sets, names)
    return sets, names


def _read_table(path: Path, columns: TableConfig) -> tuple[Table, list[str]]:
    """The table's columns by name, with all cells as text, and a name for each row, such as "line 2"."""
    if not path.is_file():
        tables = [file for pattern in ("*.csv", "*.tsv", "*.parquet") for file in path.glob(pattern)]
        hint = f"it is a folder that holds {', '.join(sorted(file.name for file in tables))}" if tables else ""
        raise UserError(
            f"data.root={path}: for 'table' this must be the table itself; {hint or 'there is no such file'}"
        )
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path, columns)
    try:
        # utf-8-sig: spreadsheets write a byte order mark before the first name
        with open(path, newline="", encoding="utf-8-sig") as file:
            first = next((line for line in file if line.strip()), "")
            file.seek(0)
            rows = csv.reader(file, delimiter=_separator(first), skipinitialspace=True, strict=True)
            header = [name.strip() for name in next((row for row in rows if row), [])]
            cells, places = [], []
            for row in rows:
                if row:
                    cells.append(row)
                    places.append(f"line {rows.line_num}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read as a table ({reason}); save it as CSV in UTF-8") from error
    for name in header:
        if header.count(name) > 1:
            raise UserError(f"{path}: has two columns named {name!r}; rename one, or leave it out")
    for place, row in zip(places, cells, strict=True):
        if len(row) != len(header):
            raise UserError(
                f"{path}: {place} has {counted(len(row), 'cell')}, but the header has {len(header)}; quote cells "
                "that hold the separator"
            )
    return {name: [row[index].strip() for row in cells] for index, name in enumerate(header)}, places


def _separator(header: str) -> str:
    """The separator of cells. Spreadsheets of some languages write semicolons into a CSV file, and some tools tabs."""
    return max(",;\t", key=header.count)


def _read_parquet(path: Path, columns: TableConfig) -> tuple[Table, list[str]]:
    require_module("pyarrow")
    import pyarrow
    from pyarrow import parquet

    try:
        names = parquet.read_schema(path).names
        found = [_name_of(path, names, role, columns) for role in _roles(columns)]
        of_classes = names if columns.columns == "others" else [name for name in columns.columns or [] if name in names]
        chosen = list(dict.fromkeys([*(name for name in found if name is not None), *of_classes]))
        table = parquet.read_table(path, columns=chosen)
        for name in chosen:
            kind = table.schema.field(name).type
            if pyarrow.types.is_nested(kind) or pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind):
                raise UserError(f"{path}: column {name} holds {kind}; it must hold texts or numbers")
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot be read as a Parquet file ({reason}); write it again") from error
    cells = {name: [cell_text(cell) for cell in table.column(name).to_pylist()] for name in chosen}
    return cells, [f"row {row}" for row in range(1, table.num_rows + 1)]


def cell_text(cell: object) -> str:
    """A cell as text: empty for a missing value, and an integer without a decimal point."""
    if cell is None or cell != cell:
        return ""
    return str(int(cell) if isinstance(cell, float) and cell.is_integer() else cell).strip()


def _name_of(path: Path, names: Sequence[str], role: str, columns: TableConfig) -> str | None:
    """The column with a picture's "path", "label" or "split"; None if there is no column of splits."""
    given = getattr(columns, role)
    if given is not None:
        if given not in names:
            hint = nearest(given, names)
            raise UserError(
                f"data.table.{role}={given}: {path} has no such column; it has {', '.join(names)}"
                + (f"; {hint}" if hint else "")
            )
        return given
    found = [name for name in names if name.strip().lower() in _KNOWN_COLUMNS[role]]
    if len(found) > 1:
        raise UserError(f"{path}: both {found[0]} and {found[1]} may be the {role}; name one as data.table.{role}")
    if not found and role != "split":
        raise UserError(
            f"{path}: no column is named {', '.join(_KNOWN_COLUMNS[role][:3])} or so; it has "
            f"{', '.join(names) or 'none'}; rename one, or name it as data.table.{role}"
        )
    return found[0] if found else None


def _require_cells(path: Path, cells: Table, places: Sequence[str], advice: str = "") -> None:
    for role, column in cells.items():
        empty = [place for place, cell in zip(places, column, strict=True) if not cell or "\0" in cell]
        if empty:
            more = f", and {len(empty) - 1} others" if len(empty) > 1 else ""
            raise UserError(
                f"{path}: {empty[0]}{more}: the {role} is empty or no text; fill it in, or remove the row{advice}"
            )


def _picture_files(path: Path, paths: Sequence[str], places: Sequence[str]) -> list[str]:
    """The files of all rows, after checking that each exists and occurs once."""
    files, missing, first = [], [], {}
    for each, place in zip(paths, places, strict=True):
        file = str(path.parent / os.path.expanduser(each))
        files.append(file)
        try:
            found = os.stat(file)
        except OSError:
            missing.append(place)
            continue
        if not stat.S_ISREG(found.st_mode):
            missing.append(place)
        elif (known := first.setdefault((found.st_dev, found.st_ino), place)) != place:  # the same file under any path
            raise UserError(f"{path}: {known} and {place} are the same picture, {file}; keep one")
    if missing:
        more = f", and {len(missing) - 1} others" if len(missing) > 1 else ""
        lost = files[places.index(missing[0])]
        raise UserError(f"{path}: {missing[0]}{more}: there is no file {lost}; mend the path")
    return files


def _roles(columns: TableConfig) -> list[str]:
    """The columns that a table must or may have, beside those of 0 and 1."""
    return [role for role in _KNOWN_COLUMNS if role != "label" or columns.columns is None]


def _one_label_each(labels: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The class names, and each row's class, (n,) int64."""
    names = _sorted_names(labels)
    number = {name: index for index, name in enumerate(names)}
    return names, np.array([number[label] for label in labels])


def _labels_of_cells(path: Path, cells: Sequence[str], separator: str) -> tuple[list[str], np.ndarray]:
    """The class names, and labels (n, classes) int8 of 0 and 1, from cells such as "cat|dog"."""
    found = [labels_in(cell, separator) for cell in cells]
    names = _sorted_names([label for labels in found for label in labels])
    if not names:
        raise UserError(f"{path}: no picture has a label; fill the column in")
    return names, flags_of(found, names)


def labels_in(cell: str, separator: str) -> list[str]:
    """The labels in a cell such as "cat|dog", each once. An empty cell has none."""
    return list(dict.fromkeys(label for part in cell.split(separator) if (label := part.strip())))


def labels_of_columns(
    path: Path | str, table: Table, columns: TableConfig, used: Sequence[str], places: Sequence[str]
) -> tuple[list[str], np.ndarray]:
    """The class names, and labels (n, classes) int8 of 0 and 1, from a column per class.

    Raises:
        UserError: A column is missing, or a cell is neither 0 nor 1. The message names the row.
    """
    names = [name for name in table if name not in used] if columns.columns == "others" else list(columns.columns or [])
    if not names:
        raise UserError(f"data.table.columns: {path} has no column beside path and split; add one per class")
    labels = np.zeros((len(places), len(names)), dtype=np.int8)
    for index, name in enumerate(names):
        if name not in table:
            hint = nearest(name, table)
            raise UserError(f"data.table.columns: {path} has no column {name}; {hint or 'mend its name'}")
        if name in used:
            raise UserError(f"data.table.columns: {name} is the path or the split of {path}; leave it out")
        for row, cell in enumerate(table[name]):
            if cell not in ("0", "1", "0.0", "1.0", "True", "False", "true", "false"):
                raise UserError(
                    f"{path}: {places[row]}: column {name} holds {cell!r}; a column per class must hold 0 or 1 "
                    "(data.table.columns names them)"
                )
            labels[row, index] = cell in ("1", "1.0", "True", "true")
    return names, labels


def _sorted_names(labels: Sequence[str]) -> list[str]:
    """The distinct labels, sorted; integers by value."""
    names = set(labels)
    is_numbered = all(name.isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name), name) if is_numbered else name)


def _rows_of_splits(path: Path, splits: Sequence[str] | None, places: Sequence[str]) -> dict[str, list[int]]:
    if splits is None:
        return {"train": list(range(len(places)))}
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(splits):
        split = split_of(name)
        if split is None:
            raise UserError(f"{path}: {places[row]}: split {name!r} is none of train, val and test; mend it")
        rows.setdefault(split, []).append(row)
    return {split: rows[split] for split in ("train", "val", "test") if split in rows}
