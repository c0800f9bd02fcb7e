"""Routers by which tokens choose experts, and the table of all routers.

T tokens of width D, in G groups of S tokens; E experts; K choices per token. All scores are computed in float32 or
wider, whatever the autocast: half-precision routers are what makes sparse models diverge.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe.moe.attached import is_bare
from vmoe.moe.config import MoeConfig
from vmoe.moe.groups import Groups
from vmoe.moe.kernels import PLAIN, Kernels
from vmoe.moe.kernels.operators import is_transformed
from vmoe.moe.members import own_experts_only
from vmoe.moe.routing import Routed, Routing
from vmoe.moe.scores import Gate, full_precision_linear, gate_scores, scores_with_tokens, with_noise
from vmoe.moe.slot_routers import ExpertChoiceRouter, SoftRouter


class TokenChoiceRouter(nn.Module):
    """Each token chooses its top-K experts by softmax gates (Riquelme et al. 2021, section 2.2).

    In training the logits get normal noise of standard deviation noise_std / E before the softmax.

    In an ensemble (E3, Allingham et al. 2021, section 4) each member has a router of its own: the rows of the gate that
    belong to its experts. Its tokens see no other logits.

    Args:
        dim: D, width of a token.
        moe: The layer's configuration.
        device: Where the parameters are created.
        dtype: Their type.

    Attributes:
        draw_noise: Draws standard normal numbers in the shape of a tensor of logits; None for torch.randn_like.
    """

    def __init__(self, dim: int, moe: MoeConfig, device=None, dtype=None) -> None:
        super().__init__()
        self.top_k = moe.top_k
        self.renormalize = moe.renormalize
        self.ensemble = moe.ensemble
        self.removed = moe.removed_experts
        self.noise_scale = moe.logit_noise
        self.draw_noise: Callable[[Tensor], Tensor] | None = None
        self.gate = Gate(dim, moe.num_experts + self.removed, bias=False, device=device, dtype=dtype)
        # LeCun-normal, as the original's Dense layer: logits of unit variance for normalised tokens
        nn.init.normal_(self.gate.weight, std=1 / math.sqrt(dim))

    def forward(self, x_TD: Tensor, groups: Groups, valid_GS: Tensor | None = None, kernels: Kernels = PLAIN) -> Routed:
        logits_TE, x_TD = self.scores(x_TD, kernels)
        if self.ensemble > 1:
            logits_TE = own_experts_only(logits_TE, self.ensemble, groups.tokens)
            kernels = PLAIN  # those of the gates were written for finite logits
        noisy_TE = with_noise(logits_TE, self.noise_scale, self.draw_noise) if self.training else logits_TE
        logits_GSE = groups.split(logits_TE)
        noisy_GSE = logits_GSE if noisy_TE is logits_TE else groups.split(noisy_TE)
        routing = token_choice(
            logits_GSE, noisy_GSE, groups, self.top_k, self.renormalize, valid_GS, kernels, removed=self.removed
        )
        return Routed(routing, x_TD)

    def scores(self, x_TD: Tensor, kernels: Kernels = PLAIN) -> tuple[Tensor, Tensor]:
        """The logits (T, E), before noise, and the tokens for the experts (see `Routed`)."""
        return scores_with_tokens(x_TD, self.gate, kernels)


class CosineRouter(TokenChoiceRouter):
    """Token choice by cosine similarity to the experts' embeddings in a space of fewer dimensions, over a learned
    temperature (Chi et al. 2022, https://arxiv.org/abs/2204.09179, section 3.2).
    """

    MAX_DIM = 256  # of the space, as in Swin-MoE (Hwang et al. 2022, https://arxiv.org/abs/2206.03382)
    SMALLEST_TEMPERATURE = 0.01

    def __init__(self, dim: int, moe: MoeConfig, device=None, dtype=None) -> None:
        super().__init__(dim, moe, device, dtype)
        width = moe.cosine_dim or min(dim, self.MAX_DIM)
        self.projection = Gate(dim, width, bias=False, device=device, dtype=dtype)
        self.projection_bias: nn.Parameter | None = None
        if moe.cosine_bias:
            self.projection_bias = nn.Parameter(torch.zeros(width, device=device, dtype=dtype))
        self.gate = Gate(width, moe.num_experts + self.removed, bias=False, device=device, dtype=dtype)
        self.temperature = nn.Parameter(torch.full((), 0.5, device=device, dtype=dtype))
        nn.init.normal_(self.projection.weight, std=1 / math.sqrt(dim))
        nn.init.normal_(self.gate.weight, std=1 / math.sqrt(width))

    def scores(self, x_TD: Tensor, kernels: Kernels = PLAIN) -> tuple[Tensor, Tensor]:
        projected_TP = gate_scores(x_TD, self.projection, kernels)
        if self.projection_bias is not None:
            projected_TP = projected_TP + self.projection_bias.to(projected_TP.dtype)
        projected_TP = F.normalize(projected_TP, dim=-1)
        embeddings_EP = F.normalize(self._embeddings(projected_TP), dim=-1)
        temperature = self.temperature.clamp_min(self.SMALLEST_TEMPERATURE)
        return full_precision_linear(projected_TP, embeddings_EP, kernels) / temperature, x_TD

    def _embeddings(self, like: Tensor) -> Tensor:
        """(E, P); with what is attached to the gate, what it makes of the unit vectors."""
        if is_bare(self.gate, Gate):
            return self.gate.weight.to(like.dtype)
        return gate_scores(torch.eye(like.shape[-1], dtype=like.dtype, device=like.device), self.gate).t()


class SigmoidRouter(TokenChoiceRouter):
    """Token choice by sigmoid gates, balanced without an auxiliary loss (DeepSeek-V3, https://arxiv.org/abs/2412.19437,
    section 2.1.2; Wang et al. 2024, https://arxiv.org/abs/2408.15664, algorithm 1).

    A bias of each expert decides with the gates who is chosen, but not with which weight. After each update of the
    weights, `vmoe.update_router_biases` raises it for experts under their fair load and lowers it for those above. The
    bias stays in float32 in a model of half precision, which has no numbers as close together as its steps.
    """

    def __init__(self, dim: int, moe: MoeConfig, device=None, dtype=None) -> None:
        super().__init__(dim, moe, device, dtype)
        self.bias_update_rate = moe.bias_update_rate
        self.bias: Tensor
        placement: dict[str, Any] = {"device": device, "dtype": torch.float32}
        self.register_buffer("bias", torch.zeros(moe.num_experts, **placement))
        self.choices: Tensor
        self.register_buffer("choices", torch.zeros(moe.num_experts, **placement), persistent=False)

    def forward(self, x_TD: Tensor, groups: Groups, valid_GS: Tensor | None = None, kernels: Kernels = PLAIN) -> Routed:
        scores_TE, x_TD = self.scores(x_TD, kernels)
        scores_GSE = groups.split(scores_TE)
        gates_GSE = scores_GSE.sigmoid()
        chosen_GSK = top_experts(gates_GSE + self.bias, self.top_k)
        # of these logits the softmax is each gate's share of the token's gates
        logits_GSE = F.logsigmoid(scores_GSE)
        weights_GSK = weights_of(gates_GSE, chosen_GSK, self.renormalize)
        routing = Routing(groups, valid_GS, logits_GSE, logits_GSE, gates_GSE, chosen_GSK, weights_GSK)
        if self.training and not is_transformed():  # torch.func lets nothing outside be changed
            with torch.no_grad():
                self.choices += routing.load_E()
        return Routed(routing, x_TD)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SigmoidRouter":
        """What `to`, `half` and their like go through."""
        before = {"bias": self.bias, "choices": self.choices}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = getattr(self, name)
            if torch.promote_types(after.dtype, torch.float32) != after.dtype:
                setattr(self, name, buffer.to(after.device))
        return self

    @torch.no_grad()
    def update_bias(self) -> None:
        """Moves each expert's bias one step towards a fair load, by the choices since the last call.

        A frozen router keeps its bias.
        """
        if self.gate.weight.requires_grad:
            self.bias += self.bias_update_rate * (self.choices.mean() - self.choices).sign()
        self.choices.zero_()


class HashRouter(nn.Module):
    """A control that learns nothing: the experts of a token are a fixed hash of its position in the image (after Roller
    et al. 2021, https://arxiv.org/abs/2106.04426, who hash words). Each choice weighs 1 / K.
    """

    def __init__(self, dim: int, moe: MoeConfig, device=None, dtype=None) -> None:
        super().__init__()
        self.top_k, self.num_experts = moe.top_k, moe.num_experts

    def forward(self, x_TD: Tensor, groups: Groups, valid_GS: Tensor | None = None, kernels: Kernels = PLAIN) -> Routed:
        position_T1 = (torch.arange(x_TD.shape[0], device=x_TD.device) % max(groups.tokens, 1))[:, None]
        # Knuth's multiplicative hash of 16 bits: compiled code counts positions in int32, where products must fit
        hashed_T1 = (position_T1 * 40503 >> 7) % self.num_experts
        chosen_TK = (hashed_T1 + torch.arange(self.top_k, device=x_TD.device)) % self.num_experts
        return Routed(_forced(groups, valid_GS, chosen_TK, self.num_experts, _score_dtype(x_TD)), x_TD)


class RandomRouter(nn.Module):
    """A control that learns nothing: the experts of a token are drawn each time, also at evaluation. Each choice
    weighs 1 / K.
    """

    def __init__(self, dim: int, moe: MoeConfig, device=None, dtype=None) -> None:
        super().__init__()
        self.top_k, self.num_experts = moe.top_k, moe.num_experts

    def forward(self, x_TD: Tensor, groups: Groups, valid_GS: Tensor | None = None, kernels: Kernels = PLAIN) -> Routed:
        draws_TE = torch.rand(x_TD.shape[0], self.num_experts, device=x_TD.device)
        chosen_TK = draws_TE.topk(self.top_k, dim=-1).indices
        return Routed(_forced(groups, valid_GS, chosen_TK, self.num_experts, _score_dtype(x_TD)), x_TD)


class BalancedRouter(TokenChoiceRouter):
    """Forces a perfectly fair load, for benchmarks: tokens take experts in turn. Gates and their gradients are token
    choice's, so that the work is too.
    """

    def forward(self, x_TD: Tensor, groups: Groups, valid_GS: Tensor | None = None, kernels: Kernels = PLAIN) -> Routed:
        logits_TE, x_TD = self.scores(x_TD, kernels)
        logits_GSE, num_experts = groups.split(logits_TE), logits_TE.shape[-1]
        choices_TK = torch.arange(x_TD.shape[0] * self.top_k, device=x_TD.device).view(-1, self.top_k)
        chosen_GSK = groups.split(choices_TK % num_experts)
        gates_GSE = logits_GSE.softmax(-1)
        weights_GSK = weights_of(gates_GSE, chosen_GSK, self.renormalize)
        routing = Routing(groups, valid_GS, logits_GSE, logits_GSE, gates_GSE, chosen_GSK, weights_GSK)
        return Routed(routing, x_TD)


ROUTERS = {
    "token_choice": TokenChoiceRouter,
    "expert_choice": ExpertChoiceRouter,
    "soft": SoftRouter,
    "sigmoid": SigmoidRouter,
    "cosine": CosineRouter,
    "hash": HashRouter,
    "random": RandomRouter,
    "balanced": BalancedRouter,
}


def token_choice(
    logits_GSE: Tensor,
    noisy_logits_GSE: Tensor,
    groups: Groups,
    top_k: int,
    renormalize: bool = False,
    valid_GS: Tensor | None = None,
    kernels: Kernels = PLAIN,
    removed: int = 0,
) -> Routing:
    """Top-K of the softmax of the noisy logits. Of equal gates, the lower expert is chosen first.

    The last `removed` of the logits are of experts that are no longer there: they count in the softmax, and no more.
    """
    if kernels.routing is not None and kernels.routing.takes_logits(noisy_logits_GSE):
        flat = kernels.routing.gates(noisy_logits_GSE.flatten(0, 1), top_k, renormalize)
        gates_GSE, chosen_GSK, weights_GSK = (part.view(*noisy_logits_GSE.shape[:2], -1) for part in flat)
    else:
        gates_GSE = noisy_logits_GSE.softmax(-1)
        if removed:
            logits_GSE, noisy_logits_GSE, gates_GSE = (
                values[..., :-removed] for values in (logits_GSE, noisy_logits_GSE, gates_GSE)
            )
        chosen_GSK = top_experts(gates_GSE, top_k)
        weights_GSK = weights_of(gates_GSE, chosen_GSK, renormalize)
    return Routing(groups, valid_GS, logits_GSE, noisy_logits_GSE, gates_GSE, chosen_GSK, weights_GSK)


def top_experts(gates_GSE: Tensor, top_k: int) -> Tensor:
    """The K largest gates' experts (G, S, K), best first.

    K rounds of argmax rather than torch.topk, which leaves open whose turn it is among equal gates.
    """
    remaining_GSE = gates_GSE.detach()
    if top_k == 1:
        return remaining_GSE.argmax(-1, keepdim=True)
    expert_E = torch.arange(gates_GSE.shape[-1], device=gates_GSE.device)
    chosen = []
    for choice in range(top_k):
        best_GS1 = remaining_GSE.argmax(-1, keepdim=True)
        chosen.append(best_GS1)
        if choice + 1 < top_k:
            # CoreML's converter knows no scatter of a batch of any size
            remaining_GSE = remaining_GSE.masked_fill(expert_E == best_GS1, -math.inf)
    return torch.cat(chosen, -1)


def weights_of(gates_GSE: Tensor, chosen_GSK: Tensor, renormalize: bool) -> Tensor:
    """The chosen experts' gates (G, S, K), scaled to sum to 1 when asked."""
    weights_GSK = gates_GSE.gather(-1, chosen_GSK)
    return weights_GSK / weights_GSK.sum(-1, keepdim=True) if renormalize else weights_GSK


def _score_dtype(x_TD: Tensor) -> torch.dtype:
    return torch.promote_types(x_TD.dtype, torch.float32)


def _forced(
    groups: Groups, valid_GS: Tensor | None, chosen_TK: Tensor, num_experts: int, dtype: torch.dtype
) -> Routing:
    """A routing to given experts with weights 1 / K; its gates are those weights, its logits all equal."""
    chosen_GSK = groups.split(chosen_TK)
    weights_GSK = torch.full(chosen_GSK.shape, 1 / chosen_TK.shape[-1], dtype=dtype, device=chosen_TK.device)
    no_logits_GSE = weights_GSK.new_zeros(*chosen_GSK.shape[:2], num_experts)
    gates_GSE = no_logits_GSE.scatter(-1, chosen_GSK, weights_GSK)
    return Routing(groups, valid_GS, no_logits_GSE, no_logits_GSE, gates_GSE, chosen_GSK, weights_GSK)
