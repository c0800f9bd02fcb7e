"""Counting sort of choices by expert, without host synchronisation and without atomic addition.

Routing uses its ranks, which give choices their slots. The experts use its rows of a buffer.

G groups of S tokens with K choices; E experts; N = S*K choices of a group in the order of the flow: every token's
first choice, then every second choice, and so on. The flow is counted in blocks: a histogram per block, a scan over the
blocks, and a count within each block.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmoe.moe.groups import Groups
from vmoe.moe.kernels.launches import launch
from vmoe.moe.kernels.operators import operator
from vmoe.moe.kernels.sizes import ALIGNMENT, MAX_BLOCKS, cdiv, choices_of_block, columns_of, rows_of_buffer


def _ranks(chosen_GSK: Tensor, order_GS: Tensor | None, num_experts: int) -> Tensor:
    """The number of choices of the same expert that come before each choice in its group's flow.

    Args:
        chosen_GSK: The experts. A number outside [0, E) is not counted, and its rank means nothing.
        order_GS: The tokens of each group in the order of the flow; None for their own order.
        num_experts: E.

    Returns:
        (G, S, K) int64.
    """
    num_groups, size, top_k = chosen_GSK.shape
    rank_GSK = torch.empty_like(chosen_GSK, dtype=torch.int64)
    if rank_GSK.numel():
        flow = _Flow(num_groups, size, size, top_k, num_experts)
        _count_flow(chosen_GSK.contiguous(), None, order_GS, flow, rank_GSK, None)
    return rank_GSK


ranks = operator("ranks", _ranks, lambda chosen_GSK, *_: torch.empty_like(chosen_GSK, dtype=torch.int64))


def _expert_rows(chosen_TK: Tensor, kept_TK: Tensor | None, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gives each choice a row of a buffer. An expert's rows lie together and start at a multiple of ALIGNMENT.

    Args:
        chosen_TK: The experts.
        kept_TK: Which choices get a row; None for all.
        num_experts: E.

    Returns:
        The row of each choice (T, K) int32, -1 for none; the first row of each expert and the number of its rows, (E,)
        int32.
    """
    kept_TK = kept_TK if kept_TK is None else kept_TK.contiguous()
    rows = _rows_as_needed(chosen_TK.contiguous(), kept_TK, num_experts, None)
    return rows.row_TK, rows.starts_E, rows.counts_E


def _fake_expert_rows(chosen_TK, kept_TK, num_experts):
    ends_E = torch.empty(num_experts, dtype=torch.int32, device=chosen_TK.device)
    return torch.empty_like(chosen_TK, dtype=torch.int32), ends_E, torch.empty_like(ends_E)


expert_rows = operator("expert_rows", _expert_rows, _fake_expert_rows)


class Rows(NamedTuple):
    """The rows of the experts' buffer.

    Attributes:
        row_TK: The row of each choice, int32, -1 for none.
        choice_R: The choice t * K + k in each row, int32, -1 for none; None where nobody needs it.
        starts_E: The first row of each expert, int32; None where all have the same share.
        counts_E: The number of its rows, int32; None as above.
        share: The rows of an expert; 0 where each has as many as it needs.
    """

    row_TK: Tensor
    choice_R: Tensor | None
    starts_E: Tensor | None
    counts_E: Tensor | None
    share: int


def rows_as_needed(chosen_TK: Tensor, kept_TK: Tensor | None, num_experts: int) -> Rows:
    """The same as `expert_rows`, with the choice in each row."""
    num_rows = rows_of_buffer(chosen_TK.numel(), num_experts, 0)
    choice_R = chosen_TK.new_empty(num_rows, dtype=torch.int32)
    return _rows_as_needed(chosen_TK, kept_TK, num_experts, choice_R)


def _rows_as_needed(chosen_TK: Tensor, kept_TK: Tensor | None, num_experts: int, choice_R: Tensor | None) -> Rows:
    row_TK = chosen_TK.new_empty(chosen_TK.shape, dtype=torch.int32)
    starts_E, counts_E = row_TK.new_empty(num_experts), row_TK.new_empty(num_experts)
    rows = Rows(row_TK, choice_R, starts_E, counts_E, 0)
    flow = _Flow(1, chosen_TK.numel(), chosen_TK.numel(), 1, num_experts)
    _count_flow(chosen_TK, kept_TK, None, flow, row_TK, rows)
    return rows


