"""Lists files at addresses of fsspec, such as hf://, s3:// and https://, and reads parts of them."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TypeVar

from vmoe.errors import UserError
from vmoe.extras import require_module

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Answer = TypeVar("Answer")
_WAITS = (1, 2, 4)  # seconds before each retry
_SCANNED_AT_ONCE = 8 * 2**20  # bytes
_OF_NO_FILE = (403, 404, 410)  # HTTP status codes; a bucket that must not be listed gives the first
_OF_LATER = (408, 425, 429)  # HTTP status codes worth a retry; others from 400 to 499 are final
# The file systems that this process has opened. A forked worker has to keep them: deleting them takes their connections
# out of the event loop of this process, and its next request waits for minutes.
_OPENED: "set[AbstractFileSystem]" = set()


class UnreachableError(UserError):
    """A remote file cannot be read. Unlike a damaged image it is not replaced by another."""


class RemoteFile(NamedTuple):
    """A file in a remote folder: its address, name, size in bytes, and a text that changes with its content."""

    address: str
    name: str
    size: int
    version: str


def is_address(root: object) -> bool:
    """Whether a text is an address and not a path."""
    return "://" in str(root)


def list_files(root: str) -> list[RemoteFile]:
    """The files directly in a folder, or those of an address with braces, by name.

    Raises:
        UnreachableError: They cannot be listed.
        UserError: Two of the addresses end in the same name, which an index cannot distinguish.
    """
    addresses = _without_braces(root)
    names = [address.rpartition("/")[2] for address in addresses or []]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise UserError(
            f"{root}: {names.count(repeated)} of these files are called {repeated}; give shards a name of their own, "
            "each, or train on one folder"
        )

    def listed(fs: "AbstractFileSystem", path: str) -> list[RemoteFile]:
        if addresses is not None:
            return [_file_at(address) for address in addresses]
        names = [each.rstrip("/").rpartition("/")[2] for each in fs.ls(path, detail=False)]
        return [_file_at(f"{root.rstrip('/')}/{name}") for name in sorted(set(names)) if name.endswith(".tar")]

    return _asked(root if addresses is None else addresses[0], listed)


def shard_folder(root: str) -> str:
    """The address of the folder that holds the files of `list_files`."""
    addresses = _without_braces(root)
    return root.rstrip("/") if addresses is None else addresses[0].rpartition("/")[0]


def read_whole(address: str) -> bytes | None:
    """A file's content, or None if there is no such file.

    Raises:
        UnreachableError: It cannot be read.
    """

    def read(fs: "AbstractFileSystem", path: str) -> bytes | None:
        try:  # without `exists`, which over HTTP reports a failing server as a missing file
            return fs.cat_file(path)
        except FileNotFoundError:
            return None
        except Exception as error:
            if getattr(error, "status", None) in _OF_NO_FILE:
                return None
            raise

    return _asked(address, read)


def read_part(address: str, start: int, size: int) -> bytes:
    """Reads `size` bytes of a file from `start` on.

    Raises:
        UnreachableError: They cannot be read.
    """

    def read(fs: "AbstractFileSystem", path: str) -> bytes:
        if "::" in address:  # a cache, which keeps opened files
            with fs.open(path, "rb") as file:
                file.seek(start)
                return file.read(size)
        return fs.cat_file(path, start=start, end=start + size)

    content = _asked(address, read)
    if len(content) != size:
        raise UnreachableError(
            f"{address}: {len(content)} bytes came where {size} were asked for, so its server gives no parts of files; "
            f"{_whole_files(address)}"
        )
    return content


def read_through(address: str, read: Callable[[BinaryIO], Answer]) -> Answer:
    """Passes a whole file to `read` and returns its result. If the network fails, it starts again.

    Raises:
        UnreachableError: The file cannot be read.
    """

    def ask(fs: "AbstractFileSystem", path: str) -> Answer:
        with fs.open(path, "rb", block_size=_SCANNED_AT_ONCE) as file:
            try:
                return read(file)
            except UserError:
                raise
            except ValueError as error:  # HTTP returned no part of the file, or another part
                raise UnreachableError(
                    f"{address}: its server gives no parts of files ({error}); {_whole_files(address)}"
                ) from error

    return _asked(address, ask)


def _whole_files(address: str) -> str:
    return f"give simplecache::{address.rpartition('/')[0]}, which keeps whole files here, or download them"


def _file_at(address: str) -> RemoteFile:
    def ask(fs: "AbstractFileSystem", path: str) -> RemoteFile:
        return RemoteFile(address, address.rpartition("/")[2], int(fs.info(path)["size"]), str(fs.ukey(path)))

    return _asked(address, ask)


def _without_braces(root: str) -> list[str] | None:
    """The addresses of braces such as train-{0000..0012}.tar; None without braces."""
    if "{" not in root:
        return None
    require_module("braceexpand")
    from braceexpand import UnbalancedBracesError, braceexpand

    try:
        return list(braceexpand(root))
    except UnbalancedBracesError as error:
        raise UserError(f"{root}: its braces are not balanced; write them as in train-{{0000..0012}}.tar") from error


def _asked(address: str, ask: "Callable[[AbstractFileSystem, str], Answer]") -> Answer:
    """Calls `ask` with the address's file system, and retries if the network fails. Each process opens its own one.

    Raises:
        UnreachableError: It does not answer. The message has the reason.
    """
    require_module("fsspec")
    from fsspec.core import url_to_fs

    for wait in (*_WAITS, None):
        try:
            fs, path = url_to_fs(address)
            _OPENED.add(fs)
            return ask(fs, path)
        except UserError:
            raise
        except Exception as error:  # each file system raises its own types
            if wait is None or _is_final(error):
                raise UnreachableError(
                    f"{address}: cannot be read ({_reason(error)}); check the address and the network"
                ) from error
        time.sleep(wait)
    raise AssertionError("the loop above returns or raises")


def _is_final(error: Exception) -> bool:
    """Whether a retry is useless."""
    if (cause := _failure_behind(error)) is not None:
        status = getattr(cause, "status", None)
        return status is not None and 400 <= status < 500 and status not in _OF_LATER
    return isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError | ImportError | ValueError)


def _failure_behind(error: Exception) -> BaseException | None:
    """The real cause of a missing file. Over HTTP fsspec reports any failure to get a file's size as missing."""
    cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
    is_of_network = type(cause).__module__.partition(".")[0] == "aiohttp" or isinstance(cause, TimeoutError)
    return cause if is_of_network else None


def _reason(error: Exception) -> str:
    cause = _failure_behind(error)
    if isinstance(error, FileNotFoundError) and (cause is None or getattr(cause, "status", None) in (404, 410)):
        return "there is no such file"
    shown = cause or error
    return " ".join(str(shown).split())[:200] or type(shown).__name__
