"""A slow, obvious MoE layer in float64 NumPy loops, to compare the fast ones with."""

import math

import numpy as np
import torch
from torch import nn

from vmoe.moe import MoeMlp


def oracle_layer(
    layer: MoeMlp, x: torch.Tensor, noise: torch.Tensor | None = None, token_mask: torch.Tensor | None = None
) -> np.ndarray:
    """The expected result of `layer` for tokens x (B, N, D), from its weights. `noise` (B*N, E) is added to the logits.

    `token_mask` (B, N) is False for padding. The oracle removes padding from its group before all else.
    """
    moe = layer.config.resolved()
    images, tokens, width = x.shape
    x_TD = x.detach().double().numpy().reshape(-1, width)
    logits_TE = x_TD @ layer.router.gate.weight.detach().double().numpy().T
    if noise is not None:
        logits_TE = logits_TE + noise.double().numpy()
    gates_TE = np.exp(logits_TE - logits_TE.max(1, keepdims=True))
    gates_TE /= gates_TE.sum(1, keepdims=True)
    choices = [oracle_choices(gates, moe.top_k) for gates in gates_TE]

    per_group = {"image": 1, "batch": images}.get(moe.group, moe.group)
    result = np.zeros((len(x_TD), layer.out_features))
    for first in range(0, images, per_group):
        group = range(first * tokens, min(first + per_group, images) * tokens)
        if token_mask is not None:
            group = [token for token in group if token_mask.flatten()[token]]
        for token, k in oracle_kept(group, gates_TE, choices, moe, layer.training):
            expert = choices[token][k]
            weight = gates_TE[token, expert]
            if moe.renormalize:
                weight /= sum(gates_TE[token, other] for other in choices[token])
            result[token] += weight * oracle_expert(layer, expert, x_TD[token])
    return result.reshape(images, tokens, -1)


def oracle_choices(gates: np.ndarray, top_k: int) -> list[int]:
    return sorted(range(len(gates)), key=lambda expert: (-gates[expert], expert))[:top_k]


def oracle_kept(group, gates_TE, choices, moe, training) -> list[tuple[int, int]]:
    factor = moe.capacity_factor if training else moe.eval_capacity_factor
    capacity = math.inf
    if factor is not None:
        exact = len(group) * moe.top_k * factor / moe.num_experts
        capacity = math.ceil(exact) if moe.capacity_rounding == "ceil" else round(exact)
        capacity = math.ceil(capacity / moe.capacity_multiple_of) * moe.capacity_multiple_of
    order = sorted(group, key=lambda token: (-gates_TE[token].max(), token)) if moe.batch_priority else list(group)
    taken, kept = [0] * moe.num_experts, []
    for k in range(moe.top_k):
        for token in order:
            expert = choices[token][k]
            if taken[expert] < capacity:
                kept.append((token, k))
            taken[expert] += 1
    return kept


def oracle_expert(layer: MoeMlp, expert: int, x: np.ndarray) -> np.ndarray:
    hidden = _linear(layer.experts.fc1, expert, x)
    assert isinstance(layer.experts.act, nn.GELU)
    hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    return _linear(layer.experts.fc2, expert, hidden)


def _linear(linear, expert: int, x: np.ndarray) -> np.ndarray:
    y = linear.weight[expert].detach().double().numpy() @ x
    return y if linear.bias is None else y + linear.bias[expert].detach().double().numpy()
