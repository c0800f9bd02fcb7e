"""Backend `padded`: a place for every slot of every expert, multiplied by one batched matrix product.

Static shapes and no host synchronisation; computes capacity_factor times the routed work. Needs a capacity.
"""

import torch
from torch import Tensor

from vmoe.moe.groups import Groups
from vmoe.moe.kernels.rows import Layout


def layout(
    chosen_TK: Tensor,
    kept_TK: Tensor,
    slots_TK: Tensor,
    groups: Groups,
    capacity: int,
    num_experts: int,
) -> Layout:
    """Row = expert * (G*C) + group * C + slot."""
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
