"""Reorders the hidden units of one expert to match another's, so that the two can be averaged.

An MLP's function does not depend on the order of its hidden units. So two experts may have learnt similar units in
different orders. The best match is an assignment problem (Ainsworth et al. 2023, https://arxiv.org/abs/2209.04836,
section 3.2; for experts Li et al. 2024, https://arxiv.org/abs/2310.01334).

E experts of H hidden units; D inputs, O outputs.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from vmoe.moe.experts import Experts
from vmoe.moe.mlps import Glu


def expert_weights(experts: Experts, expert: int) -> dict[str, Tensor]:
    """One expert's parameters, by their names in `Experts`, without the leading axis."""
    return {
        name: value.detach()[expert]
        for name, value in experts.named_parameters()
        if name.startswith(("fc1.", "fc2.", "norm."))
    }


def best_order(weights: dict[str, Tensor], reference: dict[str, Tensor], is_gated: bool) -> Tensor:
    """The order of the hidden units of `weights` that matches `reference` best.

    Args:
        weights: An expert's parameters, from `expert_weights`.
        reference: Another expert's parameters of the same shape.
        is_gated: Whether the first layer has two rows per hidden unit (`Glu`).

    Returns:
        (H,) int64: for each unit of the reference, the unit of `weights` that matches it.
    """
    units, wanted = (_units(each, is_gated) for each in (weights, reference))
    _, order = linear_sum_assignment((wanted @ units.T).cpu().numpy(), maximize=True)
    return torch.from_numpy(order)


def reordered(weights: dict[str, Tensor], order_H: Tensor, is_gated: bool) -> dict[str, Tensor]:
    """An expert's parameters with its hidden units in another order. Its function stays the same."""
    order_H = order_H.to(weights["fc2.weight"].device)
    rows = torch.cat([order_H, order_H + len(order_H)]) if is_gated else order_H

    def moved(name: str, value: Tensor) -> Tensor:
        if name.startswith("fc1."):
            return value[rows]
        if name.startswith("norm."):
            return value[order_H]
        return value[:, order_H] if name == "fc2.weight" else value

    return {name: moved(name, value) for name, value in weights.items()}


def has_gate(experts: Experts) -> bool:
    """Whether the first layer has two rows per hidden unit."""
    return isinstance(experts.act, Glu)


def _units(weights: dict[str, Tensor], is_gated: bool) -> Tensor:
    """All parameters of each hidden unit side by side: (H, ...), float64."""
    first = [weights["fc1.weight"]] + ([weights["fc1.bias"][:, None]] if "fc1.bias" in weights else [])
    parts = [half for rows in first for half in rows.chunk(2 if is_gated else 1)]
    parts += [weights[name][:, None] for name in ("norm.weight", "norm.bias") if name in weights]
    return torch.cat([*parts, weights["fc2.weight"].T], 1).double()
