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
    """
    addresses = _without_braces(root)

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
    return _asked(address, lambda fs, path: fs.cat_file(path) if fs.exists(path) else None)


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
            f"give simplecache::{address.rpartition('/')[0]}, which keeps whole files here, or download them"
        )
    return content


def opened(address: str) -> BinaryIO:
    """A file that is read from its start to its end.

    Raises:
        UnreachableError: it cannot be opened.
    """
    return _asked(address, lambda fs, path: fs.open(path, "rb", block_size=_SCANNED_AT_ONCE))


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
            is_final = isinstance(
                error, FileNotFoundError | PermissionError | NotADirectoryError | ImportError | ValueError
            )
            if wait is None or is_final:
                reason = (
                    "there is no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
                )
                raise UnreachableError(
                    f"{address}: cannot be read ({reason[:200] or type(error).__name__}); check the address and the "
                    "network"
                ) from error
        time.sleep(wait)
    raise AssertionError("the loop above returns or raises")
