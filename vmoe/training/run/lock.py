"""The lock of a run's folder, which one process at a time may use. A lock of a process that ended is taken over."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vmoe.errors import UserError

try:
    import fcntl
except ModuleNotFoundError:  # on Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
BEAT = 20.0  # seconds between two touches of the lock by its holder
PATIENCE = 100.0  # seconds to wait for a touch from another machine; caches of network file systems take up to 60


@contextmanager
def locked(folder: Path, log: Callable[[str], object], command: str) -> Iterator[None]:
    """Locks a run's folder against other processes. It creates the folder, and removes it again if it stays empty.

    A lock of a process that has ended is taken over. On this machine the process is looked up. A living process on
    another machine touches its lock, so this waits for a touch.

    Args:
        folder: The folder.
        log: Called with a line if this waits.
        command: The command line that another process would print.

    Raises:
        UserError: Another process, which the message names, has the folder; or it cannot be written.
    """
    new = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    path = folder / LOCK
    own = json.dumps(_identity(command))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _acquire(path, own, log)
    except OSError as error:
        _remove_empty(new)
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); choose another place") from error
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, ended), name="lock", daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        with suppress(OSError):
            if path.read_text(encoding="utf-8") == own:
                path.unlink()
        _remove_empty(new)


def _acquire(path: Path, own: str, log: Callable[[str], object]) -> None:
    """Writes the lock, unless a living process has it.

    Raises:
        UserError: A living process has it.
    """
    gone: str | None = None  # content of a lock that its process elsewhere did not touch
    while True:
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8") as file:
            # on Windows, and on file systems without locks, two processes may take over at the same moment
            with suppress(OSError):
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(path, file.fileno()):
                continue
            found = file.read()
            holder = _parsed(found)
            is_alive = False if not found or found == gone else None if holder is None else _is_alive(holder)
            if is_alive:
                raise UserError(_refusal(path, holder))
            if is_alive is False:
                try:
                    file.seek(0)
                    file.truncate()
                    file.write(own)
                    file.flush()
                except OSError:
                    path.unlink(missing_ok=True)
                    raise
                return
        who = "an unreadable lock" if holder is None else f"process {holder['pid']} on {holder['host']}"
        log(f"{path}: is held by {who}; waits {PATIENCE:.0f} s for a sign of life of it")
        if _shows_life(path, found):
            raise UserError(_refusal(path, holder))
        gone = found


def _shows_life(path: Path, content: str) -> bool:
    """Waits for a touch of the lock by its holder, and returns whether one came."""
    before, end = _touched(path), time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(min(1.0, PATIENCE / 10))
        with suppress(OSError):
            if path.read_text(encoding="utf-8") != content:
                return False  # another process has the lock now, or none
        if _touched(path) != before:
            return True
    return False


def _touched(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):
            os.utime(path)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is still the file at `path`. Its holder may have removed it meanwhile."""
    try:
        there = path.stat()
    except OSError:
        return False
    own = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)


def _refusal(path: Path, holder: dict[str, Any] | None) -> str:
    if holder is None:
        return f"{path}: is touched by a process that it does not name; give another --output_dir, or remove the file"
    return (
        f"--output_dir {path.parent}: process {holder['pid']} on {holder['host']} trains there since {holder['since']} "
        f"({holder['command']}); wait for it or stop it, or give another folder"
    )


def _identity(command: str) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "machine": _machine(),
        "started": _start_of(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": command[:200],
    }


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        holder = json.loads(text)
    except ValueError:
        return None
    return holder if isinstance(holder, dict) and _identity("").keys() <= holder.keys() else None


def _is_alive(holder: dict[str, Any]) -> bool | None:
    """Whether the holder's process lives; None if this machine cannot know."""
    if (holder["host"], holder["machine"]) != (socket.gethostname(), _machine()):
        return None
    if not _is_there(holder["pid"]):
        return False
    return holder["started"] == _start_of(holder["pid"])  # if they differ, another process has its number now


def _is_there(pid: int) -> bool:
    if fcntl is None:  # on Windows, where os.kill would interrupt the process
        import psutil

        return psutil.pid_exists(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def _machine() -> str:
    """An identifier of this machine since its boot and of this container's processes."""
    parts = []
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _start_of(pid: int) -> str | None:
    """The start time of a process in the system's own units, or None if unknown."""
    if fcntl is None:  # on Windows
        import psutil

        with suppress(psutil.Error):
            return str(psutil.Process(pid).create_time())
        return None
    try:
        words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return words[19]
    except (OSError, IndexError):
        return None


def _remove_empty(folders: list[Path]) -> None:
    """Removes empty folders, the innermost first."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
