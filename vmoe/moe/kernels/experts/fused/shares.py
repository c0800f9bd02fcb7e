"""Operators that move tokens into equal shares of rows and back, for experts on other ranks.

T tokens of width D with K choices; R rows, the same number for each of E experts. See `row_kernels` for row_TK and
choice_R.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vmoe.moe.kernels.experts.fused import row_kernels
from vmoe.moe.kernels.experts.fused.owners import RowOwners
from vmoe.moe.kernels.interface import Choices
from vmoe.moe.kernels.operators import operator


class ShareRows(NamedTuple):
    """The rows of the choices after `dispatch_by_capacity`.

    Attributes:
        row_TK: The row of each choice, -1 for none.
        choice_R: The choice in each row, -1 for none.
        num_experts: E.
        share: Rows of each expert.
    """

    row_TK: Tensor
    choice_R: Tensor
    num_experts: int
    share: int


def dispatch_by_capacity(
    x_TD: Tensor, choices: Choices, num_experts: int, dtype: torch.dtype
) -> tuple[Tensor, ShareRows]:
    """The tokens in their rows (R, D) of type `dtype`, with G * C rows per expert."""
    share = choices.groups.count * choices.capacity
    row_TK = rows_of_choices(choices, share)
    x_RD, choice_R = scatter_shares(x_TD, row_TK, num_experts * share, dtype)
    return x_RD, ShareRows(row_TK, choice_R, num_experts, share)


def combine_by_capacity(y_RD: Tensor, choices: Choices, rows: ShareRows) -> Tensor:
    """(T, O): the sum of each token's rows, times their combine weights. `y_RD` is (R, O)."""
    chosen_TK, weights_TK = choices.chosen_TK.contiguous(), choices.weights_TK.contiguous()
    return combine_shares(
        y_RD.contiguous(), rows.row_TK, rows.choice_R, chosen_TK, weights_TK, rows.num_experts, rows.share
    )


def rows_of_choices(choices: Choices, share: int) -> Tensor:
    """The row of each choice, (T, K). Every expert has `share` rows, of which it can use G * C."""
    return row_kernels.rows_in_shares(
        choices.chosen_TK.contiguous(), choices.kept_TK, choices.slots_TK, choices.groups.size, choices.capacity, share
    )


def _scatter_into_shares(x_TD: Tensor, row_TK: Tensor, num_rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The tokens in their rows (R, D) of type `dtype`, with zeros in the free rows, and choice_R."""
    x_RD = x_TD.new_empty(num_rows, x_TD.shape[1], dtype=dtype)
    return x_RD, row_kernels.write_rows(x_TD.contiguous(), row_TK, x_RD)


def _fake_scatter(x_TD, row_TK, num_rows, dtype):
    return x_TD.new_empty(num_rows, x_TD.shape[1], dtype=dtype), x_TD.new_empty(num_rows, dtype=torch.int32)


def _save_scatter(ctx, inputs, output) -> None:
    _, choice_R = output
    ctx.mark_non_differentiable(choice_R)
    ctx.save_for_backward(inputs.row_TK)
    ctx.dtype = inputs.x_TD.dtype


def _backward_of_scatter(ctx, grad_RD: Tensor, _) -> dict[str, Tensor]:
    (row_TK,) = ctx.saved_tensors
    return {"x_TD": gather_from_shares(grad_RD, row_TK, ctx.dtype)}


def _gather_from_shares(grad_RD: Tensor, row_TK: Tensor, dtype: torch.dtype) -> Tensor:
    grad_TD = grad_RD.new_empty(row_TK.shape[0], grad_RD.shape[1], dtype=dtype)
    row_kernels.write_token_sums(grad_RD.contiguous(), row_TK, grad_TD)
    return grad_TD


def _fake_gather(grad_RD, row_TK, dtype):
    return grad_RD.new_empty(row_TK.shape[0], grad_RD.shape[1], dtype=dtype)


def _combine_from_shares(
    y_RD: Tensor, row_TK: Tensor, choice_R: Tensor, chosen_TK: Tensor, weights_TK: Tensor, num_experts: int, share: int
) -> Tensor:
    """(T, D): the sum of each token's rows times their combine weights."""
    y_TD = y_RD.new_empty(row_TK.shape[0], y_RD.shape[1])
    row_kernels.write_combined(y_RD, row_TK, chosen_TK, weights_TK, None, y_TD)
    return y_TD


def _fake_combine(y_RD, row_TK, *_):
    return y_RD.new_empty(row_TK.shape[0], y_RD.shape[1])


def _save_combine(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs.y_RD, inputs.choice_R, inputs.weights_TK)
    ctx.num_experts, ctx.share = inputs.num_experts, inputs.share


def _backward_of_combine(ctx, grad_TD: Tensor) -> dict[str, Tensor]:
    y_RD, choice_R, weights_TK = ctx.saved_tensors
    grad_RD, grad_weights_TK = combine_shares_backward(grad_TD, y_RD, choice_R, weights_TK, ctx.num_experts, ctx.share)
    return {"y_RD": grad_RD, "weights_TK": grad_weights_TK}


def _gradient_of_combine(
    grad_TD: Tensor, y_RD: Tensor, choice_R: Tensor, weights_TK: Tensor, num_experts: int, share: int
) -> tuple[Tensor, Tensor]:
    grad_RD = torch.empty_like(y_RD)
    owners = RowOwners(num_experts, share, None, None)
    dots_RP = row_kernels.write_combine_gradient(
        grad_TD.contiguous(), choice_R, weights_TK, y_RD, None, owners, grad_RD, None
    )
    return grad_RD, row_kernels.sum_dots(dots_RP, choice_R, weights_TK)


def _fake_combine_gradient(grad_TD, y_RD, choice_R, weights_TK, *_):
    return torch.empty_like(y_RD), torch.empty_like(weights_TK)


gather_from_shares = operator("gather_sum", _gather_from_shares, _fake_gather)
scatter_shares = operator("scatter", _scatter_into_shares, _fake_scatter, _save_scatter, _backward_of_scatter)
combine_shares_backward = operator("combine_gradient", _gradient_of_combine, _fake_combine_gradient)
combine_shares = operator("combine", _combine_from_shares, _fake_combine, _save_combine, _backward_of_combine)
