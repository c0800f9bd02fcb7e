"""Which expert owns which rows, for kernels that work on tiles of one expert each."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class RowOwners(NamedTuple):
    """Which expert owns which rows: either equal shares, or a start and a number of rows per expert.

    Attributes:
        num_experts: E.
        share: Rows set aside for each expert; 0 where `starts_E` and `counts_E` decide.
        starts_E: First row of each expert, int32; None with a share.
        counts_E: Number of its rows, int32; None with a share.
    """

    num_experts: int
    share: int
    starts_E: Tensor | None
    counts_E: Tensor | None


@triton.jit
def expert_of(row, starts, num_experts, share, HAS_SHARE: tl.constexpr, EXPERTS: tl.constexpr):
    """The expert whose rows begin at or before `row`."""
    if HAS_SHARE:
        expert = row // share
    else:
        each = tl.arange(0, EXPERTS)
        # the largest int32 beyond the last expert, so that no row is at or after it
        start_of_each = tl.load(starts + each, mask=each < num_experts, other=2147483647)
        expert = tl.sum((start_of_each <= row).to(tl.int32)) - 1
    return expert
