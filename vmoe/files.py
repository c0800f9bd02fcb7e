"""Writes files atomically, so that no half-written file is ever visible."""

import csv
import errno
import glob
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vmoe.errors import UserError


@contextmanager
def atomic_write(path: str | Path, replaces_folder: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` on success and removes it on an error.

    It creates the folder if needed. The temporary name keeps the suffix of `path`, because libraries choose a format by
    it.

    Args:
        path: The file.
        replaces_folder: Whether to replace a folder at `path` with all its content, such as a sharded checkpoint.

    Raises:
        UserError: `path` is a folder, or its folder cannot be created or written.
    """
    path = Path(path)
    if not replaces_folder:
        require_no_folder(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    with writing(path), folder_for(path):
        try:
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # the mode of new files: safetensors makes files that nobody else may read
            with open(temporary, "rb+") as written:
                os.fsync(written.fileno())
            replace(temporary, path)
        finally:
            with suppress(OSError):  # the first error is the one to report
                temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turns errors of any library that writes a file or folder into a UserError.

    Raises:
        UserError: The file system refuses, for example because the disk is full.
    """
    try:
        yield
    except Exception as error:
        reason = why_not_written(error)
        if reason is None:
            raise
        if (other := _other_file(error, Path(path))) is not None:
            raise UserError(f"{other}: cannot be opened ({reason})") from error
        raise UserError(f"{path}: cannot be written ({reason}); choose another place") from error


def _other_file(error: Exception, path: Path) -> str | None:
    """The file of an error about another file, such as one to be read; None if it is about writing `path`."""
    name = getattr(error, "filename", None)
    if not isinstance(name, str):
        return None
    file, target = Path(name).absolute(), path.absolute()
    if file == target.parent or file in target.parents:
        return None
    if file.is_relative_to(target.parent):
        beside = file.relative_to(target.parent).parts[0]
        if beside == target.name or beside.startswith(f".{target.stem}"):  # the temporary file of `path`
            return None
    return name


def why_not_written(error: Exception) -> str | None:
    """The file system's reason, such as "No space left on device"; None for errors of another kind."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = str(error)
    if type(error).__name__ == "SafetensorError" and (found := re.search(r"\(os error (\d+)\)", text)):
        return os.strerror(int(found[1]))
    if isinstance(error, RuntimeError) and re.search("inline_container|PytorchStreamWriter", text):  # torch's zip files
        return (isinstance(error.__context__, OSError) and error.__context__.strerror) or "the file system failed"
    return None


@contextmanager
def folder_for(path: Path) -> Iterator[None]:
    """Makes the folder of `path`. On an error it removes what it has made."""
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in made:
            with suppress(OSError):  # such as a folder into which others have written meanwhile
                parent.rmdir()
        raise


def require_no_folder(*paths: str | Path) -> None:
    """Refuses paths of output files that are folders, so that no folder's content is lost.

    Raises:
        UserError: A path is a folder.
    """
    for path in map(Path, paths):
        if path.is_dir():
            raise UserError(f"{path}: is a folder, and a file is to be written; name a file, such as {path / 'NAME'}")


def require_writable(*paths: str | Path) -> None:
    """Checks, before long work, that folders can be written to. It creates nothing.

    Args:
        paths: Folders, which need not exist yet.

    Raises:
        UserError: A folder could not be created or written to.
    """
    for path in map(Path, paths):
        place = next(place for place in (path, *path.absolute().parents) if place.exists())
        problem = errno.ENOTDIR if not place.is_dir() else errno.EACCES if not os.access(place, os.W_OK) else None
        if problem is not None:
            raise UserError(f"{path}: cannot be written ({os.strerror(problem)}); choose another place")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path`. It is renamed to `path` on success and removed on an error.

    Raises:
        UserError: It cannot be written.
    """
    temporary = path.with_name(f".{path.name}.new")
    with writing(path), folder_for(path):
        try:
            _remove(temporary)
            temporary.mkdir()
            yield temporary
            replace(temporary, path)
        except UserError as error:  # about a file in the folder
            raise UserError(str(error).replace(str(temporary), str(path)), error.everywhere) from error
        finally:
            with suppress(OSError):  # the first error is the one to report
                _remove(temporary)


def replace(temporary: Path, path: Path) -> None:
    """Replaces a file or folder by another, of either kind, without half-written states.

    If one of them is a folder, a kill at the wrong moment leaves the old one under a temporary name: see `recover`.
    """
    if path.exists() and (path.is_dir() or temporary.is_dir()):  # no system call replaces a folder at once
        _remove(aside(path))
        os.rename(path, aside(path))
    os.replace(temporary, path)
    _remove(aside(path))


def is_aside(path: Path) -> bool:
    """Whether `recover` would restore something."""
    return aside(path).exists() and not path.exists()


def recover(path: Path) -> None:
    """Restores the old file or folder if `replace` was killed before it had put the new one in place."""
    if is_aside(path):
        os.rename(aside(path), path)


def remove_leftovers(path: Path) -> None:
    """Removes temporary files that a process killed in `atomic_write` has left. No process may be writing the file."""
    for file in path.parent.glob(f".{glob.escape(path.stem)}.*{glob.escape(path.suffix)}"):
        if file.name.removeprefix(f".{path.stem}.").removesuffix(path.suffix).isdecimal():
            file.unlink(missing_ok=True)


def aside(path: Path) -> Path:
    """The path to which `replace` moves the old `path` until the new one is in place."""
    return path.with_name(f".{path.name}.old")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str, errors: str = "strict") -> None:
    """Writes a text file in UTF-8, atomically. `errors` is as in `open`."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors)


def write_csv(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows, atomically, with a column for each key of any row. A list becomes space-separated words."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: " ".join(map(str, v)) if isinstance(v, list) else v for key, v in row.items()})
    write_text(path, text.getvalue(), "surrogateescape")  # file names may be invalid UTF-8


def write_arrays(path: str | Path, arrays: dict[str, Any]) -> None:
    """Writes arrays as one .npz file, atomically, under this very name."""
    import numpy as np  # here: reading a config does not need it

    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def write_json(path: str | Path, content: Any) -> None:
    """Writes `content` as indented JSON, atomically. It refuses NaN, which is no JSON."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
