"""The order of tokens by priority, for Batch Prioritized Routing."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmoe.moe.kernels.launches import launch
from vmoe.moe.kernels.operators import operator
from vmoe.moe.kernels.sizes import cdiv


def _order_of(values_GS: Tensor) -> Tensor:
    """The tokens of each group by descending value, (G, S) int64. The order is stable.

    A token's position is the number of values before its own, counted by comparing all with all. For groups of a few
    thousand tokens that is faster than a sort.
    """
    return order_in_groups(values_GS.contiguous(), *values_GS.shape, last=values_GS.shape[1])


def order_in_groups(values_T: Tensor, num_groups: int, size: int, last: int) -> Tensor:
    """The same for tokens of which the last group may have fewer; what its row holds beyond them means nothing."""
    order_GS = torch.empty(num_groups, size, dtype=torch.int64, device=values_T.device)
    if order_GS.numel():
        launch(_descending_order, (cdiv(size, 32), num_groups), (values_T, order_GS), (size, last, 32))
    return order_GS


descending_order = operator(
    "descending_order", _order_of, lambda values_GS: torch.empty_like(values_GS, dtype=torch.int64)
)


@triton.jit(do_not_specialize=["full_size", "last"])
def _descending_order(values, order, full_size, last, BLOCK: tl.constexpr):
    size = tl.where(tl.program_id(1) == tl.num_programs(1) - 1, last, full_size)
    values += tl.program_id(1).to(tl.int64) * full_size
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = _nan_first(tl.load(values + own, mask=own < size, other=0.0))[:, None]
    before = tl.zeros((BLOCK, BLOCK), dtype=tl.int32)
    # equal values of earlier tokens come first
    for first in range(0, tl.minimum(tl.program_id(0) * BLOCK, size // BLOCK * BLOCK), BLOCK):
        others = _nan_first(tl.load(values + first + tl.arange(0, BLOCK)))[None, :]
        before += (others >= value).to(tl.int32)
    others = _nan_first(tl.load(values + own, mask=own < size, other=-float("inf")))[None, :]
    before += ((others > value) | ((others == value) & (own[None, :] < own[:, None]))).to(tl.int32)
    for first in range((tl.program_id(0) + 1) * BLOCK, size, BLOCK):
        other = first + tl.arange(0, BLOCK)
        others = _nan_first(tl.load(values + other, mask=other < size, other=-float("inf")))[None, :]
        before += (others > value).to(tl.int32)
    place = tl.sum(before, 1)
    tl.store(order + tl.program_id(1).to(tl.int64) * full_size + place, own.to(tl.int64), mask=own < size)


@triton.jit
def _nan_first(value):
    # NaN compares false with everything, but each token needs a position of its own
    return tl.where(value != value, float("inf"), value)
