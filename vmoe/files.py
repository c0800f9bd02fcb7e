"""Writing files so that nobody ever sees half of one."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vmoe.errors import UserError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` on success and removes it on an error.

    The folder is created when missing. The temporary name keeps the suffix of `path`, by which libraries choose a
    format.

    Raises:
        UserError: the folder cannot be created or written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from error
    finally:
        with suppress(OSError):  # such as a folder that is a file: the first error is the one to tell
            temporary.unlink(missing_ok=True)


def replace(temporary: Path, path: Path) -> None:
    """Puts a file or folder in the place of another, of either kind; on the way nothing that is half written."""
    old = path.with_name(f".{path.name}.old")
    if path.is_dir():  # which no system call replaces at once
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
    elif temporary.is_dir():
        path.unlink(missing_ok=True)
    os.replace(temporary, path)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: str | Path, content: Any) -> None:
    """Writes `content` as indented JSON, atomically. Not-a-number is refused: it is not JSON."""
    text = json.dumps(content, indent=2, allow_nan=False)
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
