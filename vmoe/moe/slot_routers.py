"""Routers that fill a fixed number of slots per expert, image by image: expert choice and Soft MoE.

T tokens of width D, in G groups (images) of S tokens; E experts of C slots per group.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vmoe.moe.assignment import Capacity, expert_capacity, expert_choice
from vmoe.moe.config import MoeConfig
from vmoe.moe.groups import Groups
from vmoe.moe.kernels import PLAIN, Kernels
from vmoe.moe.routing import Routed, SoftRouting
from vmoe.moe.scores import Gate, full_precision_linear, gate_scores, with_noise


class ExpertChoiceRouter(nn.Module):
    """Each expert chooses the C tokens of an image with the largest gates (Zhou et al. 2022,
    https://arxiv.org/abs/2202.09368, section 3.2, with gates normalised over the experts as in the V-MoE code).

    The load is balanced by construction. Several experts or none may choose a token. The combine weights are the gates,
    not renormalised.

    Args:
        dim: D, width of a token.
        moe: The layer's configuration.
        device: Where the parameters are created.
        dtype: Their type.
    """

    def __init__(self, dim: int, moe: MoeConfig, device=None, dtype=None) -> None:
        super().__init__()
        self.noise_scale = moe.logit_noise
        self.draw_noise: Callable[[Tensor], Tensor] | None = None
        self.gate = Gate(dim, moe.num_experts, bias=False, device=device, dtype=dtype)
        nn.init.normal_(self.gate.weight, std=1 / math.sqrt(dim))

    def forward(
        self, x_TD: Tensor, groups: Groups, valid_GS: Tensor | None, capacity: Capacity, kernels: Kernels = PLAIN
    ) -> Routed:
        logits_GSE = groups.split(gate_scores(x_TD, self.gate, kernels))
        if self.training:
            logits_GSE = with_noise(logits_GSE, self.noise_scale, self.draw_noise)
        return Routed(expert_choice(logits_GSE.softmax(-1), groups, capacity, valid_GS), x_TD)


class SoftRouter(nn.Module):
    """Soft MoE: every slot is a weighted mean of an image's tokens (Puigcerver et al. 2024,
    https://arxiv.org/abs/2308.00951, algorithms 1 and 2).

    The slots, P = C per expert, are parameters. Their number follows from the number of tokens per image at
    construction. Images with more or fewer tokens are mixed into the same slots.

    Args:
        dim: D, width of a token.
        moe: The layer's configuration. `soft_scale` is the initial scale of the cosine logits.
        tokens: S, tokens per image.
        device: Where the parameters are created.
        dtype: Their type.

    Attributes:
        mu: (D, E, P) the slots' parameters.
        scale: () the learned scale.
    """

    def __init__(self, dim: int, moe: MoeConfig, tokens: int, device=None, dtype=None) -> None:
        super().__init__()
        slots = expert_capacity(tokens, moe.num_experts, moe.experts_per_token, *moe.rounding)
        self.noise_scale = moe.noise
        self.draw_noise: Callable[[Tensor], Tensor] | None = None
        self.mu = nn.Parameter(torch.empty(dim, moe.num_experts, slots, device=device, dtype=dtype))
        self.scale = nn.Parameter(torch.full((), moe.soft_scale, device=device, dtype=dtype))
        nn.init.normal_(self.mu, std=1 / math.sqrt(dim))

    def forward(
        self,
        x_TD: Tensor,
        groups: Groups,
        valid_GS: Tensor | None = None,
        capacity: None = None,  # the slots are parameters
        kernels: Kernels = PLAIN,
    ) -> Routed:
        dim, num_experts, slots = self.mu.shape
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        mu_DN = self.scale.to(dtype) * _unit(self.mu.to(dtype), 0).reshape(dim, num_experts * slots)
        logits_TN = full_precision_linear(_unit(x_TD.to(dtype), -1), mu_DN.t(), kernels)
        if self.training:
            logits_TN = with_noise(logits_TN, self.noise_scale, self.draw_noise)
        logits_GSN = groups.split(logits_TN)
        combine_GSN = logits_GSN.softmax(-1)
        if valid_GS is not None:  # padding enters no slot and gets no result
            # not -inf: an image of only padding would give NaN weights and gradients
            logits_GSN = logits_GSN.masked_fill(~valid_GS[..., None], torch.finfo(logits_GSN.dtype).min)
            combine_GSN = combine_GSN * valid_GS[..., None]
        dispatch_GSN = logits_GSN.softmax(1)
        if valid_GS is not None:
            dispatch_GSN = dispatch_GSN * valid_GS[..., None]
        shape = (groups.count, groups.size, num_experts, slots)
        return Routed(SoftRouting(groups, valid_GS, dispatch_GSN.view(shape), combine_GSN.view(shape)), x_TD)


def _unit(values: Tensor, dim: int) -> Tensor:
    """Scales to length 1 along `dim`, with the epsilon of the original code."""
    return values * (values.square().sum(dim, keepdim=True) + 1e-6).rsqrt()
