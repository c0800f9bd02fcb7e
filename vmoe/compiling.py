"""Fixes a fault of torch.compile before torch 2.14.

A kernel that reduces rows in a loop may store a row and read it back in its next loop. Before 2.14 its warps did not
wait for each other in between, so some read old values. Each process decides by timing whether its kernels do so.
On an H200 with torch 2.11, in a ViT of width 192 with blocks that add to the transposed output of the patch embedding,
about 2 % of the images had wrong results, different ones in each evaluation. torch fixed it in
https://github.com/pytorch/pytorch/pull/190519.
"""

from functools import cache

import torch
from torch.torch_version import TorchVersion


@cache
def mend_compiler() -> None:
    """Makes kernels that torch.compile generates from now on wait before they read back stored values."""
    if TorchVersion(torch.__version__) >= "2.14":
        return
    from torch._inductor.codegen.triton import TritonKernel  # takes seconds to import

    load, load_buffer = TritonKernel.load, TritonKernel.get_load_buffer

    def load_after_barrier(self, name, index):
        self.read_back = name in self.cse.invalidated_stores  # stored in a loop that has ended
        try:
            return load(self, name, index)
        finally:
            self.read_back = False

    def load_buffer_with_barrier(self, indexing):
        buffer = load_buffer(self, indexing)
        if getattr(self, "read_back", False):
            buffer.writeline("tl.debug_barrier()")
        return buffer

    TritonKernel.load, TritonKernel.get_load_buffer = load_after_barrier, load_buffer_with_barrier
    # older kernels in the cache on disk have no barrier
    torch.compiler.config.cache_key_tag += "reads back after a barrier"
