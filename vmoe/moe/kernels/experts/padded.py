"""Backend `padded`: every slot of every expert has a row, and one batched matrix product multiplies them.

Shapes are static, and nothing synchronises with the host. It computes capacity_factor times the routed work, and it
needs a capacity.
"""

import torch
from torch import Tensor

from vmoe.moe.kernels.experts import composed
from vmoe.moe.kernels.experts.rows import RowLayout
from vmoe.moe.kernels.interface import Choices, Mlp


def expert_mlp(x_TD: Tensor, choices: Choices, mlp: Mlp) -> Tensor:
    """(T, D) -> (T, O), see `kernels`. Needs a capacity."""
    layout = padded_layout(choices, mlp.weight1.shape[0])
    return composed.dispatch_compute_combine(x_TD, choices, mlp, layout, padded_linear)


def padded_layout(choices: Choices, num_experts: int) -> RowLayout:
    """Row = expert * (G*C) + group * C + slot."""
    groups, capacity = choices.groups, choices.capacity
    num_rows = num_experts * groups.count * capacity
    tokens = torch.arange(choices.chosen_TK.shape[0], device=choices.chosen_TK.device)
    group_T1 = (tokens // max(groups.size, 1))[:, None]
    row_TK = (choices.chosen_TK * groups.count + group_T1) * capacity + choices.slots_TK
    row_TK = torch.where(choices.kept_TK, row_TK, num_rows)
    # one row more than needed: the dropped choices go to the last one
    choice_R = row_TK.new_full((num_rows + 1,), row_TK.numel())
    each_N = torch.arange(row_TK.numel(), device=row_TK.device)
    return RowLayout(row_TK, choice_R.scatter(0, row_TK.reshape(-1), each_N)[:num_rows])


def padded_linear(x_RD: Tensor, weight_EOD: Tensor, bias_EO: Tensor | None, layout: RowLayout | None) -> Tensor:
    """Each expert's rows times its weights."""
    num_experts = weight_EOD.shape[0]
    x_ECD = x_RD.view(num_experts, x_RD.shape[0] // num_experts, x_RD.shape[1])
    weight_EDO = weight_EOD.transpose(1, 2)
    y_ECO = torch.bmm(x_ECD, weight_EDO) if bias_EO is None else torch.baddbmm(bias_EO[:, None], x_ECD, weight_EDO)
    return y_ECO.view(x_RD.shape[0], weight_EOD.shape[1])
