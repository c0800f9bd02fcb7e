"""Downloads files once, with progress. It resumes broken downloads, and never leaves a partial file in place."""

import base64
import contextlib
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from http.client import HTTPException, HTTPResponse, InvalidURL
from pathlib import Path
from socket import gaierror
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from vmoe.errors import UserError
from vmoe.files import writing
from vmoe.version import __version__

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each retry
_SILENCE = 30.0  # seconds without a byte that count as a failure
_CHUNK = 2**20
_EVERY = 10.0  # seconds between two lines without a terminal
_PASSING = (408, 425, 429)  # HTTP: try again later
_NO_RANGE = 416  # HTTP: the file has no such part
_RESERVE = 2**26  # bytes that stay free on the disk


@dataclass(frozen=True)
class _Version:
    """The version of a server's file, to check that a partial download still belongs to it.

    Attributes:
        etag: The server's name for this content; None without one: then a download cannot be resumed.
        md5: The content's checksum in hexadecimal digits, or None.
        size: Bytes of the whole file, or None.
    """

    etag: str | None = None
    md5: str | None = None
    size: int | None = None


def fetch_file(address: str, path: Path) -> str:
    """Downloads a file to `path`, completely or not at all.

    It resumes a broken download if the server's file is still the same. It retries a failing server for about 15
    seconds.

    Args:
        address: http:// or https://.
        path: The new file. Its folder must exist.

    Returns:
        The file's SHA-256.

    Raises:
        UserError: There is no network or no such file, the server sends something else, or the file cannot be written.
    """
    part, version_file = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.version")
    failures = 0
    while True:
        before = _bytes_in(part)
        try:
            version = _fetch_rest(address, part, version_file)
            break
        except (HTTPException, OSError, UnicodeError) as error:  # UnicodeError: a host that cannot be one
            failures = 0 if _bytes_in(part) > before else failures
            if failures == len(WAITS) or not _may_pass(error):
                raise UserError(_failure_line(address, error)) from error
            time.sleep(WAITS[failures])
            failures += 1
    sha256 = _compared(address, part, version_file, version.md5)
    with writing(path):
        part.replace(path)
        version_file.unlink(missing_ok=True)
    return sha256


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    return _hash_of(path, "sha256")


