"""Moves tokens into the rows that experts compute, and back.

T tokens of width D; K choices per token, where t*K + k is the k-th choice of token t; R rows of a buffer in which each
expert's tokens lie together. Both directions gather. So neither pass adds atomically, and results are repeatable bit
for bit.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class RowLayout(NamedTuple):
    """The row of each choice in the buffer.

    Attributes:
        row_TK: The row of each choice; R where it has none (dropped).
        choice_R: The choice in each row; T*K where the row is free.
        ends_E: Where each expert's rows end, int32; None if all experts have equal shares of rows.
    """

    row_TK: Tensor
    choice_R: Tensor
    ends_E: Tensor | None = None


def dispatch(x_TD: Tensor, layout: RowLayout) -> Tensor:
    """The buffer (R, D) with each choice's token in its row. A free row holds some token, so its values are finite."""
    return _DispatchRows.apply(x_TD, layout.row_TK, layout.choice_R)


def combine(y_RD: Tensor, weights_TK: Tensor, layout: RowLayout) -> Tensor:
    """(T, D): the sum of each token's rows times their weights. A dropped choice adds nothing."""
    return _CombineRows.apply(y_RD, weights_TK.to(y_RD.dtype), layout.row_TK, layout.choice_R)


def expert_of_row(layout: RowLayout | None, num_rows: int, num_experts: int, device: torch.device) -> Tensor:
    """The expert of each row, (R,). Rows after the last expert's count as its rows."""
    rows_R = torch.arange(num_rows, device=device)
    if layout is None or layout.ends_E is None:
        return rows_R // max(num_rows // num_experts, 1)
    return torch.searchsorted(layout.ends_E.long(), rows_R, right=True).clamp(max=num_experts - 1)


class _DispatchRows(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x_TD: Tensor, row_TK: Tensor, choice_R: Tensor) -> Tensor:
        return x_TD.index_select(0, choice_R.clamp(max=row_TK.numel() - 1) // row_TK.shape[1])

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, row_TK, _ = inputs
        ctx.save_for_backward(row_TK)

    @staticmethod
    def backward(ctx, grad_RD: Tensor):
        (row_TK,) = ctx.saved_tensors
        return _rows_of_choices(grad_RD, row_TK).sum(1), None, None


class _CombineRows(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(y_RD: Tensor, weights_TK: Tensor, row_TK: Tensor, choice_R: Tensor) -> Tensor:
        return (_rows_of_choices(y_RD, row_TK) * weights_TK[..., None]).sum(1)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad_TD: Tensor):
        y_RD, weights_TK, row_TK, choice_R = ctx.saved_tensors
        choice_or_last_R = choice_R.clamp(max=row_TK.numel() - 1)
        weight_R = weights_TK.reshape(-1).index_select(0, choice_or_last_R) * (choice_R < row_TK.numel())
        grad_RD = grad_TD.index_select(0, choice_or_last_R // row_TK.shape[1]) * weight_R[:, None]
        grad_weights_TK = (_rows_of_choices(y_RD, row_TK) * grad_TD[:, None]).sum(-1)
        return grad_RD, grad_weights_TK, None, None


def _rows_of_choices(values_RD: Tensor, row_TK: Tensor) -> Tensor:
    """(T, K, D): the row of each choice, zeros where it has none."""
    num_rows, width = values_RD.shape
    gathered = values_RD.index_select(0, row_TK.reshape(-1).clamp(max=num_rows - 1)).view(*row_TK.shape, width)
    return gathered.masked_fill((row_TK >= num_rows)[..., None], 0)
