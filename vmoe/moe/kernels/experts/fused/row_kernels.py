"""Moves tokens into the experts' rows and back, forward and backward. Each kernel writes every value once.

T tokens of width D with K choices; R rows. row_TK is -1 where a choice has no row; choice_R is the choice t*K + k in a
row, -1 where the row is free. A free row holds zeros, so products need not skip it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmoe.moe.kernels.experts.fused.owners import RowOwners, expert_of
from vmoe.moe.kernels.launches import launch
from vmoe.moe.kernels.operators import operator
from vmoe.moe.kernels.sizes import STRETCH, cdiv, columns_of, next_power_of_2

TOKENS, COLUMNS = 4, 256  # the tile of one program
FREE_ROWS = 16  # rows of which a program finds the free ones


def _rows_of_choices_in_shares(
    chosen_TK: Tensor, kept_TK: Tensor, slots_TK: Tensor, group_size: int, capacity: int, share: int
) -> Tensor:
    """The row of each choice, (T, K) int32: e * share + g * C + slot, with C slots per expert and group."""
    row_TK = torch.empty_like(chosen_TK, dtype=torch.int32)
    block = 1024
    launch(
        _place_in_shares, (cdiv(row_TK.numel(), block),),
        (chosen_TK.contiguous(), kept_TK.contiguous(), slots_TK.contiguous(), row_TK),
        (row_TK.numel(), group_size * chosen_TK.shape[1], capacity, share, block),
    )  # fmt: skip
    return row_TK


rows_in_shares = operator(
    "rows_in_shares", _rows_of_choices_in_shares, lambda chosen_TK, *_: torch.empty_like(chosen_TK, dtype=torch.int32)
)


def write_rows(x_TD: Tensor, row_TK: Tensor, out_RD: Tensor, choice_R: Tensor | None = None) -> Tensor:
    """Writes each token into its rows and zeros into the free ones.

    Returns:
        choice_R, int32. Where it is known already, one kernel does all.
    """
    num_tokens, top_k = row_TK.shape
    num_rows, width = out_RD.shape
    token_programs, row_programs = cdiv(num_tokens, TOKENS), cdiv(num_rows, FREE_ROWS)
    numbers = (num_tokens, num_rows, width, top_k, TOKENS, FREE_ROWS, COLUMNS)
    if choice_R is not None:
        launch(_dispatch, (token_programs + row_programs,), (x_TD, row_TK, out_RD, choice_R), numbers)
        return choice_R
    choice_R = torch.full((num_rows,), -1, dtype=torch.int32, device=x_TD.device)
    launch(_scatter, (token_programs,), (x_TD, row_TK, out_RD, choice_R), (num_tokens, width, top_k, TOKENS, COLUMNS))
    launch(_zero_free, (row_programs,), (choice_R, out_RD), (num_rows, width, FREE_ROWS, COLUMNS))
    return choice_R


def write_combined(
    y_RD: Tensor, row_TK: Tensor, chosen_TK: Tensor, weights_TK: Tensor, bias_ED: Tensor | None, out_TD: Tensor
) -> None:
    """Writes the sum of each token's rows, with their experts' biases, times the combine weights."""
    num_tokens, top_k = row_TK.shape
    grid = (cdiv(num_tokens, TOKENS), cdiv(y_RD.shape[1], COLUMNS))
    launch(
        _combine, grid, (y_RD, row_TK, chosen_TK, weights_TK, bias_ED, out_TD),
        (num_tokens, y_RD.shape[1], bias_ED is not None, top_k, TOKENS, COLUMNS),
    )  # fmt: skip


def write_combine_gradient(
    grad_TD: Tensor, choice_R: Tensor, weights_TK: Tensor, y_RD: Tensor, bias_ED: Tensor | None, owners: RowOwners,
    out_RD: Tensor, grad_bias_ED: Tensor | None,
) -> Tensor:  # fmt: skip
    """Writes the gradients of the rows of `write_combined`, zeros in free ones, and of its bias.

    Args:
        grad_TD: The gradient of its result.
        choice_R: The choice in each row.
        weights_TK: The combine weights.
        y_RD: Its rows.
        bias_ED: Its bias.
        owners: Which expert owns which rows.
        out_RD: Takes the rows' gradients.
        grad_bias_ED: Takes the bias's; None without one.

    Returns:
        Parts of the gradient of each row's combine weight, float32. Their sum is left to another kernel, since atomic
        additions would not repeat bit for bit.
    """
    num_rows, width = y_RD.shape
    num_experts = owners.num_experts
    columns = 128
    num_columns = cdiv(width, columns)
    dots_RP = torch.empty(num_rows, num_columns, dtype=torch.float32, device=y_RD.device)
    num_stretches = cdiv(num_rows, STRETCH)
    bias_parts_MD = dots_RP.new_empty(num_stretches, width)
    launch(
        _combine_gradient, (num_stretches, num_columns),
        (grad_TD, choice_R, weights_TK, y_RD, bias_ED, owners.starts_E, out_RD, dots_RP, bias_parts_MD),
        (
            num_rows, width, num_experts, owners.share, weights_TK.shape[1], bias_ED is not None, owners.share > 0,
            STRETCH, 8, columns, columns_of(num_experts),
        ),
    )  # fmt: skip
    if bias_ED is not None:
        write_expert_sums(bias_parts_MD, owners, STRETCH, grad_bias_ED)
    return dots_RP


def sum_dots(dots_RP: Tensor, choice_R: Tensor, weights_TK: Tensor) -> Tensor:
    """The gradient of the combine weights, in their type, by the parts of their rows."""
    num_rows, num_parts = dots_RP.shape
    grad_weights_TK = torch.zeros(weights_TK.shape, dtype=torch.float32, device=dots_RP.device)
    launch(
        _sum_dots, (cdiv(num_rows, 256),), (dots_RP, choice_R, grad_weights_TK),
        (num_rows, num_parts, 256, next_power_of_2(num_parts)),
    )  # fmt: skip
    return grad_weights_TK.to(weights_TK.dtype)


def write_token_sums(grad_RD: Tensor, row_TK: Tensor, out_TD: Tensor) -> None:
    """Writes the sum of each token's rows."""
    num_tokens, top_k = row_TK.shape
    grid = (cdiv(num_tokens, TOKENS), cdiv(grad_RD.shape[1], COLUMNS))
    launch(_gather_sum, grid, (grad_RD, row_TK, out_TD), (num_tokens, grad_RD.shape[1], top_k, TOKENS, COLUMNS))