def place_in_shares(
    chosen_TK: Tensor, order_GS: Tensor | None, groups: Groups, num_experts: int, capacities: tuple[int, int],
    share: int,
) -> Rows:  # fmt: skip
    """Gives each choice the row e * share + g * C + slot, or none if the expert has no slot left for the group.

    Args:
        chosen_TK: The experts.
        order_GS: As for `ranks`.
        groups: How the tokens are grouped.
        num_experts: E.
        capacities: C, and the slots of an expert for the last group, which may be smaller.
        share: The rows of an expert, at least G * C.
    """
    flow = _Flow(groups.count, groups.size, groups.last, chosen_TK.shape[1], num_experts)
    row_TK = chosen_TK.new_empty(chosen_TK.shape, dtype=torch.int32)  # costs the host less than torch.empty
    choice_R = row_TK.new_empty(num_experts * share)
    num_blocks, of_flow = _numbers_of_flow(flow, order_GS is not None, has_kept=False)
    # with few blocks each counts the choices before its own by itself, which saves two launches
    before = None if num_blocks <= MAX_BLOCKS else _count_before(chosen_TK, None, order_GS, flow)[0]
    launch(
        _place, (num_blocks, flow.num_groups), (chosen_TK, order_GS, before, row_TK, choice_R),
        (num_experts, *capacities, share, before is not None, *of_flow),
    )  # fmt: skip
    return Rows(row_TK, choice_R, None, None, share)


class _Flow(NamedTuple):
    """The sizes G, S, that of the last group, K and E of the choices that are counted."""

    num_groups: int
    size: int
    last: int
    top_k: int
    num_experts: int


def _count_flow(
    chosen: Tensor, kept: Tensor | None, order: Tensor | None, flow: _Flow, out: Tensor,
    rows: Rows | None,
) -> None:  # fmt: skip
    """Writes ranks into `out`. With `rows` it writes rows, and fills what else is in there."""
    num_blocks, of_flow = _numbers_of_flow(flow, order is not None, kept is not None)
    before, totals = _count_before(chosen, kept, order, flow)
    starts_E, counts_E, choice_R = (None, None, None) if rows is None else (rows.starts_E, rows.counts_E, rows.choice_R)
    launch(
        _rank_in_flow, (num_blocks, flow.num_groups),
        (chosen, kept, order, before, totals, out, starts_E, counts_E, choice_R),
        (
            flow.num_experts, 0 if choice_R is None else choice_R.numel(), *of_flow, rows is not None,
            choice_R is not None, ALIGNMENT,
        ),
    )  # fmt: skip


