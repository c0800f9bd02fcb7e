"""Backend `fused`: the whole expert MLP in Triton kernels and library products, for CUDA.

`kernels/README.md` lists the steps of the forward and backward pass. No step synchronises with the host or adds
atomically, and shapes are static. So results are repeatable bit for bit, and a CUDA graph can capture the pass.

Where a capacity bounds an expert's rows well, all experts get an equal share of rows, and the library multiplies them.
Else each expert gets as many rows as it needs, and Triton multiplies them.
"""

import torch
from torch import Tensor

from vmoe.moe.kernels.counting import expert_rows
from vmoe.moe.kernels.experts.fused.mlp import (
    ExpertGradientInputs,
    ExpertInputs,
    forward_of_experts,
    fused_experts,
    gradient_of_rows,
)
from vmoe.moe.kernels.experts.fused.shares import combine_by_capacity, dispatch_by_capacity, rows_of_choices
from vmoe.moe.kernels.experts.requirements import Form
from vmoe.moe.kernels.interface import Choices, Mlp
from vmoe.moe.kernels.sizes import rows_of_share


def expert_mlp(x_TD: Tensor, choices: Choices, mlp: Mlp) -> Tensor:
    """(T, D) -> (T, O), see `kernels.experts`."""
    chosen_TK, num_experts = choices.chosen_TK.contiguous(), mlp.weight1.shape[0]
    share = rows_of_share(choices.slots_of_expert, chosen_TK.numel(), num_experts)
    if share:
        starts_E = counts_E = None
        row_TK = rows_of_choices(choices, share)
    else:
        row_TK, starts_E, counts_E = expert_rows(chosen_TK, choices.kept_TK, num_experts)
    form = Form.of(mlp.activation)
    inputs = ExpertInputs(
        x_TD=x_TD.contiguous(),
        row_TK=row_TK,
        chosen_TK=chosen_TK,
        weights_TK=choices.weights_TK.contiguous(),
        starts_E=starts_E,
        counts_E=counts_E,
        weight1_EFD=mlp.weight1,
        bias1_EF=mlp.bias1,
        weight2_EOH=mlp.weight2,
        bias2_EO=mlp.bias2,
        cast1_EFD=mlp.cast(mlp.weight1),
        cast2_EOH=mlp.cast(mlp.weight2),
        share=share,
        function=form.function,
        gate=form.gate,
        is_training=torch.is_grad_enabled() and mlp.is_learned(x_TD, choices.weights_TK),
        recompute=mlp.recompute,
    )
    y_TO, *_ = fused_experts(*inputs)
    return y_TO


__all__ = [
    "ExpertGradientInputs",
    "ExpertInputs",
    "combine_by_capacity",
    "dispatch_by_capacity",
    "expert_mlp",
    "forward_of_experts",
    "gradient_of_rows",
]