def write_expert_sums(parts_MD: Tensor, owners: RowOwners, tile_rows: int, out_ED: Tensor) -> None:
    """Writes each expert's sum of the rows of `parts_MD`, to which each of its tiles wrote one."""
    num_experts, width = out_ED.shape
    columns = 64
    launch(
        _tile_sums, (num_experts, cdiv(width, columns)), (parts_MD, owners.starts_E, owners.counts_E, out_ED),
        (width, owners.share, owners.share > 0, tile_rows, 32, columns),
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_choices", "choices_of_group", "capacity", "share"])
def _place_in_shares(chosen, kept, slots, row, num_choices, choices_of_group, capacity, share, BLOCK: tl.constexpr):
    choice = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = choice < num_choices
    expert = tl.load(chosen + choice, mask=inside, other=0).to(tl.int32)
    slot = tl.load(slots + choice, mask=inside, other=0).to(tl.int32)
    is_kept = tl.load(kept + choice, mask=inside, other=0) != 0
    to = expert * share + choice // choices_of_group * capacity + slot
    tl.store(row + choice, tl.where(is_kept, to, -1), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def _scatter(
    x, row, out, choice_of_row, num_tokens, width, K: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr
):
    _copy_tokens(tl.program_id(0), x, row, out, choice_of_row, num_tokens, width, K, TOKENS, COLUMNS)


@triton.jit(do_not_specialize=["num_rows"])
def _zero_free(choice_of_row, out, num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    _write_zeros(tl.program_id(0), choice_of_row, out, num_rows, width, ROWS, COLUMNS)


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _dispatch(
    x, row, out, choice_of_row, num_tokens, num_rows, width, K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    token_programs = tl.cdiv(num_tokens, TOKENS)
    if tl.program_id(0) < token_programs:
        _copy_tokens(tl.program_id(0), x, row, out, choice_of_row, num_tokens, width, K, TOKENS, COLUMNS)
    else:
        _write_zeros(tl.program_id(0) - token_programs, choice_of_row, out, num_rows, width, ROWS, COLUMNS)


@triton.jit
def _copy_tokens(
    index, x, row, out, choice_of_row, num_tokens, width, K: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr
):
    token = index * TOKENS + tl.arange(0, TOKENS)
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
        tl.store(choice_of_row + to, token * K + k, mask=to >= 0)


@triton.jit
def _write_zeros(index, choice_of_row, out, num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = index * ROWS + tl.arange(0, ROWS)
    is_free = (row < num_rows) & (tl.load(choice_of_row + row, mask=row < num_rows, other=0) < 0)
    if tl.max(is_free.to(tl.int32), 0) > 0:
        for first in range(0, width, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            at = out + row[:, None].to(tl.int64) * width + column[None, :]
            zeros = tl.zeros((ROWS, COLUMNS), dtype=out.dtype.element_ty)
            tl.store(at, zeros, mask=is_free[:, None] & (column < width)[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
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
        value = value.to(tl.float32)
        if HAS_BIAS:
            expert = tl.load(chosen + token * K + k, mask=is_token, other=0)
            at = bias + expert[:, None].to(tl.int64) * width + column[None, :]
            value += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(weights + token * K + k, mask=is_token, other=0.0).to(tl.float32)[:, None] * value
    at = out + token[:, None].to(tl.int64) * width + column[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=is_token[:, None] & is_column[None, :])


@triton.jit(do_not_specialize=["num_rows", "share"])
def _combine_gradient(
    grad, choice_of_row, weights, y, bias, starts, out, dots, bias_parts, num_rows, width, num_experts, share,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SHARE: tl.constexpr, STRETCH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = (column < width)[None, :]
    added = tl.zeros((1, COLUMNS), dtype=tl.float32)
    if HAS_BIAS:
        expert = expert_of(tl.program_id(0) * STRETCH, starts, num_experts, share, HAS_SHARE, EXPERTS)
        added = tl.load(bias + expert * width + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, STRETCH, ROWS):
        row = tl.program_id(0) * STRETCH + first + tl.arange(0, ROWS)
        is_row = row < num_rows
        choice = tl.load(choice_of_row + row, mask=is_row, other=-1)
        is_used = choice >= 0
        weight = tl.load(weights + choice, mask=is_used, other=0.0).to(tl.float32)
        inside = is_used[:, None] & is_column
        at_row = row[:, None].to(tl.int64) * width + column[None, :]
        at_token = (choice // K)[:, None].to(tl.int64) * width + column[None, :]
        value = tl.load(y + at_row, mask=inside, other=0.0).to(tl.float32) + added
        slope = tl.load(grad + at_token, mask=inside, other=0.0).to(tl.float32)
        at_dot = dots + row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(at_dot, tl.sum(slope * value, 1), mask=is_row)
        slope *= weight[:, None]
        tl.store(out + at_row, slope.to(out.dtype.element_ty), mask=is_row[:, None] & is_column)
        total += slope
    if HAS_BIAS:
        at = bias_parts + tl.program_id(0).to(tl.int64) * width + column
        tl.store(at, tl.sum(total, 0), mask=column < width)


@triton.jit(do_not_specialize=["num_rows"])
def _sum_dots(dots, choice_of_row, out, num_rows, num_parts, ROWS: tl.constexpr, PARTS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.arange(0, PARTS)
    choice = tl.load(choice_of_row + row, mask=row < num_rows, other=-1)
    inside = (choice >= 0)[:, None] & (part < num_parts)[None, :]
    value = tl.load(dots + row[:, None].to(tl.int64) * num_parts + part[None, :], mask=inside, other=0.0)
    tl.store(out + choice, tl.sum(value, 1), mask=choice >= 0)


@triton.jit(do_not_specialize=["num_tokens"])
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


@triton.jit(do_not_specialize=["share"])
def _tile_sums(
    parts, starts, counts, out, width, share, HAS_SHARE: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    if HAS_SHARE:
        start, count = expert * share // TILE, share // TILE
    else:
        start, count = tl.load(starts + expert) // TILE, tl.cdiv(tl.load(counts + expert), TILE)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        at = parts + (start + row)[:, None].to(tl.int64) * width + column[None, :]
        total += tl.load(at, mask=(row < count)[:, None] & (column < width)[None, :], other=0.0)
    tl.store(out + expert * width + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < width)