def _hash_of(path: Path, name: str) -> str:
    digest = hashlib.new(name, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _bytes_in(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _fetch_rest(address: str, part: Path, version_file: Path) -> _Version:
    """Appends the missing bytes to `part`.

    Raises:
        UserError: The answer is no file, or cannot be written.
        OSError, HTTPException: The network or the server fails.
    """
    start, known = _bytes_in(part), _read_version(version_file)
    headers = {"User-Agent": f"vmoe/{__version__}"}
    if start and known.etag:
        if start == known.size:
            return known
        headers |= {"Range": f"bytes={start}-", "If-Range": known.etag}
    try:
        response: HTTPResponse = urlopen(Request(address, headers=headers), timeout=_SILENCE)
    except HTTPError as error:
        if error.code == _NO_RANGE:  # the part is longer than the file
            part.unlink()
            raise ConnectionError("its server has another file now") from error
        raise
    with response:
        if response.headers.get_content_type() == "text/html":
            raise UserError(f"{address}: a web page came, and no file; give the address of the file itself")
        is_rest = response.status == 206 and _first_byte(response) == start
        length = response.headers.get("Content-Length")
        size = None if length is None else int(length) + (start if is_rest else 0)
        version = _Version(response.headers.get("ETag"), _md5(response), size)
        if version.etag is not None and version.etag.startswith("W/"):  # weak tags: servers send no parts for them
            version = _Version(None, version.md5, size)
        _require_space(address, part, (size or 0) - (start if is_rest else 0))
        with writing(part):
            version_file.write_text(json.dumps(asdict(version)), encoding="utf-8")
        _write_chunks(response, part, is_rest, _Bar(address.rpartition("/")[2], start if is_rest else 0, size))
    if size is not None and _bytes_in(part) != size:
        raise ConnectionError(f"it broke off after {_bytes_in(part):,} of {size:,} bytes")
    return version


def _write_chunks(response: HTTPResponse, part: Path, appends: bool, bar: "_Bar") -> None:
    """Writes an answer to a file unbuffered, so that a broken download keeps all received bytes."""
    with _writable(part, appends) as file, bar:
        while chunk := response.read1(_CHUNK):
            with writing(part):
                file.write(chunk)
            bar.update(len(chunk))


def _writable(path: Path, appends: bool) -> BinaryIO:
    with writing(path):
        return open(path, "ab" if appends else "wb", buffering=0)


def _read_version(path: Path) -> _Version:
    try:
        return _Version(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return _Version()


def _first_byte(response: HTTPResponse) -> int | None:
    """The start of the part that a server sends, from a header such as "bytes 100-199/200"."""
    first = (response.headers.get("Content-Range") or "").removeprefix("bytes ").partition("-")[0]
    return int(first) if first.isdecimal() else None


def _md5(response: HTTPResponse) -> str | None:
    """The checksum from Google's storage, as in "crc32c=n03x6A==,md5=Ojk9c3dhfxgoKVVHYwFbHQ=="."""
    given = ",".join(response.headers.get_all("x-goog-hash") or ())
    encoded = next((each.strip()[4:] for each in given.split(",") if each.strip().startswith("md5=")), None)
    with contextlib.suppress(ValueError):
        return None if encoded is None else base64.b64decode(encoded, validate=True).hex()
    return None


def _compared(address: str, part: Path, version_file: Path, md5: str | None) -> str:
    """The file's SHA-256, after comparing its checksum with the server's.

    Raises:
        UserError: They differ. The file is removed, so that the next download starts again.
    """
    if md5 is not None:
        found = _hash_of(part, "md5")
        if found != md5:
            part.unlink()
            version_file.unlink(missing_ok=True)
            raise UserError(f"{address}: was damaged on its way (MD5 {found}, the server's is {md5}); run this again")
    return sha256_of(part)


def _require_space(address: str, part: Path, needed: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if needed > free - _RESERVE:
        raise UserError(
            f"{address}: needs {needed / 1e6:,.0f} MB, and {part.parent} has {free / 1e6:,.0f} MB free; make room, or "
            "set TORCH_HOME to a folder on another disk"
        )


def _may_pass(error: Exception) -> bool:
    """Whether a retry may succeed."""
    if isinstance(error, HTTPError):
        return error.code >= 500 or error.code in _PASSING
    if isinstance(error, InvalidURL | UnicodeError):
        return False
    # an unknown host name means no network, or a mistyped name
    return not (isinstance(error, URLError) and isinstance(error.reason, gaierror))


def _failure_line(address: str, error: Exception) -> str:
    if isinstance(error, HTTPError):
        reason = "there is no such file" if error.code in (404, 410) else f"HTTP {error.code}, {error.reason}"
    else:
        cause = error.reason if isinstance(error, URLError) else error
        reason = str(cause) or type(cause).__name__
    reason = " ".join(reason.split())
    return f"{address}: cannot be downloaded ({reason}); check the network, and run this again to go on"


class _Bar:
    """The progress of a download on stderr: a bar in a terminal or notebook, else a line every 10 seconds."""

    def __init__(self, name: str, start: int, size: int | None) -> None:
        self._name, self._done, self._size = name, start, size
        self._is_watched = sys.stderr is not None and (sys.stderr.isatty() or "ipykernel" in sys.modules)

    def __enter__(self) -> None:
        self._last = time.monotonic()
        if self._is_watched:
            from tqdm.auto import tqdm  # here: most files are already downloaded

            how = {"unit": "B", "unit_scale": True, "leave": False}
            self._tqdm = tqdm(desc=self._name, initial=self._done, total=self._size, **how)

    def update(self, count: int) -> None:
        """Counts `count` more bytes."""
        self._done += count
        if self._is_watched:
            self._tqdm.update(count)
        elif sys.stderr is not None and time.monotonic() - self._last >= _EVERY:
            self._last = time.monotonic()
            of = "" if self._size is None else f" of {self._size / 1e6:,.0f}"
            print(f"downloading {self._name}: {self._done / 1e6:,.0f}{of} MB", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._is_watched:
            self._tqdm.close()


@contextlib.contextmanager
def one_process_in(folder: Path) -> Iterator[None]:
    """Makes a folder, and lets one process at a time work in it. Other processes wait.

    Raises:
        UserError: It cannot be written.
    """
    from filelock import FileLock  # a dependency of torch

    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / ".lock")
            lock.acquire()
    except UserError as error:
        raise UserError(f"{error} by setting TORCH_HOME") from error
    try:
        yield
    finally:
        lock.release()
