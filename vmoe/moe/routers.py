"""Routers: from tokens to gates and chosen experts.

T tokens of width D, in G groups of S tokens; E experts; K choices a token. Names of tensors may end in their axes.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe.moe.config import MoeConfig
from vmoe.moe.groups import Groups


class Routing(NamedTuple):
    """One routing decision: what the router wished, and (once `assign`ed) which choices the experts had room for.

    Attributes:
        groups: How the tokens are grouped.
        valid_GS: Which tokens are real, bool; None when all are.
        logits_GSE: The router's scores, without noise.
        noisy_logits_GSE: The scores that were routed by; `logits_GSE` itself when there is no noise.
        gates_GSE: softmax of `noisy_logits_GSE` over the experts.
        chosen_GSK: The experts of each token, best first, int64.
        weights_GSK: The combine weight of each choice, before drops.
        kept_GSK: Which choices found room, bool; None when no choice can be dropped.
        slots_GSK: The place of each choice among those its expert takes from the group; None when `kept_GSK` is.
        capacity: C, the places an expert has for a group; None for no bound.
    """

    groups: Groups
    valid_GS: Tensor | None
    logits_GSE: Tensor
    noisy_logits_GSE: Tensor
    gates_GSE: Tensor
    chosen_GSK: Tensor
    weights_GSK: Tensor
    kept_GSK: Tensor | None = None
    slots_GSK: Tensor | None = None
    capacity: int | None = None

    def combine_weights_GSK(self) -> Tensor:
        """The combine weights, zero where the choice was dropped."""
        return self.weights_GSK if self.kept_GSK is None else self.weights_GSK * self.kept_GSK


class TokenChoiceRouter(nn.Module):
    """Each token chooses its top-K experts by softmax gates (Riquelme et al. 2021, section 2.2).

    In training the logits get normal noise of standard deviation noise_std / E before the softmax. All of it is
    computed in float32 (or wider), whatever the autocast: half-precision routers are what makes sparse models diverge.

    Args:
        dim: D, width of a token.
        moe: The layer's configuration.
        device: Where the parameters are created.
        dtype: Their type.
    """

    def __init__(self, dim: int, moe: MoeConfig, device=None, dtype=None) -> None:
        super().__init__()
        self.top_k = moe.top_k
        self.renormalize = moe.renormalize
        self.noise_scale = moe.noise_std / moe.num_experts
        self.gate = nn.Linear(dim, moe.num_experts, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """LeCun-normal weights, as the original's Dense layer: logits of unit variance for normalised tokens."""
        nn.init.normal_(self.gate.weight, std=1 / math.sqrt(self.gate.in_features))

    def forward(self, x_TD: Tensor, groups: Groups, valid_GS: Tensor | None = None) -> Routing:
        logits_TE = full_precision_linear(x_TD, self.gate.weight)
        noisy_TE = logits_TE
        if self.training and self.noise_scale > 0:
            noisy_TE = logits_TE + self.noise_scale * torch.randn_like(logits_TE)
        logits_GSE = groups.split(logits_TE)
        noisy_GSE = logits_GSE if noisy_TE is logits_TE else groups.split(noisy_TE)
        return token_choice(logits_GSE, noisy_GSE, groups, self.top_k, self.renormalize, valid_GS)


def token_choice(
    logits_GSE: Tensor,
    noisy_logits_GSE: Tensor,
    groups: Groups,
    top_k: int,
    renormalize: bool = False,
    valid_GS: Tensor | None = None,
) -> Routing:
    """Top-K of the softmax of the noisy logits. Of equal gates, the lower expert is chosen first."""
    gates_GSE = noisy_logits_GSE.softmax(-1)
    chosen_GSK = top_experts(gates_GSE, top_k)
    weights_GSK = gates_GSE.gather(-1, chosen_GSK)
    if renormalize:
        weights_GSK = weights_GSK / weights_GSK.sum(-1, keepdim=True)
    return Routing(groups, valid_GS, logits_GSE, noisy_logits_GSE, gates_GSE, chosen_GSK, weights_GSK)


def top_experts(gates_GSE: Tensor, top_k: int) -> Tensor:
    """The K largest gates' experts (G, S, K), best first.

    K rounds of argmax rather than torch.topk, which leaves open whose turn it is among equal gates.
    """
    remaining_GSE = gates_GSE.detach()
    chosen = []
    for choice in range(top_k):
        best_GS1 = remaining_GSE.argmax(-1, keepdim=True)
        chosen.append(best_GS1)
        if choice + 1 < top_k:
            remaining_GSE = remaining_GSE.scatter(-1, best_GS1, -1.0)
    return torch.cat(chosen, -1)


def full_precision_linear(x: Tensor, weight: Tensor) -> Tensor:
    """X @ weight.T in float32, or in float64 when either is, also under autocast."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    with torch.autocast(x.device.type if x.device.type != "meta" else "cpu", enabled=False):
        return F.linear(x.to(dtype), weight.to(dtype))
