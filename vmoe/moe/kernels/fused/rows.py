"""Moving tokens into the experts' rows and back, in both directions; each kernel reads and writes every value once.

T tokens of width D with K choices, R rows; row_TK is -1 where a choice has no row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmoe.moe.kernels.fused.ranks import ALIGNMENT
from vmoe.moe.kernels.fused.segments import Segments
from vmoe.moe.kernels.fused.sizes import cdiv, next_power_of_2

TOKENS, COLUMNS = 4, 256  # of a program's tile


def scatter(x_TD: Tensor, row_TK: Tensor, weights_TK: Tensor, out_RD: Tensor, weight_R: Tensor) -> None:
    """Writes each token and its combine weights into its rows."""
    num_tokens, top_k = row_TK.shape
    _scatter[(cdiv(num_tokens, TOKENS),)](
        x_TD, row_TK, weights_TK, out_RD, weight_R, num_tokens, x_TD.shape[1], K=top_k, TOKENS=TOKENS, COLUMNS=COLUMNS
    )


def scatter_gradient(
    grad_TD: Tensor, row_TK: Tensor, chosen_TK: Tensor, bias_ED: Tensor | None, out_RD: Tensor
) -> Tensor:
    """Writes each token's gradient into its rows.

    Returns:
        The part of the combine weights' gradient (T, K) that comes from the second layer's bias.
    """
    num_tokens, top_k = row_TK.shape
    grad_weights_TK = torch.empty(row_TK.shape, dtype=torch.float32, device=grad_TD.device)
    _scatter_gradient[(cdiv(num_tokens, TOKENS),)](
        grad_TD, row_TK, chosen_TK, bias_ED, out_RD, grad_weights_TK, num_tokens, out_RD.shape[1],
        HAS_BIAS=bias_ED is not None, K=top_k, CHOICES=next_power_of_2(top_k), TOKENS=TOKENS, COLUMNS=COLUMNS,
    )  # fmt: skip
    return grad_weights_TK


def combine(
    y_RD: Tensor, row_TK: Tensor, chosen_TK: Tensor, weights_TK: Tensor, bias_ED: Tensor | None, out_TD: Tensor
) -> None:
    """Sum of each token's rows, which are weighted already, and of their experts' biases times the weights."""
    num_tokens, top_k = row_TK.shape
    grid = (cdiv(num_tokens, TOKENS), cdiv(y_RD.shape[1], COLUMNS))
    _combine[grid](
        y_RD, row_TK, chosen_TK, weights_TK, bias_ED, out_TD, num_tokens, y_RD.shape[1],
        HAS_BIAS=bias_ED is not None, K=top_k, TOKENS=TOKENS, COLUMNS=COLUMNS,
    )  # fmt: skip


def gather_sum(grad_RD: Tensor, row_TK: Tensor, out_TD: Tensor) -> None:
    """The sum of each token's rows."""
    num_tokens, top_k = row_TK.shape
    grid = (cdiv(num_tokens, TOKENS), cdiv(grad_RD.shape[1], COLUMNS))
    _gather_sum[grid](grad_RD, row_TK, out_TD, num_tokens, grad_RD.shape[1], K=top_k, TOKENS=TOKENS, COLUMNS=COLUMNS)


def add_parts(parts_RP: Tensor, row_TK: Tensor, out_TK: Tensor) -> None:
    """Adds to each choice the sum over P of its row's parts."""
    block = 128
    _add_parts[(cdiv(row_TK.numel(), block),)](
        parts_RP, row_TK, out_TK, row_TK.numel(), parts_RP.shape[1],
        BLOCK=block, PARTS=next_power_of_2(parts_RP.shape[1]),
    )  # fmt: skip


def zero_free_rows(rows_RD: Tensor, segments: Segments, weight_R: Tensor | None = None, alignment: int = 1) -> None:
    """Zeros in each expert's rows behind its last one: up to the end of its share or, if that is 0, of its last tile.

    Sums over an expert's rows run over these too.

    Args:
        rows_RD: The rows.
        segments: Whose they are.
        weight_R: Gets zeros in the same places.
        alignment: The first row that gets zeros is a multiple of this: what comes before is not free.
    """
    columns = 128
    grid = (segments.starts_E.shape[0], cdiv(rows_RD.shape[1], columns))
    _zero_free[grid](
        rows_RD, weight_R, segments.starts_E, segments.counts_E, rows_RD.shape[1], segments.share,
        HAS_WEIGHT=weight_R is not None, FROM=alignment, ALIGN=ALIGNMENT, ROWS=16, COLUMNS=columns,
    )  # fmt: skip


