"""The expert MLP of backends that only lay out rows and multiply them: dispatch, layer, activation, layer, combine."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from vmoe.moe.kernels.experts import rows
from vmoe.moe.kernels.interface import Choices, Mlp

Linear = Callable[[Tensor, Tensor, Tensor | None, rows.RowLayout | None], Tensor]


def dispatch_compute_combine(
    x_TD: Tensor, choices: Choices, mlp: Mlp, layout: rows.RowLayout, linear: Linear
) -> Tensor:
    """(T, D) -> (T, O). `layout` gives the rows, and `linear` multiplies them by the weights."""
    x_RD = rows.dispatch(x_TD.to(mlp.dtype), layout)
    return rows.combine(two_layers(x_RD, mlp, layout, linear), choices.combine_weights_TK(), layout)


def two_layers(x_RD: Tensor, mlp: Mlp, layout: rows.RowLayout | None, linear: Linear) -> Tensor:
    """(R, D) -> (R, O); without a layout each expert has an equal share of the rows."""
    dtype, num_experts = mlp.dtype, mlp.weight1.shape[0]
    bias1_EH, bias2_EO = (None if bias is None else bias.to(dtype) for bias in (mlp.bias1, mlp.bias2))
    # under autocast an activation with parameters of its own returns their type
    hidden_RH = mlp.activation(linear(x_RD, mlp.weight1.to(dtype), bias1_EH, layout)).to(dtype)
    hidden_RH = F.dropout(hidden_RH, mlp.dropout) if mlp.dropout > 0 else hidden_RH
    if mlp.norm is not None:
        expert_R = rows.expert_of_row(layout, hidden_RH.shape[0], num_experts, hidden_RH.device)
        hidden_RH = mlp.norm(hidden_RH, expert_R).to(dtype)
    return linear(hidden_RH, mlp.weight2.to(dtype), bias2_EO, layout)
