"""Tables of pictures: a CSV, TSV or Parquet file with a row per picture, its path and its label."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from vmoe.data.config import DataConfig, TableConfig, nearest
from vmoe.data.folders import split_of
from vmoe.data.image_files import require_regular
from vmoe.data.imageset import FileImages, ImageSet
from vmoe.errors import UserError
from vmoe.extras import require_module
from vmoe.text import counted

# The names that a column is found by, in any case
_KNOWN_COLUMNS = {
    "path": ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img"),
    "label": ("label", "class", "class_name", "target", "category", "y"),
    "split": ("split", "set", "subset", "partition"),
}
_LARGEST_FIELD = 2**20  # characters of a CSV cell: what is larger is no path and no label

Table = dict[str, list[str]]


def load_table(config: DataConfig) -> tuple[dict[str, ImageSet], list[str]]:
    """Reads the rows of a table. A path that is not absolute is below the table's folder.

    Returns:
        The images of each split, by "train", "val" and "test", or "train" alone where no column names a split; and the
        class names, sorted, whole numbers by their value.

    Raises:
        UserError: the table or a picture is missing, or a column, a path, a label or a split is; the line names the
            row.
    """
    path, columns = Path(config.root), config.table
    table = _read(path, columns)
    paths, labels, splits = (_column(path, table, role, columns) for role in _KNOWN_COLUMNS)
    if paths is None or labels is None:  # `_column` has refused that
        raise AssertionError
    if not paths:
        raise UserError(f"{path}: has no row below its header; add one for each picture")
    _require_cells(path, {"path": paths, "label": labels})
    files = _files(path, paths)
    _refuse_twice(path, files)
    names = _sorted_names(labels)
    number = {name: index for index, name in enumerate(names)}
    rows = _rows_of_splits(path, splits, len(files))
    sets = {
        split: ImageSet.all_of(FileImages([files[row] for row in chosen]), [number[labels[row]] for row in chosen])
        for split, chosen in rows.items()
    }
    if "train" in sets:
        _refuse_unknown_classes(path, sets, names)
    return sets, names


def _read(path: Path, columns: TableConfig) -> Table:
    """The table's columns by name, all cells as text."""
    if not path.is_file():
        tables = [file for pattern in ("*.csv", "*.tsv", "*.parquet") for file in path.glob(pattern)]
        hint = f"it is a folder that holds {', '.join(sorted(file.name for file in tables))}" if tables else ""
        raise UserError(
            f"data.root={path}: for 'table' this must be the table itself; {hint or 'there is no such file'}"
        )
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path, columns)
    try:
        # utf-8-sig: spreadsheets write a mark before the first name
        with open(path, newline="", encoding="utf-8-sig") as file:
            csv.field_size_limit(_LARGEST_FIELD)
            first = file.readline()
            file.seek(0)
            rows = csv.reader(file, delimiter=_separator(path, first), strict=True)
            header = [name.strip() for name in next(rows, [])]
            cells = [row for row in rows if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read as a table ({reason}); save it as CSV in UTF-8") from error
    for name in header:
        if header.count(name) > 1:
            raise UserError(f"{path}: has two columns named {name!r}; rename one, or leave it out")
    for number, row in enumerate(cells, start=2):
        if len(row) != len(header):
            raise UserError(
                f"{path}: row {number} has {counted(len(row), 'cell')}, but the header has {len(header)}; quote cells "
                "that hold the separator"
            )
    return {name: [row[index].strip() for row in cells] for index, name in enumerate(header)}


def _separator(path: Path, header: str) -> str:
    """Spreadsheets of some languages separate the cells of a CSV file by semicolons."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    return ";" if ";" in header and "," not in header else ","


def _read_parquet(path: Path, columns: TableConfig) -> Table:
    require_module("pyarrow")
    import pyarrow
    from pyarrow import parquet

    try:
        names = parquet.read_schema(path).names
        chosen = [name for role in _KNOWN_COLUMNS if (name := _name_of(path, names, role, columns)) is not None]
        table = parquet.read_table(path, columns=chosen)
        for name in chosen:
            if pyarrow.types.is_nested(table.schema.field(name).type):
                raise UserError(f"{path}: column {name} holds no texts or numbers; give the paths of picture files")
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot be read as a Parquet file ({reason}); write it again") from error
    return {
        name: ["" if cell is None else str(cell).strip() for cell in table.column(name).to_pylist()] for name in chosen
    }


def _column(path: Path, table: Table, role: str, columns: TableConfig) -> list[str] | None:
    name = _name_of(path, list(table), role, columns)
    return None if name is None else table[name]


def _name_of(path: Path, names: Sequence[str], role: str, columns: TableConfig) -> str | None:
    """The column that holds a picture's "path", "label" or "split"; None for a split that no column has."""
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


def _require_cells(path: Path, cells: Table) -> None:
    for role, column in cells.items():
        empty = [row for row, cell in enumerate(column, start=2) if not cell or "\0" in cell]
        if empty:
            more = f", and {len(empty) - 1} others" if len(empty) > 1 else ""
            raise UserError(
                f"{path}: row {empty[0]}{more}: the {role} is empty or no text; fill it in, or remove the row"
            )


def _files(path: Path, paths: Sequence[str]) -> list[str]:
    # One name for a file, so that a picture of two splits is found however its path is written
    files = [os.path.normpath(path.parent / os.path.expanduser(each)) for each in paths]
    missing = [row for row, file in enumerate(files) if not os.path.isfile(file)]
    if missing:
        first = missing[0]
        require_regular(files[first])
        more = f", and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise UserError(f"{path}: row {first + 2}{more}: there is no file {files[first]}; mend the path")
    return files


def _refuse_twice(path: Path, files: Sequence[str]) -> None:
    first: dict[str, int] = {}
    for row, file in enumerate(files, start=2):
        if first.setdefault(file, row) != row:
            raise UserError(f"{path}: rows {first[file]} and {row} are the same picture, {file}; keep one")


def _sorted_names(labels: Sequence[str]) -> list[str]:
    names = set(labels)
    is_numbered = all(name.isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name), name) if is_numbered else name)


def _rows_of_splits(path: Path, splits: Sequence[str] | None, count: int) -> dict[str, list[int]]:
    if splits is None:
        return {"train": list(range(count))}
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(splits):
        split = split_of(name)
        if split is None:
            raise UserError(f"{path}: row {row + 2}: split {name!r} is none of train, val and test; mend it")
        rows.setdefault(split, []).append(row)
    return {split: rows[split] for split in ("train", "val", "test") if split in rows}


def _refuse_unknown_classes(path: Path, sets: dict[str, ImageSet], names: Sequence[str]) -> None:
    trained = set(sets["train"].labels.tolist())
    for split, part in sets.items():
        unknown = sorted(set(part.labels.tolist()) - trained)
        if unknown:
            raise UserError(f"{path}: class {names[unknown[0]]!r} of {split} has no training picture; add one")