def weighted_row_sums(rows_RD: Tensor, weight_R: Tensor, segments: Segments, out_ED: Tensor) -> None:
    """The sum of each expert's rows times their weights."""
    num_experts, width = out_ED.shape
    splits = max(1, min(32, next_power_of_2(rows_RD.shape[0] // (num_experts * 256) + 1)))
    parts = torch.empty(num_experts, splits, width, dtype=torch.float32, device=rows_RD.device)
    columns = 128
    _row_sums[(num_experts, splits, cdiv(width, columns))](
        rows_RD, weight_R, segments.starts_E, segments.counts_E, parts, width, ROWS=32, COLUMNS=columns
    )
    torch.sum(parts, 1, dtype=out_ED.dtype, out=out_ED)


def tile_sums(parts_MD: Tensor, segments: Segments, tile_rows: int, out_ED: Tensor) -> None:
    """The sum over an expert's tiles of what each left in its row of `parts_MD`."""
    num_experts, width = out_ED.shape
    columns = 64
    _tile_sums[(num_experts, cdiv(width, columns))](
        parts_MD, segments.starts_E, segments.counts_E, out_ED, width, segments.share,
        TILE=tile_rows, ROWS=32, COLUMNS=columns,
    )  # fmt: skip


@triton.jit
def _scatter(
    x, row, weights, out, weight_of_row, num_tokens, width, K: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < num_tokens
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = is_token[:, None] & (column < width)[None, :]
        value = tl.load(x + token[:, None].to(tl.int64) * width + column[None, :], mask=inside, other=0.0)
        value = value.to(out.dtype.element_ty)
        for k in tl.static_range(K):
            to = tl.load(row + token * K + k, mask=is_token, other=-1)
            tl.store(out + to[:, None].to(tl.int64) * width + column[None, :], value, mask=inside & (to >= 0)[:, None])
    for k in tl.static_range(K):
        to = tl.load(row + token * K + k, mask=is_token, other=-1)
        weight = tl.load(weights + token * K + k, mask=is_token, other=0.0)
        tl.store(weight_of_row + to, weight.to(tl.float32), mask=to >= 0)


@triton.jit
def _scatter_gradient(
    grad, row, chosen, bias, out, grad_weights, num_tokens, width,
    HAS_BIAS: tl.constexpr, K: tl.constexpr, CHOICES: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < num_tokens
    choice = tl.arange(0, CHOICES)
    dots = tl.zeros((TOKENS, CHOICES), dtype=tl.float32)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        is_column = (column < width)[None, :]
        at = grad + token[:, None].to(tl.int64) * width + column[None, :]
        value = tl.load(at, mask=is_token[:, None] & is_column, other=0.0)
        for k in tl.static_range(K):
            to = tl.load(row + token * K + k, mask=is_token, other=-1)
            inside = (to >= 0)[:, None] & is_column
            at = out + to[:, None].to(tl.int64) * width + column[None, :]
            tl.store(at, value.to(out.dtype.element_ty), mask=inside)
            if HAS_BIAS:
                expert = tl.load(chosen + token * K + k, mask=to >= 0, other=0)
                at = bias + expert[:, None].to(tl.int64) * width + column[None, :]
                dot = tl.sum(value.to(tl.float32) * tl.load(at, mask=inside, other=0.0).to(tl.float32), 1)
                dots += tl.where(choice[None, :] == k, dot[:, None], 0.0)
    at = grad_weights + token[:, None] * K + choice[None, :]
    tl.store(at, dots, mask=is_token[:, None] & (choice < K)[None, :])


@triton.jit
def _combine(
    y, row, chosen, weights, bias, out, num_tokens, width,
    HAS_BIAS: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_token, is_column = token < num_tokens, column < width
    total = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for k in tl.static_range(K):
        source = tl.load(row + token * K + k, mask=is_token, other=-1)
        inside = (source >= 0)[:, None] & is_column[None, :]
        value = tl.load(y + source[:, None].to(tl.int64) * width + column[None, :], mask=inside, other=0.0)
        total += value.to(tl.float32)
        if HAS_BIAS:
            weight = tl.load(weights + token * K + k, mask=is_token, other=0.0).to(tl.float32)
            expert = tl.load(chosen + token * K + k, mask=is_token, other=0)
            at = bias + expert[:, None].to(tl.int64) * width + column[None, :]
            total += weight[:, None] * tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at = out + token[:, None].to(tl.int64) * width + column[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=is_token[:, None] & is_column[None, :])


@triton.jit
def _gather_sum(grad, row, out, num_tokens, width, K: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_token, is_column = token < num_tokens, column < width
    total = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for k in tl.static_range(K):
        source = tl.load(row + token * K + k, mask=is_token, other=-1)
        inside = (source >= 0)[:, None] & is_column[None, :]
        at = grad + source[:, None].to(tl.int64) * width + column[None, :]
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at = out + token[:, None].to(tl.int64) * width + column[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=is_token[:, None] & is_column[None, :])


@triton.jit
def _add_parts(parts, row, out, num_choices, num_parts, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    choice = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, PARTS)
    is_choice = choice < num_choices
    source = tl.load(row + choice, mask=is_choice, other=-1)
    inside = (source >= 0)[:, None] & (part < num_parts)[None, :]
    values = tl.load(parts + source[:, None].to(tl.int64) * num_parts + part[None, :], mask=inside, other=0.0)
    tl.store(out + choice, tl.load(out + choice, mask=is_choice, other=0.0) + tl.sum(values, 1), mask=is_choice)


@triton.jit
def _zero_free(
    rows, weight_of_row, starts, counts, width, share, HAS_WEIGHT: tl.constexpr, FROM: tl.constexpr,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    count = tl.load(counts + expert)
    start = expert * share if share > 0 else tl.load(starts + expert)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    end = share if share > 0 else (count + ALIGN - 1) // ALIGN * ALIGN
    for first in range((count + FROM - 1) // FROM * FROM, end, ROWS):
        row = first + tl.arange(0, ROWS)
        at = rows + (start + row)[:, None].to(tl.int64) * width + column[None, :]
        inside = (row < end)[:, None] & (column < width)[None, :]
        tl.store(at, tl.zeros((ROWS, COLUMNS), dtype=rows.dtype.element_ty), mask=inside)
        if HAS_WEIGHT:
            is_first = (row < end) & (tl.program_id(1) == 0)
            tl.store(weight_of_row + start + row, tl.zeros((ROWS,), dtype=tl.float32), mask=is_first)


@triton.jit
def _row_sums(rows, weight_of_row, starts, counts, parts, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    expert, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    start, count = tl.load(starts + expert), tl.load(counts + expert)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    each = tl.cdiv(tl.cdiv(count, splits), ROWS) * ROWS
    end = tl.minimum(count, (split + 1) * each)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(split * each, end, ROWS):
        row = first + tl.arange(0, ROWS)
        weight = tl.load(weight_of_row + start + row, mask=row < end, other=0.0)
        at = rows + (start + row)[:, None].to(tl.int64) * width + column[None, :]
        inside = (row < end)[:, None] & (column < width)[None, :]
        total += weight[:, None] * tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at = parts + (expert * splits + split).to(tl.int64) * width + column
    tl.store(at, tl.sum(total, 0), mask=column < width)


@triton.jit
def _tile_sums(parts, starts, counts, out, width, share, TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    expert = tl.program_id(0)
    start = (expert * share if share > 0 else tl.load(starts + expert)) // TILE
    count = tl.cdiv(tl.load(counts + expert), TILE)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        at = parts + (start + row)[:, None].to(tl.int64) * width + column[None, :]
        total += tl.load(at, mask=(row < count)[:, None] & (column < width)[None, :], other=0.0)
    tl.store(out + expert * width + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < width)
