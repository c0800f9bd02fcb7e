"""Backend `fused`: the whole expert MLP in Triton kernels and library products, for CUDA.

Forward: scatter the tokens into the experts' rows, first layer, bias and activation, second layer, combine. Backward:
the gradients of the combined rows, of their weights and of the second bias in one pass; through the second layer;
through the activation, with the first bias's gradient; both weights' gradients in the parameters' own type. No host
synchronisation, no atomic addition, static shapes: repeatable bit for bit and capturable in a CUDA graph.

The rows of an expert are a share of its own where a capacity bounds them well (products by the library), else as many
as it needs (products by Triton). Everything that imports Triton is in this package.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vmoe.moe.kernels.fused import shares
from vmoe.moe.kernels.fused.activations import Form
from vmoe.moe.kernels.fused.balance import balance
from vmoe.moe.kernels.fused.mlp import align, fused_experts
from vmoe.moe.kernels.fused.ranks import ALIGNMENT, expert_rows, falling_order, ranks
from vmoe.moe.kernels.fused.router import MAX_EXPERTS, gates, takes_logits
from vmoe.moe.kernels.fused.rows import rows_in_shares
from vmoe.moe.kernels.fused.token_scores import MAX_SCORES, scores, scores_and_tokens
from vmoe.moe.kernels.interface import Choices, Mlp

MIN_CAPABILITY = 8  # Ampere: what Triton supports
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_SHARES = 1.15  # shares may set aside so many times the rows that are chosen
MAX_COMPARED = 2048  # values of a group that `falling_order` orders; the time grows with their square


def what_it_lacks(mlp: Mlp) -> str | None:
    """Which feature of the experts these kernels do not have; None when they have all."""
    if Form.of(mlp.activation) is None:
        return f"activation {type(getattr(mlp.activation, 'act', mlp.activation)).__name__}"
    if mlp.norm is not None:
        return "a norm"
    if mlp.dropout > 0:
        return "dropout"
    return None if mlp.dtype in DTYPES else f"type {mlp.dtype}"


def what_does_not_fit(mlp: Mlp) -> str | None:
    """Which shape these kernels cannot take; None when they can."""
    width_O, width_H = mlp.weight2.shape[1:]
    multiple = 16 // mlp.dtype.itemsize
    widths = {"in_features": mlp.weight1.shape[2], "hidden_features": width_H, "out_features": width_O}
    for name, width in widths.items():
        if width % multiple:
            return f"{name}={width} is no multiple of {multiple}"
    return None


def expert_mlp(x_TD: Tensor, choices: Choices, mlp: Mlp) -> Tensor:
    """(T, D) -> (T, O), see `kernels.interface`."""
    chosen_TK, num_experts = choices.chosen_TK.contiguous(), mlp.weight1.shape[0]
    share = _share(choices, num_experts)
    if share:
        starts_E = counts_E = None
        row_TK = _rows_in_shares(choices, share)
    else:
        row_TK, starts_E, counts_E = expert_rows(chosen_TK, choices.kept_TK, num_experts)
    is_training = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad
        for tensor in (x_TD, choices.weights_TK, mlp.weight1, mlp.bias1, mlp.weight2, mlp.bias2)
    )
    return fused_experts(
        x_TD.contiguous(), row_TK, chosen_TK, choices.weights_TK.contiguous(), starts_E, counts_E,
        mlp.weight1, mlp.bias1, mlp.weight2, mlp.bias2, mlp.cast(mlp.weight1), mlp.cast(mlp.weight2),
        share, *Form.of(mlp.activation), is_training, mlp.recompute,
    )[0]  # fmt: skip


class Places(NamedTuple):
    """Where the choices of `dispatch` stand.

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


def dispatch(x_TD: Tensor, choices: Choices, num_experts: int, dtype: torch.dtype) -> tuple[Tensor, Places]:
    """Rows (R, D) of another type, for each of E experts as many as its capacity, with the tokens in them."""
    share = choices.groups.count * choices.capacity
    row_TK = _rows_in_shares(choices, share)
    x_RD, choice_R = shares.scatter(x_TD, row_TK, num_experts * share, dtype)
    return x_RD, Places(row_TK, choice_R, num_experts, share)


def combine(y_RD: Tensor, choices: Choices, places: Places) -> Tensor:
    """(T, O): the sum over a token's choices of their rows (R, O), as `dispatch` laid them out, times their weights."""
    row_TK, choice_R, *sizes = places
    chosen_TK, weights_TK = choices.chosen_TK.contiguous(), choices.weights_TK.contiguous()
    return shares.combine(y_RD.contiguous(), row_TK, choice_R, chosen_TK, weights_TK, *sizes)


def _rows_in_shares(choices: Choices, share: int) -> Tensor:
    how = (choices.groups.size, choices.capacity, share)
    return rows_in_shares(choices.chosen_TK.contiguous(), choices.kept_TK, choices.slots_TK, *how)


def _share(choices: Choices, num_experts: int) -> int:
    """Rows set aside for each expert, or 0 where that would be wasteful."""
    if choices.capacity is None:
        return 0
    share = align(choices.groups.count * choices.capacity)
    is_tight = num_experts * share <= MAX_SHARES * choices.chosen_TK.numel() + num_experts * ALIGNMENT
    return share if is_tight else 0


__all__ = [
    "MAX_COMPARED", "MAX_EXPERTS", "MAX_SCORES", "MIN_CAPABILITY", "balance", "combine", "dispatch", "expert_mlp",
    "falling_order", "fused_experts", "gates", "ranks", "scores", "scores_and_tokens", "takes_logits",
    "what_does_not_fit", "what_it_lacks",
]  # fmt: skip
