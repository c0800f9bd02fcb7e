"""CPU memory that is reused from step to step.

The C library returns a large buffer to the system as soon as it is freed, and the system clears each page at its next
first use. For experts with few tokens that costs as much as a matrix product. So this module keeps blocks of huge
pages until they have been idle for a while. A block is free when no tensor's storage refers to it. A gradient that was
kept, or a graph before its backward pass, therefore keeps its block.
"""

import mmap
import threading
import weakref
from math import prod

import torch
from torch import Tensor

SMALLEST = 2**20  # bytes; the C library keeps smaller buffers itself
MAX_EXCESS = 1.25  # a block may be this many times as large as the tensor
MAX_IDLE = 1000  # a free block is released after so many takes of others


class Memory:
    """Blocks of memory, each lent to one tensor at a time."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._taken = 0
        self._lock = threading.Lock()

    def take(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor with uninitialised values."""
        numel = prod(shape)
        size = numel * dtype.itemsize
        if size < SMALLEST:
            return torch.empty(shape, dtype=dtype)
        with self._lock:
            lease = self._lease(size)
        return torch.frombuffer(lease, dtype=dtype, count=numel).view(shape)

    @property
    def size(self) -> int:
        """Bytes of all blocks, lent or free."""
        return sum(block.size for block in self._blocks)

    def _lease(self, size: int) -> memoryview:
        self._taken += 1
        free = [block for block in self._blocks if block.is_free()]
        fitting = [block for block in free if size <= block.size <= size * MAX_EXCESS]
        block = min(fitting, key=lambda block: block.size, default=None)
        if block is None:
            block = _Block(size)
            self._blocks.append(block)
        for other in free:
            if other is not block and self._taken - other.last_taken > MAX_IDLE:
                self._blocks.remove(other)
        return block.lend(self._taken)

    def __reduce__(self):
        # a copy or an unpickled holder uses the shared memory of its own process
        return shared_memory, ()


class _Block:
    def __init__(self, size: int) -> None:
        # a private mapping: a forked process must not write into its parent's pages
        self._pages = mmap.mmap(-1, size, access=mmap.ACCESS_COPY)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._pages.madvise(mmap.MADV_HUGEPAGE)
        self.size = size
        self.last_taken = 0
        self._lease = None

    def is_free(self) -> bool:
        return self._lease is None or self._lease() is None

    def lend(self, taken: int) -> memoryview:
        """A view that only the borrowing tensor's storage keeps alive."""
        lease = memoryview(self._pages)
        self._lease, self.last_taken = weakref.ref(lease), taken
        return lease


_alive: weakref.WeakValueDictionary[str, Memory] = weakref.WeakValueDictionary()


def shared_memory() -> Memory:
    """The memory that all experts of the process share. It is freed with its last holder."""
    memory = _alive.get("memory")
    if memory is None:
        memory = _alive["memory"] = Memory()
    return memory
