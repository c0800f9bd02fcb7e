"""Records of a routing decision, which pass between router, experts, losses and analysis.

T tokens of width D, in G groups of S tokens; E experts; K choices per token; C slots per expert and group.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vmoe.moe.groups import Groups


class Routing(NamedTuple):
    """A decision in which tokens choose experts: the router's choices and, after `assign`, which of them are kept.

    Attributes:
        groups: How the tokens are grouped.
        valid_GS: Which tokens are real, bool; None when all are.
        logits_GSE: The router's logits without noise.
        noisy_logits_GSE: The logits that routing used; `logits_GSE` itself without noise.
        gates_GSE: The gates, which give priorities and combine weights.
        chosen_GSK: The experts of each token, best first, int64.
        weights_GSK: The combine weight of each choice, before drops.
        kept_GSK: Which choices were kept, bool; None when no choice can be dropped.
        slots_GSK: The slot of each choice in its expert and group; None without a capacity.
        capacity: C, the slots of an expert for a group; None when nothing is dropped.
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

    def load_E(self) -> Tensor:
        """Share of the choices that went to each expert, before drops; sums to 1."""
        real_GS1 = self._real_GS1().expand_as(self.chosen_GSK)
        counts_E = real_GS1.new_zeros(self.gates_GSE.shape[-1])
        counts_E = counts_E.scatter_add(0, self.chosen_GSK.reshape(-1), real_GS1.reshape(-1))
        return counts_E / real_GS1.sum().clamp_min(1)

    def dropped(self) -> Tensor:
        """Share of the choices that were dropped, ()."""
        choices = self._real_GS1().sum() * self.chosen_GSK.shape[-1]
        if self.kept_GSK is None:
            return choices.new_zeros(())
        return (choices - self.kept_GSK.sum()) / choices.clamp_min(1)

    def entropy(self) -> Tensor:
        """Mean entropy of the tokens' normalised gates in nats, ()."""
        gates_GSE = self.gates_GSE / self.gates_GSE.sum(-1, keepdim=True)
        return _mean_entropy(gates_GSE, self._real_GS1())

    def _real_GS1(self) -> Tensor:
        return _real(self.valid_GS, self.gates_GSE)


class ExpertChoiceRouting(NamedTuple):
    """A decision in which experts choose tokens. Every slot is filled, except where padding leaves too few tokens.

    Attributes:
        groups: One group per image.
        valid_GS: Which tokens are real, bool; None when all are.
        gates_GSE: softmax over the experts.
        chosen_GEC: The tokens of each expert, by their index in the group, best first.
        weights_GEC: Their combine weights; zero in an empty slot.
        kept_G1C: Which slots are filled, bool; None for all. A group with padding may have empty slots.
    """

    groups: Groups
    valid_GS: Tensor | None
    gates_GSE: Tensor
    chosen_GEC: Tensor
    weights_GEC: Tensor
    kept_G1C: Tensor | None = None

    def dispatch(self, x_TD: Tensor) -> Tensor:
        """(E*G*C, D): the tokens of each expert, experts first."""
        return x_TD.index_select(0, self._token_R())

    def combine(self, y_RD: Tensor) -> Tensor:
        """(T, D): the weighted sum of each token's results; zero for a token that no expert chose."""
        weight_R = self.weights_GEC.transpose(0, 1).reshape(-1, 1).to(y_RD.dtype)
        num_groups, size, _ = self.gates_GSE.shape
        return y_RD.new_zeros(num_groups * size, y_RD.shape[-1]).index_add(0, self._token_R(), y_RD * weight_R)

    def load_E(self) -> Tensor:
        """1 / E for every expert: all take the same number of tokens."""
        num_experts = self.gates_GSE.shape[-1]
        return self.gates_GSE.new_full((num_experts,), 1 / num_experts)

    def dropped(self) -> Tensor:
        """Share of the tokens that no expert chose, ()."""
        real_GS = _real(self.valid_GS, self.gates_GSE)[..., 0]
        flat_GN = self.chosen_GEC.flatten(1)
        taken_GN = self._kept_GEC().flatten(1).to(real_GS.dtype)
        is_chosen_GS = torch.zeros_like(real_GS).scatter_reduce(1, flat_GN, taken_GN, "amax")
        return (real_GS - is_chosen_GS).sum() / real_GS.sum().clamp_min(1)

    def entropy(self) -> Tensor:
        """Mean entropy of the tokens' gates in nats, ()."""
        return _mean_entropy(self.gates_GSE, _real(self.valid_GS, self.gates_GSE))

    def dispatch_GSEC(self) -> Tensor:
        """One-hot: the token in each slot of each expert; zeros for an empty slot."""
        one_hot_GECS = torch.nn.functional.one_hot(self.chosen_GEC, self.gates_GSE.shape[1])
        return (one_hot_GECS * self._kept_GEC()[..., None]).permute(0, 3, 1, 2).to(self.gates_GSE.dtype)

    def combine_GSEC(self) -> Tensor:
        """The weight of each slot in each token's result."""
        return self.dispatch_GSEC() * self.weights_GEC[:, None]

    def _kept_GEC(self) -> Tensor:
        if self.kept_G1C is None:
            return torch.ones_like(self.chosen_GEC, dtype=torch.bool)
        return self.kept_G1C.expand_as(self.chosen_GEC)

    def _token_R(self) -> Tensor:
        num_groups, size, _ = self.gates_GSE.shape
        first_G11 = torch.arange(num_groups, device=self.chosen_GEC.device)[:, None, None] * size
        return (self.chosen_GEC + first_G11).transpose(0, 1).reshape(-1)


