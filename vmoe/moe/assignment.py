"""Assignment: which of the tokens that chose an expert it has room for.

T tokens in G groups of S tokens; E experts; K choices a token; C capacity, the slots of an expert in a group.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vmoe.moe.config import MoeConfig
from vmoe.moe.groups import Groups
from vmoe.moe.kernels import fused_for
from vmoe.moe.routing import Routing


class CapacityError(ValueError):
    """A capacity factor that leaves an expert no place, or more than it can take.

    Args:
        reason: Why, and what to do.
        factor: The factor.
        name: The factor's name in `MoeConfig`.
    """

    def __init__(self, reason: str, factor: float, name: str) -> None:
        super().__init__(f"{name}={factor}: {reason}")
        self.reason = reason


def expert_capacity(
    choices: int,
    num_experts: int,
    factor: float,
    rounding: str = "ceil",
    multiple_of: int = 1,
    name: str = "capacity_factor",
) -> int:
    """C, the places an expert has for a group in which `choices` = S * K choices are made (section 2.3).

    Args:
        choices: Tokens of the group times K.
        num_experts: E.
        factor: The capacity factor: 1 gives just enough places for a perfectly fair load.
        rounding: "ceil", or "round" (half to even).
        multiple_of: The result is raised to a multiple of this.
        name: The factor's name in errors.

    Raises:
        CapacityError: The experts would have no place at all.
    """
    # torch.compile(dynamic=True) makes a symbol of each float it reads, on which no shape may depend; what a set holds
    # is constant to it, in torch 2.11 too
    factor = {factor}.pop()
    exact = choices * factor / num_experts
    capacity = math.ceil(exact) if rounding == "ceil" else round(exact)
    if capacity < 1:
        raise CapacityError(
            f"{choices} choices among {num_experts} experts leave {exact:.3g} places each; "
            "raise the capacity factor or use fewer experts",
            factor,
            name,
        )
    return capacity + -capacity % multiple_of


class Capacity(NamedTuple):
    """C, the slots of an expert in a group.

    Attributes:
        most: C of a full group without padding. Buffers are made for so many.
        each_G: C of each group, by its real tokens, (G,) int64; None where it is `most` in all groups.
    """

    most: int
    each_G: Tensor | None = None

    @classmethod
    def of(cls, groups: Groups, valid_GS: Tensor | None, moe: MoeConfig, factor: float, name: str) -> "Capacity":
        """The capacity by `expert_capacity`, and at most the group's tokens: no expert takes a token twice.

        Padding does not count, so that a prediction does not depend on the length that an image is padded to. Real
        tokens leave each expert one slot at least: their number lies on the device, so that no error can name it.

        Args:
            groups: How the tokens are grouped.
            valid_GS: Which tokens are real; None when all are.
            moe: The layer's configuration.
            factor: The capacity factor.
            name: The factor's name in errors.

        Raises:
            CapacityError: The experts would have no slot at all, or choose more tokens than an image has.
        """
        choices = 1 if moe.fills_slots else moe.top_k
        of_full, _ = (  # both, so that an incomplete group without slots is an error too
            expert_capacity(size * choices, moe.num_experts, factor, *moe.rounding, name)
            for size in (groups.size, groups.last)
        )
        if moe.fills_slots and of_full > groups.size:
            raise CapacityError(
                f"each expert would choose {of_full} of an image's {groups.size} tokens; "
                "lower it or capacity_multiple_of",
                factor,
                name,
            )
        most = min(groups.size, of_full)
        if valid_GS is None:
            return cls(most)
        rounding, multiple_of = moe.rounding
        real_G = valid_GS.sum(1)
        exact_G = (real_G * choices).double() * factor / moe.num_experts  # as in `expert_capacity`, bit for bit
        each_G = (exact_G.ceil() if rounding == "ceil" else exact_G.round()).long().clamp_min(1)
        return cls(most, torch.minimum(each_G + -each_G % multiple_of, real_G))

    @staticmethod
    def of_real(tokens: int, moe: MoeConfig, factor: float) -> int:
        """What `each_G` holds for a group of so many real tokens."""
        choices = tokens * (1 if moe.fills_slots else moe.top_k)
        try:
            capacity = expert_capacity(choices, moe.num_experts, factor, *moe.rounding)
        except CapacityError:
            capacity = moe.rounding[1]
        return min(tokens, capacity)


def assign(routing: Routing, capacity: Capacity, batch_priority: bool = False) -> Routing:
    """Hands out each expert's places, group by group: every token's first choice, then every second choice, ...

    Within a choice the tokens come in their order in the group or, with Batch Prioritized Routing (section 4.1), by
    falling top-1 gate. A choice that finds its expert full is dropped; nothing is routed anew.

    Args:
        routing: The router's decision.
        capacity: C.
        batch_priority: Order tokens by their gate.

    Returns:
        The routing with `kept_GSK`, `slots_GSK` and `capacity` filled in.
    """
    chosen_GSK, valid_GS = routing.chosen_GSK, routing.valid_GS
    num_experts = routing.gates_GSE.shape[-1]
    if valid_GS is not None:  # no expert: padding takes no place
        chosen_GSK = torch.where(valid_GS[..., None], chosen_GSK, num_experts)
    order_GS = priority_order(routing) if batch_priority else None
    fused = fused_for(chosen_GSK)
    rank = rank_in_flow if fused is None or num_experts > fused.MAX_EXPERTS else fused.ranks
    slots_GSK = rank(chosen_GSK, order_GS, num_experts)
    kept_GSK = slots_GSK < (capacity.most if capacity.each_G is None else capacity.each_G[:, None, None])
    if valid_GS is not None:
        kept_GSK = kept_GSK & valid_GS[..., None]
    return routing._replace(kept_GSK=kept_GSK, slots_GSK=slots_GSK, capacity=capacity.most)


def priority_order(routing: Routing) -> Tensor:
    """Tokens of each group (G, S) by falling top-1 gate, equals in their old order, padding last."""
    best_GS = routing.gates_GSE.detach().amax(-1)
    if routing.valid_GS is not None:
        best_GS = best_GS.masked_fill(~routing.valid_GS, -1.0)
    fused = fused_for(best_GS)
    if fused is not None and best_GS.shape[1] <= fused.MAX_COMPARED:
        return fused.falling_order(best_GS)
    return best_GS.argsort(dim=1, descending=True, stable=True)


def rank_in_flow(chosen_GSK: Tensor, order_GS: Tensor | None, num_experts: int) -> Tensor:
    """How many choices of the same expert come before each one (G, S, K): all first choices, then all second ones, ...;
    within a choice in the tokens' order, or in `order_GS`. What is no expert, >= num_experts, may get any rank.
    """
    num_groups, size, top_k = chosen_GSK.shape
    order_GSK = None if order_GS is None else order_GS[..., None].expand(-1, -1, top_k)
    if order_GSK is not None:
        chosen_GSK = chosen_GSK.gather(1, order_GSK)
    flow_GN = chosen_GSK.transpose(1, 2).reshape(num_groups, top_k * size)
    rank_GSK = rank_among_equals(flow_GN).view(num_groups, top_k, size).transpose(1, 2)
    return rank_GSK if order_GSK is None else torch.empty_like(rank_GSK).scatter(1, order_GSK, rank_GSK)


def rank_among_equals(values_GN: Tensor) -> Tensor:
    """For each entry, how many equal ones stand before it in its row. Linear memory, no host synchronisation."""
    ordered_GN, order_GN = values_GN.sort(dim=1, stable=True)
    first_GN = torch.searchsorted(ordered_GN, ordered_GN)
    rank_GN = torch.arange(values_GN.shape[1], device=values_GN.device) - first_GN
    return torch.empty_like(rank_GN).scatter(1, order_GN, rank_GN)
