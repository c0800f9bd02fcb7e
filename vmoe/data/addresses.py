"""Files behind fsspec's addresses, such as hf://, s3:// and https://: listed, and read in parts."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TypeVar

from vmoe.errors import UserError
from vmoe.extras import require_module

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Answer = TypeVar("Answer")
_WAITS = (1, 2, 4)  # seconds before a network is asked again
_SCANNED_AT_ONCE = 8 * 2**20  # bytes
_OF_NO_FILE = (403, 404, 410)  # HTTP's answers; the first is that of a bucket which may not be listed
_OF_LATER = (408, 425, 429)  # HTTP's answers that ask for patience; others from 400 to 499 stay as they are


class UnreachableError(UserError):
    """A file behind an address cannot be had: unlike a damaged picture, none is put in its place."""


class RemoteFile(NamedTuple):
    """A file in a folder: its address, its name there, its size in bytes, and a text that changes with its content."""

    address: str
    name: str
    size: int
    version: str


def is_address(root: object) -> bool:
    """Whether a text is an address and no path."""
    return "://" in str(root)


def list_files(root: str) -> list[RemoteFile]:
    """The files directly in a folder, or those that an address with braces stands for, by name.

    Raises:
        UnreachableError: they cannot be listed.
        UserError: two of the addresses end in the same name, by which an index knows them.
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
    """A file's content; None where there is none.

    Raises:
        UnreachableError: it cannot be read.
    """

    def read(fs: "AbstractFileSystem", path: str) -> bytes | None:
        try:  # not by `exists`, which over HTTP takes a server that fails for a file that is not there
            return fs.cat_file(path)
        except FileNotFoundError:
            return None
        except Exception as error:
            if getattr(error, "status", None) in _OF_NO_FILE:
                return None
            raise

    return _asked(address, read)


def read_part(address: str, start: int, size: int) -> bytes:
    """So many bytes of a file, from `start` on.

    Raises:
        UnreachableError: they cannot be read.
    """

    def read(fs: "AbstractFileSystem", path: str) -> bytes:
        if "::" in address:  # a cache, which keeps what is opened
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
    """What `read` makes of a file from its start to its end; where a network fails in between, it starts again.

    Raises:
        UnreachableError: the file cannot be read.
    """

    def ask(fs: "AbstractFileSystem", path: str) -> Answer:
        with fs.open(path, "rb", block_size=_SCANNED_AT_ONCE) as file:
            try:
                return read(file)
            except UserError:
                raise
            except ValueError as error:  # of HTTP, where no part comes, or another one than was asked for
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
    """The addresses that braces stand for, as in train-{0000..0012}.tar; None without braces."""
    if "{" not in root:
        return None
    require_module("braceexpand")
    from braceexpand import UnbalancedBracesError, braceexpand

    try:
        return list(braceexpand(root))
    except UnbalancedBracesError as error:
        raise UserError(f"{root}: its braces are not balanced; write them as in train-{{0000..0012}}.tar") from error


def _asked(address: str, ask: "Callable[[AbstractFileSystem, str], Answer]") -> Answer:
    """What a file system answers, asked again where a network fails. It is found in each process for itself.

    Raises:
        UnreachableError: it does not answer; the line has its reason.
    """
    require_module("fsspec")
    from fsspec.core import url_to_fs

    for wait in (*_WAITS, None):
        try:
            return ask(*url_to_fs(address))
        except UserError:
            raise
        except Exception as error:  # each file system has its own errors
            if wait is None or _is_final(error):
                raise UnreachableError(
                    f"{address}: cannot be read ({_reason(error)}); check the address and the network"
                ) from error
        time.sleep(wait)
    raise AssertionError("the loop above returns or raises")


def _is_final(error: Exception) -> bool:
    """Whether asking again is of no use."""
    if (cause := _failure_behind(error)) is not None:
        status = getattr(cause, "status", None)
        return status is not None and 400 <= status < 500 and status not in _OF_LATER
    return isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError | ImportError | ValueError)


def _failure_behind(error: Exception) -> BaseException | None:
    """What made a file seem missing: over HTTP, fsspec says so of any failure to ask for a file's size."""
    cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
    is_of_network = type(cause).__module__.partition(".")[0] == "aiohttp" or isinstance(cause, TimeoutError)
    return cause if is_of_network else None


def _reason(error: Exception) -> str:
    cause = _failure_behind(error)
    if isinstance(error, FileNotFoundError) and (cause is None or getattr(cause, "status", None) in (404, 410)):
        return "there is no such file"
    shown = cause or error
    return " ".join(str(shown).split())[:200] or type(shown).__name__
