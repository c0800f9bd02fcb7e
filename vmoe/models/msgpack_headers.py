"""Walks a large msgpack file by its headers (https://github.com/msgpack/msgpack/blob/master/spec.md)."""

import io
from typing import BinaryIO

NDARRAY, NUMPY_SCALAR = 1, 3  # Flax's extension types for arrays

_SHORT_HEADERS = (  # mask and bits of a first byte that contains the length or value, and its kind
    (0x80, 0x00, "int"),
    (0xF0, 0x80, "map"),
    (0xF0, 0x90, "array"),
    (0xE0, 0xA0, "bytes"),
)
_SIZED = {  # first byte -> kind, and number of bytes of its length or value
    **{0xC4 + i: ("bytes", 1 << i) for i in range(3)},
    **{0xC7 + i: ("extension", 1 << i) for i in range(3)},
    **{0xCC + i: ("int", 1 << i) for i in range(4)},
    **{0xD9 + i: ("bytes", 1 << i) for i in range(3)},
    **{0xDC + i: ("array", 2 << i) for i in range(2)},
    **{0xDE + i: ("map", 2 << i) for i in range(2)},
}
_FIXED_EXTENSIONS = {0xD4 + i: 1 << i for i in range(5)}  # first byte -> length


class Headers:
    """Walks a msgpack file by its headers, and skips large values without reading them.

    Args:
        file: The file, open at its start.
        size: Its length in bytes.

    Raises:
        EOFError: The file ends too early.
        ValueError: A header is of another kind than expected.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def expect(self, kind: str) -> int:
        """Reads a header and returns its length, or the value of an int or bool."""
        first = self._take(1)[0]
        for mask, bits, short in _SHORT_HEADERS:
            if first & mask == bits:
                found, value = short, first & ~mask & 0xFF
                break
        else:
            if first in (0xC2, 0xC3):
                found, value = "bool", first - 0xC2
            elif first in _FIXED_EXTENSIONS:
                found, value = "extension", _FIXED_EXTENSIONS[first]
            elif first in _SIZED:
                found, width = _SIZED[first]
                value = int.from_bytes(self._take(width), "big")
            else:
                found, value = f"type {first:#x}", 0
        if found != kind:
            raise ValueError(f"{found} in place of {kind} before byte {self._file.tell()}")
        return value

    def text(self) -> str:
        return self._take(self.expect("bytes")).decode()

    def extension(self, code: int) -> bytes:
        length = self.expect("extension")
        self._need_code(code)
        return self._take(length)

    def ndarray(self) -> tuple[str, tuple[int, int]]:
        """The dtype of an array and the position of its numbers: (offset, length) in bytes."""
        length = self.expect("extension")
        self._need_code(NDARRAY, NUMPY_SCALAR)
        end = self._file.tell() + length
        if self.expect("array") != 3:
            raise ValueError("an array is shape, dtype and numbers")
        for _ in range(self.expect("array")):  # skips the shape: the chunk's bounds give it
            self.expect("int")
        dtype, length = self.text(), self.expect("bytes")
        offset = self._file.tell()
        if offset + length != end:
            raise ValueError(f"an array of {length} bytes ends before byte {end}")
        self._pass(length)
        return dtype, (offset, length)

    def _need_code(self, *codes: int) -> None:
        code = self._take(1)[0]
        if code not in codes:
            raise ValueError(f"extension type {code} before byte {self._file.tell()}")

    def _take(self, count: int) -> bytes:
        self._check_rest(count)
        return self._file.read(count)

    def _pass(self, count: int) -> None:
        self._check_rest(count)
        self._file.seek(count, io.SEEK_CUR)

    def _check_rest(self, count: int) -> None:
        if self._file.tell() + count > self._size:
            raise EOFError