def _count_before(chosen: Tensor, kept: Tensor | None, order: Tensor | None, flow: _Flow) -> tuple[Tensor, Tensor]:
    """The choices of each expert before each block of its group (G, blocks, columns), and in the group (G, columns)."""
    num_blocks, of_flow = _numbers_of_flow(flow, order is not None, kept is not None)
    columns = columns_of(flow.num_experts)
    before = chosen.new_empty(flow.num_groups, num_blocks, columns, dtype=torch.int32)
    totals = before.new_empty(flow.num_groups, columns)
    launch(_histogram, (num_blocks, flow.num_groups), (chosen, kept, order, before), of_flow)
    scan_columns = min(columns, 32)
    scan_grid = (columns // scan_columns, flow.num_groups)
    launch(_scan_blocks, scan_grid, (before, totals), (num_blocks, columns, scan_columns, 64))
    return before, totals


def _numbers_of_flow(flow: _Flow, is_ordered: bool, has_kept: bool) -> tuple[int, tuple[int, ...]]:
    """The number of blocks in a group, and the arguments of the kernels from SIZE to HAS_KEPT."""
    block = choices_of_block(flow.num_experts)
    of_flow = (flow.size, flow.last, flow.top_k, columns_of(flow.num_experts), block, is_ordered, has_kept)
    return cdiv(flow.size * flow.top_k, block), of_flow


@triton.jit
def _choices_of_block(
    index, chosen, kept, order, SIZE, LAST, TOP_K: tl.constexpr, BLOCK: tl.constexpr, ORDERED: tl.constexpr,
    HAS_KEPT: tl.constexpr,
):  # fmt: skip
    """The offsets of a block's choices in the (T, K) tensor, which are inside their group, and their experts."""
    n = index * BLOCK + tl.arange(0, BLOCK)
    group = tl.program_id(1).to(tl.int64)
    size = tl.where(group == tl.num_programs(1) - 1, LAST, SIZE)
    inside = n < size * TOP_K
    token = n % size
    if ORDERED:
        token = tl.load(order + group * SIZE + token, mask=inside, other=0)
    at = (group * SIZE + token) * TOP_K + n // size
    wanted = inside
    if HAS_KEPT:
        wanted &= tl.load(kept + at, mask=inside, other=0) != 0
    return at, inside, tl.load(chosen + at, mask=wanted, other=-1).to(tl.int32)


@triton.jit(do_not_specialize=["SIZE", "LAST"])
def _histogram(
    chosen, kept, order, before, SIZE, LAST, TOP_K: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    ORDERED: tl.constexpr, HAS_KEPT: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    _, _, expert = _choices_of_block(index, chosen, kept, order, SIZE, LAST, TOP_K, BLOCK, ORDERED, HAS_KEPT)
    column = tl.arange(0, COLUMNS)
    one_hot = (expert[:, None] == column[None, :]).to(tl.int32)
    block = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(before + block * COLUMNS + column, tl.sum(one_hot, 0))


@triton.jit(do_not_specialize=["num_blocks"])
def _scan_blocks(before, totals, num_blocks, COLUMNS: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr):
    """Replaces each block's counts by the sum of those before it."""
    group = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * PART + tl.arange(0, PART)
    total = tl.zeros((PART,), dtype=tl.int32)
    for first in range(0, num_blocks, ROWS):
        block = first + tl.arange(0, ROWS)
        at = before + (group * num_blocks + block)[:, None] * COLUMNS + column[None, :]
        inside = (block < num_blocks)[:, None]
        count = tl.load(at, mask=inside, other=0)
        tl.store(at, total[None, :] + tl.cumsum(count, 0) - count, mask=inside)
        total += tl.sum(count, 0)
    tl.store(totals + group * COLUMNS + column, total)


@triton.jit(do_not_specialize=["num_rows", "SIZE", "LAST"])
def _rank_in_flow(
    chosen, kept, order, before, totals, out, starts, counts, choice_of_row, num_experts, num_rows,
    SIZE, LAST, TOP_K: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ORDERED: tl.constexpr,
    HAS_KEPT: tl.constexpr, AS_ROWS: tl.constexpr, HAS_CHOICES: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    at, inside, expert = _choices_of_block(index, chosen, kept, order, SIZE, LAST, TOP_K, BLOCK, ORDERED, HAS_KEPT)
    column = tl.arange(0, COLUMNS)
    block = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    one_hot = (expert[:, None] == column[None, :]).to(tl.int32)
    place = tl.cumsum(one_hot, 0) - 1 + tl.load(before + block * COLUMNS + column)[None, :]
    if AS_ROWS:
        count = tl.load(totals + column)
        aligned = (count + ALIGN - 1) // ALIGN * ALIGN
        start = tl.cumsum(aligned, 0) - aligned
        place += start[None, :]
        if tl.program_id(0) == 0:
            tl.store(starts + column, start, mask=column < num_experts)
            tl.store(counts + column, count, mask=column < num_experts)
        has_row = (expert >= 0) & (expert < num_experts)
        row = tl.sum(one_hot * place, 1)
        tl.store(out + at, tl.where(has_row, row, -1), mask=inside)
        if HAS_CHOICES:
            tl.store(choice_of_row + row, at.to(tl.int32), mask=inside & has_row)
            if index == tl.num_programs(0) - 1:  # the free rows, first those up to the next expert
                for first in range(0, ALIGN, 8):
                    free = count[None, :] + first + tl.arange(0, 8)[:, None]
                    tl.store(choice_of_row + start[None, :] + free, -1, mask=free < aligned[None, :])
                for first in range(tl.sum(aligned, 0), num_rows, 1024):
                    free_row = first + tl.arange(0, 1024)
                    tl.store(choice_of_row + free_row, -1, mask=free_row < num_rows)
    else:
        tl.store(out + at, tl.sum(one_hot * place, 1).to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=["capacity", "last_capacity", "share", "SIZE", "LAST"])
def _place(
    chosen, order, before, row, choice_of_row, num_experts, capacity, last_capacity, share, IS_COUNTED: tl.constexpr,
    SIZE, LAST, TOP_K: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ORDERED: tl.constexpr,
    HAS_KEPT: tl.constexpr,
):  # fmt: skip
    index, group = tl.program_id(0), tl.program_id(1)
    at, inside, expert = _choices_of_block(index, chosen, None, order, SIZE, LAST, TOP_K, BLOCK, ORDERED, HAS_KEPT)
    column = tl.arange(0, COLUMNS)
    if IS_COUNTED:
        earlier = tl.load(before + (group.to(tl.int64) * tl.num_programs(0) + index) * COLUMNS + column)
    else:
        earlier = tl.zeros((COLUMNS,), dtype=tl.int32)
        for other in range(0, index):
            _, _, others = _choices_of_block(other, chosen, None, order, SIZE, LAST, TOP_K, BLOCK, ORDERED, HAS_KEPT)
            earlier += tl.sum((others[:, None] == column[None, :]).to(tl.int32), 0)
    one_hot = (expert[:, None] == column[None, :]).to(tl.int32)
    slot = tl.sum(one_hot * (tl.cumsum(one_hot, 0) - 1 + earlier[None, :]), 1)
    is_last = group == tl.num_programs(1) - 1
    slots = tl.where(is_last, last_capacity, capacity)
    has_row = inside & (slot < slots)
    to = expert * share + group * capacity + slot
    tl.store(row + at, tl.where(has_row, to, -1), mask=inside)
    tl.store(choice_of_row + to, at.to(tl.int32), mask=has_row)
    if index == tl.num_programs(0) - 1:  # it has counted the whole group, so it marks the free rows
        taken = tl.minimum(earlier + tl.sum(one_hot, 0), slots)
        end = tl.where(is_last, share - group * capacity, capacity)  # the last group has what is left of the shares
        first_row = column * share + group * capacity
        for first in range(0, end, 8):
            free = first + tl.arange(0, 8)
            is_free = (free[:, None] >= taken[None, :]) & (free < end)[:, None] & (column < num_experts)[None, :]
            tl.store(choice_of_row + first_row[None, :] + free[:, None], -1, mask=is_free)
