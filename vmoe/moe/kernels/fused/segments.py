"""Whose rows are whose, for kernels that work on tiles of one expert each."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Segments(NamedTuple):
    """Which rows are whose.

    Attributes:
        starts_E: First row of each expert, int32.
        counts_E: Number of its rows, int32.
        share: Rows set aside for each expert; 0 where `starts_E` decides.
    """

    starts_E: Tensor
    counts_E: Tensor
    share: int

    def chunk(self, first: int, last: int) -> "Segments":
        """The experts from `first` up to `last`, whose rows are then counted from 0. Needs a share."""
        return Segments(self.starts_E[first:last], self.counts_E[first:last], self.share)


@triton.jit
def expert_of(row, starts, counts, num_experts, share, HAS_SHARE: tl.constexpr, EXPERTS: tl.constexpr):
    """(expert, end of its rows) for a tile that begins at `row`."""
    if HAS_SHARE:
        expert = row // share
        start = expert * share
    else:
        each = tl.arange(0, EXPERTS)
        start_of_each = tl.load(starts + each, mask=each < num_experts, other=2147483647)
        expert = tl.sum((start_of_each <= row).to(tl.int32)) - 1
        start = tl.load(starts + expert)
    return expert, start + tl.load(counts + expert)