class SoftRouting(NamedTuple):
    """A decision of Soft MoE: slots are mixtures of tokens, and tokens get mixtures of the slots' results.

    Attributes:
        groups: One group per image.
        valid_GS: Which tokens are real, bool; None when all are.
        dispatch_weights_GSEC: Weight of each token in each slot. They sum to 1 over the tokens; to 0 in an image of
            only padding.
        combine_weights_GSEC: Weight of each slot in each token's result. They sum to 1 over all slots.
    """

    groups: Groups
    valid_GS: Tensor | None
    dispatch_weights_GSEC: Tensor
    combine_weights_GSEC: Tensor

    def dispatch(self, x_TD: Tensor) -> Tensor:
        """(E*G*C, D): the slots' mixtures, experts first."""
        num_groups, size, num_experts, slots = self.dispatch_weights_GSEC.shape
        weights_GNS = self.dispatch_weights_GSEC.to(x_TD.dtype).flatten(2).transpose(1, 2)
        mixed_GND = weights_GNS @ x_TD.view(num_groups, size, x_TD.shape[-1])
        return (
            mixed_GND.view(num_groups, num_experts, slots, x_TD.shape[-1]).transpose(0, 1).reshape(-1, x_TD.shape[-1])
        )

    def combine(self, y_RD: Tensor) -> Tensor:
        """(T, D): each token's mixture of the slots' results."""
        num_groups, size, num_experts, slots = self.combine_weights_GSEC.shape
        y_GND = (
            y_RD.view(num_experts, num_groups, slots, y_RD.shape[-1])
            .transpose(0, 1)
            .reshape(num_groups, num_experts * slots, y_RD.shape[-1])
        )
        weights_GSN = self.combine_weights_GSEC.to(y_RD.dtype).flatten(2)
        return (weights_GSN @ y_GND).view(num_groups * size, y_RD.shape[-1])

    def load_E(self) -> Tensor:
        """Share of the combine weights that each expert's slots carry; sums to 1."""
        mass_E = self.combine_weights_GSEC.sum((0, 1, 3))
        return mass_E / mass_E.sum().clamp_min(torch.finfo(mass_E.dtype).tiny)

    def dropped(self) -> Tensor:
        """Zero, (): Soft MoE drops nothing."""
        return self.combine_weights_GSEC.new_zeros(())

    def entropy(self) -> Tensor:
        """Mean entropy in nats of the tokens' combine weights, which are first summed by expert, ()."""
        by_expert_GSE = self.combine_weights_GSEC.sum(-1)
        return _mean_entropy(by_expert_GSE, _real(self.valid_GS, by_expert_GSE))

    @property
    def gates_GSE(self) -> Tensor:
        """Each expert's share of a token's result."""
        return self.combine_weights_GSEC.sum(-1)

    def dispatch_GSEC(self) -> Tensor:
        """The dispatch weights."""
        return self.dispatch_weights_GSEC

    def combine_GSEC(self) -> Tensor:
        """The combine weights."""
        return self.combine_weights_GSEC


SlotRouting = ExpertChoiceRouting | SoftRouting


class Routed(NamedTuple):
    """The result of a router.

    Attributes:
        routing: Its decision.
        x_TD: The router's input, for the experts. A kernel may return it as a new tensor, so that one pass over memory
            adds the gradients of router and experts.
    """

    routing: Routing | SlotRouting
    x_TD: Tensor


def _real(valid_GS: Tensor | None, like_GSE: Tensor) -> Tensor:
    """1 for real tokens, 0 for padding, (G, S, 1) in the type of `like_GSE`."""
    return torch.ones_like(like_GSE[..., :1]) if valid_GS is None else valid_GS[..., None].to(like_GSE.dtype)


def _mean_entropy(gates_GSE: Tensor, real_GS1: Tensor) -> Tensor:
    return (torch.special.entr(gates_GSE).sum(-1, keepdim=True) * real_GS1).sum() / real_GS1.sum().clamp_min(1)
