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

from vmoe.moe.kernels.launches import launch
from vmoe.moe.kernels.operators import operator
from vmoe.moe.kernels.sizes import ALIGNMENT, cdiv, choices_of_block, columns_of


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
        flow = _Flow(num_groups, size, top_k, num_experts)
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
    row_TK = torch.empty_like(chosen_TK, dtype=torch.int32)
    starts_E = torch.empty(num_experts, dtype=torch.int32, device=chosen_TK.device)
    counts_E = torch.empty_like(starts_E)
    kept_TK = kept_TK if kept_TK is None else kept_TK.contiguous()
    flow = _Flow(1, chosen_TK.numel(), 1, num_experts)
    _count_flow(chosen_TK.contiguous(), kept_TK, None, flow, row_TK, (starts_E, counts_E))
    return row_TK, starts_E, counts_E


def _fake_expert_rows(chosen_TK, kept_TK, num_experts):
    ends_E = torch.empty(num_experts, dtype=torch.int32, device=chosen_TK.device)
    return torch.empty_like(chosen_TK, dtype=torch.int32), ends_E, torch.empty_like(ends_E)


expert_rows = operator("expert_rows", _expert_rows, _fake_expert_rows)


class _Flow(NamedTuple):
    """The sizes G, S, K and E of the choices that are counted."""

    num_groups: int
    size: int
    top_k: int
    num_experts: int


def _count_flow(
    chosen: Tensor, kept: Tensor | None, order: Tensor | None, flow: _Flow, out: Tensor,
    starts_and_counts: tuple[Tensor, Tensor] | None,
) -> None:  # fmt: skip
    """Writes ranks into `out`. With `starts_and_counts` it writes rows, and fills each expert's first row and count."""
    columns, block = columns_of(flow.num_experts), choices_of_block(flow.num_experts)
    num_blocks = cdiv(flow.size * flow.top_k, block)
    before = torch.empty(flow.num_groups, num_blocks, columns, dtype=torch.int32, device=chosen.device)
    totals = torch.empty(flow.num_groups, columns, dtype=torch.int32, device=chosen.device)
    starts_E, counts_E = starts_and_counts or (None, None)
    of_flow = (flow.size, flow.top_k, columns, block, order is not None, kept is not None)
    grid = (num_blocks, flow.num_groups)
    launch(_histogram, grid, (chosen, kept, order, before), of_flow)
    scan_columns = min(columns, 32)
    scan_grid = (columns // scan_columns, flow.num_groups)
    launch(_scan_blocks, scan_grid, (before, totals), (num_blocks, columns, scan_columns, 64))
    launch(
        _rank_in_flow, grid, (chosen, kept, order, before, totals, out, starts_E, counts_E),
        (flow.num_experts, *of_flow, starts_and_counts is not None, ALIGNMENT),
    )  # fmt: skip


@triton.jit
def _choices_of_program(
    chosen, kept, order, SIZE, TOP_K: tl.constexpr, BLOCK: tl.constexpr, ORDERED: tl.constexpr, HAS_KEPT: tl.constexpr
):
    """The offsets of this program's choices in the (G, S, K) tensor, which are inside it, and their experts."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = tl.program_id(1).to(tl.int64)
    inside = n < SIZE * TOP_K
    token = n % SIZE
    if ORDERED:
        token = tl.load(order + group * SIZE + token, mask=inside, other=0)
    at = (group * SIZE + token) * TOP_K + n // SIZE
    wanted = inside
    if HAS_KEPT:
        wanted &= tl.load(kept + at, mask=inside, other=0) != 0
    return at, inside, tl.load(chosen + at, mask=wanted, other=-1).to(tl.int32)


@triton.jit(do_not_specialize=["SIZE"])
def _histogram(
    chosen, kept, order, before, SIZE, TOP_K: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    ORDERED: tl.constexpr, HAS_KEPT: tl.constexpr,
):  # fmt: skip
    _, _, expert = _choices_of_program(chosen, kept, order, SIZE, TOP_K, BLOCK, ORDERED, HAS_KEPT)
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


@triton.jit(do_not_specialize=["SIZE"])
def _rank_in_flow(
    chosen, kept, order, before, totals, out, starts, counts, num_experts,
    SIZE, TOP_K: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ORDERED: tl.constexpr,
    HAS_KEPT: tl.constexpr, AS_ROWS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    at, inside, expert = _choices_of_program(chosen, kept, order, SIZE, TOP_K, BLOCK, ORDERED, HAS_KEPT)
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
        tl.store(out + at, tl.where(has_row, tl.sum(one_hot * place, 1), -1), mask=inside)
    else:
        tl.store(out + at, tl.sum(one_hot * place, 1).to(tl.int64), mask=inside)
