"""Tokens into equal shares of rows and back, as operators, for experts that compute the rows elsewhere.

T tokens of width D with K choices; R rows, as many for each of E experts. See `rows` for row_TK and choice_R.
"""

import torch
from torch import Tensor

from vmoe.moe.kernels.fused import rows
from vmoe.moe.kernels.fused.segments import Segments
from vmoe.moe.kernels.operators import operator


def _scatter(x_TD: Tensor, row_TK: Tensor, num_rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each token in its rows, of another type, and zeros in the free ones: (R, D), choice_R."""
    x_RD = x_TD.new_empty(num_rows, x_TD.shape[1], dtype=dtype)
    with torch.cuda.device_of(x_TD):
        return x_RD, rows.scatter(x_TD.contiguous(), row_TK, x_RD)


def _fake_scatter(x_TD, row_TK, num_rows, dtype):
    return x_TD.new_empty(num_rows, x_TD.shape[1], dtype=dtype), x_TD.new_empty(num_rows, dtype=torch.int32)


def _save_scatter(ctx, inputs, output) -> None:
    x_TD, row_TK, *_ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(row_TK)
    ctx.dtype = x_TD.dtype


def _scatter_backward(ctx, grad_RD: Tensor, _):
    (row_TK,) = ctx.saved_tensors
    return gather_sum(grad_RD, row_TK, ctx.dtype), None, None, None


def _gather_sum(grad_RD: Tensor, row_TK: Tensor, dtype: torch.dtype) -> Tensor:
    grad_TD = grad_RD.new_empty(row_TK.shape[0], grad_RD.shape[1], dtype=dtype)
    with torch.cuda.device_of(grad_RD):
        rows.gather_sum(grad_RD.contiguous(), row_TK, grad_TD)
    return grad_TD


def _fake_gather_sum(grad_RD, row_TK, dtype):
    return grad_RD.new_empty(row_TK.shape[0], grad_RD.shape[1], dtype=dtype)


def _combine(
    y_RD: Tensor, row_TK: Tensor, choice_R: Tensor, chosen_TK: Tensor, weights_TK: Tensor, num_experts: int, share: int
) -> Tensor:
    """(T, D): the sum of each token's rows times their combine weights."""
    y_TD = y_RD.new_empty(row_TK.shape[0], y_RD.shape[1])
    with torch.cuda.device_of(y_RD):
        rows.combine(y_RD, row_TK, chosen_TK, weights_TK, None, y_TD)
    return y_TD


def _fake_combine(y_RD, row_TK, *_):
    return y_RD.new_empty(row_TK.shape[0], y_RD.shape[1])


def _save_combine(ctx, inputs, output) -> None:
    y_RD, _, choice_R, _, weights_TK, num_experts, share = inputs
    ctx.save_for_backward(y_RD, choice_R, weights_TK)
    ctx.shares = num_experts, share


def _combine_backward(ctx, grad_TD: Tensor):
    grad_RD, grad_weights_TK = combine_gradient(grad_TD, *ctx.saved_tensors, *ctx.shares)
    return grad_RD, None, None, None, grad_weights_TK, None, None


def _combine_gradient(
    grad_TD: Tensor, y_RD: Tensor, choice_R: Tensor, weights_TK: Tensor, num_experts: int, share: int
) -> tuple[Tensor, Tensor]:
    grad_RD = torch.empty_like(y_RD)
    segments = Segments(num_experts, share, None, None)
    with torch.cuda.device_of(y_RD):
        grads = rows.combine_gradient(grad_TD.contiguous(), choice_R, weights_TK, y_RD, None, segments, grad_RD, None)
    return grad_RD, grads.to(weights_TK.dtype)


def _fake_combine_gradient(grad_TD, y_RD, choice_R, weights_TK, *_):
    return torch.empty_like(y_RD), torch.empty_like(weights_TK)


gather_sum = operator("gather_sum", _gather_sum, _fake_gather_sum)
scatter = operator("scatter", _scatter, _fake_scatter, _save_scatter, _scatter_backward)
combine_gradient = operator("combine_gradient", _combine_gradient, _fake_combine_gradient)
combine = operator("combine", _combine, _fake_combine, _save_combine, _combine_backward)
