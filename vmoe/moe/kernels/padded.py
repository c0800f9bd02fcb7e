"""Backend `padded`: a place for every slot of every expert, multiplied by one batched matrix product.

Static shapes and no host synchronisation; computes capacity_factor times the routed work. Needs a capacity.
"""

import torch
from torch import Tensor

from vmoe.moe.kernels import composed
from vmoe.moe.kernels.interface import Choices, Mlp
from vmoe.moe.kernels.rows import Layout


def expert_mlp(x_TD: Tensor, choices: Choices, mlp: Mlp) -> Tensor:
    """(T, D) -> (T, O), see `kernels`. Needs a capacity."""
    return composed.expert_mlp(x_TD, choices, mlp, layout(choices, mlp.weight1.shape[0]), linear)


def layout(choices: Choices, num_experts: int) -> Layout:
    """Row = expert * (G*C) + group * C + slot."""
    chosen_TK, _, kept_TK, slots_TK, groups, capacity = choices
    num_rows = num_experts * groups.count * capacity
    tokens = torch.arange(chosen_TK.shape[0], device=chosen_TK.device)
    group_T1 = (tokens // max(groups.size, 1))[:, None]
    row_TK = (chosen_TK * groups.count + group_T1) * capacity + slots_TK
    row_TK = torch.where(kept_TK, row_TK, num_rows)
    # one place more than there are rows catches the dropped choices
    choice_R = row_TK.new_full((num_rows + 1,), row_TK.numel())
    choices = torch.arange(row_TK.numel(), device=row_TK.device)
    return Layout(row_TK, choice_R.scatter(0, row_TK.reshape(-1), choices)[:num_rows])


def linear(x_RD: Tensor, weight_EOD: Tensor, bias_EO: Tensor | None, layout: Layout | None) -> Tensor:
    """Each expert's rows times its weights."""
    num_experts = weight_EOD.shape[0]
    x_ECD = x_RD.view(num_experts, x_RD.shape[0] // num_experts, x_RD.shape[1])
    weight_EDO = weight_EOD.transpose(1, 2)
    y_ECO = torch.bmm(x_ECD, weight_EDO) if bias_EO is None else torch.baddbmm(bias_EO[:, None], x_ECD, weight_EDO)
    return y_ECO.view(x_RD.shape[0], weight_EOD.shape[1])
