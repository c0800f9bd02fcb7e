"""Assignment: who gets a slot. All rules of capacity, order and padding stand here, and nowhere else.

Where tokens choose experts, `assign` decides which choices find room; where experts choose tokens, `expert_choice`
does. Each has a form for exported programs beside it, which may neither sort nor round in float64: `rank_by_counting`,
`taken_by_threshold` and `Capacity.of_pass(exportable=True)`.

T tokens in G groups of S tokens; E experts; K choices per token; C capacity, the slots of an expert in a group. The
flow of a group is the order in which its choices ask for slots.
"""

import math
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vmoe.moe.config import MoeConfig
from vmoe.moe.groups import Groups
from vmoe.moe.kernels import PLAIN, Kernels
from vmoe.moe.kernels.sizes import MAX_COMPARED, MAX_EXPERTS
from vmoe.moe.routing import ExpertChoiceRouting, Routing


class CapacityError(ValueError):
    """A capacity factor that leaves an expert no slot, or more than it can take.

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
    top_k: int = 1,
) -> int:
    """C, the slots an expert has for a group in which `choices` = S * K choices are made (section 2.3).

    Args:
        choices: Tokens of the group times K.
        num_experts: E.
        factor: The capacity factor: 1 gives just enough slots for a perfectly fair load.
        rounding: "ceil", "round" (half to even), or "tutel": K * floor(factor * ceil(S / E)).
        multiple_of: The result is raised to a multiple of this.
        name: The factor's name in errors.
        top_k: K, which only "tutel" needs.

    Raises:
        CapacityError: The experts would have no slot at all.
    """
    # torch.compile(dynamic=True) makes a symbol of each float it reads, on which no shape may depend; what a set holds
    # is constant to it, in torch 2.11 too
    factor = {factor}.pop()
    exact = choices * factor / num_experts
    if rounding == "tutel":
        capacity = top_k * math.floor(factor * -(-(choices // top_k) // num_experts))
    else:
        capacity = math.ceil(exact) if rounding == "ceil" else round(exact)
    if capacity < 1:
        raise CapacityError(
            f"{choices} choices among {num_experts} experts leave {exact:.3g} slots each; "
            "raise the capacity factor or use fewer experts",
            factor,
            name,
        )
    return capacity + -capacity % multiple_of


class Capacity(NamedTuple):
    """C, the slots of an expert in a group.

    Attributes:
        most: C of a full group without padding. Buffers are made for so many.
        each_G: C of each group, by its real tokens, int64: (G,), or (1,) for all groups; None where it is `most`.
        last: C of the last group, which may have fewer tokens, without padding.
    """

    most: int
    each_G: Tensor | None = None
    last: int = 0

    @classmethod
    def of_pass(
        cls, groups: Groups, valid_GS: Tensor | None, moe: MoeConfig, is_training: bool, exportable: bool = False
    ) -> "Capacity | None":
        """The capacity in a training or an evaluation pass; None where no choice is dropped.

        None for Soft MoE too: its slots are part of the router's parameters.

        Args:
            groups: How the tokens are grouped.
            valid_GS: Which tokens are real; None when all are.
            moe: The layer's configuration.
            is_training: Which of its capacity factors counts.
            exportable: Computes `each_G` by a table, since an ONNX program would round in float32 what the layer
                rounds in float64.

        Raises:
            CapacityError: The experts would have no slot at all, or choose more tokens than an image has.
        """
        name, factor = moe.capacity_factor_of_pass(is_training)
        if factor is None or moe.router == "soft" or (groups.size == 0 and not moe.fills_slots):
            return None
        by_table = exportable or (valid_GS is not None and valid_GS.is_mps)  # Apple's GPUs have no float64
        whole = cls.of(groups, None if by_table else valid_GS, moe, factor, name)
        if valid_GS is None or not by_table:
            return whole
        table = torch.tensor([cls._of_real(tokens, moe, factor) for tokens in range(groups.size + 1)])
        return whole._replace(each_G=table.to(valid_GS.device)[valid_GS.sum(1)])

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
            CapacityError: As of `of_pass`.
        """
        choices = 1 if moe.fills_slots else moe.top_k

        def capacity_of(size: int) -> int:
            return expert_capacity(size * choices, moe.num_experts, factor, *moe.rounding, name, moe.top_k)

        of_full = capacity_of(groups.size)
        of_last = of_full if groups.is_even else capacity_of(groups.last)  # without slots it is an error too
        if moe.fills_slots and of_full > groups.size:
            raise CapacityError(
                f"each expert would choose {of_full} of an image's {groups.size} tokens; "
                "lower it or capacity_multiple_of",
                factor,
                name,
            )
        most = min(groups.size, of_full)
        if valid_GS is None:
            return cls(most, last=min(groups.last, of_last))
        rounding, multiple_of = moe.rounding
        real_G = valid_GS.sum(1)
        # as in `expert_capacity`, bit for bit
        if rounding == "tutel":
            fair_G = -(-real_G // moe.num_experts)
            each_G = moe.top_k * (fair_G.double() * factor).floor().long()
        else:
            exact_G = (real_G * choices).double() * factor / moe.num_experts
            each_G = (exact_G.ceil() if rounding == "ceil" else exact_G.round()).long()
        each_G = each_G.clamp_min(1)
        return cls(most, torch.minimum(each_G + -each_G % multiple_of, real_G))

    @classmethod
    def by_tensor(cls, groups: Groups, moe: MoeConfig, factor: Tensor) -> "Capacity":
        """The capacity by a factor () that is known only when an exported program runs, rounded up.

        Only token choice has such a capacity. It is not raised to a multiple.
        """
        exact = factor * (groups.size * moe.top_k / moe.num_experts)
        # less by so little that a factor in float32, of which the product is a whole number, adds no slot
        return cls(groups.size, (exact - 1e-3).ceil().long().reshape(1))

    @staticmethod
    def _of_real(tokens: int, moe: MoeConfig, factor: float) -> int:
        """What `each_G` holds for a group of so many real tokens."""
        choices = tokens * (1 if moe.fills_slots else moe.top_k)
        try:
            capacity = expert_capacity(choices, moe.num_experts, factor, *moe.rounding, top_k=moe.top_k)
        except CapacityError:
            capacity = moe.rounding[1]
        return min(tokens, capacity)


def assign(
    routing: Routing,
    capacity: Capacity | None,
    batch_priority: bool = False,
    kernels: Kernels = PLAIN,
    exportable: bool = False,
) -> Routing:
    """Hands out each expert's slots, group by group: every token's first choice, then every second choice, ...

    Within a choice the tokens come in their order in the group or, with Batch Prioritized Routing (section 4.1), by
    descending top-1 gate. A choice that finds its expert full is dropped; it is not sent to another expert.

    Args:
        routing: The router's decision.
        capacity: C; None where nothing is dropped but the choices of padding.
        batch_priority: Order tokens by their gate.
        kernels: Which compute it.
        exportable: Uses only operators that every exporter knows. The result is the same.

    Returns:
        The routing with `kept_GSK`, `slots_GSK` and `capacity` filled in, as far as there is a capacity.
    """
    chosen_GSK, valid_GS = routing.chosen_GSK, routing.valid_GS
    is_real_GSK = None if valid_GS is None else valid_GS[..., None].expand_as(chosen_GSK)
    if capacity is None:
        return routing._replace(kept_GSK=is_real_GSK)
    num_experts = routing.gates_GSE.shape[-1]
    if is_real_GSK is not None:  # no expert: padding takes no slot
        chosen_GSK = torch.where(is_real_GSK, chosen_GSK, num_experts)
    priority_GS = priority(routing) if batch_priority else None
    if exportable:
        slots_GSK = rank_by_counting(chosen_GSK, priority_GS, num_experts)
    elif kernels.routing is not None:
        slots_GSK = _rank_by_kernels(kernels.routing, chosen_GSK, priority_GS, num_experts)
    else:
        slots_GSK = rank_by_sorting(chosen_GSK, priority_GS, num_experts)
    kept_GSK = slots_GSK < (capacity.most if capacity.each_G is None else capacity.each_G[:, None, None])
    if is_real_GSK is not None:
        kept_GSK = kept_GSK & is_real_GSK
    return routing._replace(kept_GSK=kept_GSK, slots_GSK=slots_GSK, capacity=capacity.most)


def priority(routing: Routing) -> Tensor:
    """How early a token comes with Batch Prioritized Routing (G, S): its top-1 gate; padding comes last."""
    best_GS = routing.gates_GSE.detach().amax(-1)
    return best_GS if routing.valid_GS is None else best_GS.masked_fill(~routing.valid_GS, -1.0)


def rank_by_sorting(chosen_GSK: Tensor, priority_GS: Tensor | None, num_experts: int) -> Tensor:
    """How many choices of the same expert come before each one (G, S, K): all first choices, then all second ones, ...

    Args:
        chosen_GSK: The experts. A choice of no expert, a number >= E, may get any rank.
        priority_GS: Within a choice the tokens come by descending priority, equals in their order in the group; None
            where all come in that order.
        num_experts: E.
    """
    order_GS = None if priority_GS is None else sorted_order(priority_GS)
    return rank_in_order(chosen_GSK, order_GS, num_experts)


def sorted_order(priority_GS: Tensor) -> Tensor:
    """The tokens of each group (G, S) by descending priority, equals in their old order."""
    return priority_GS.argsort(dim=1, descending=True, stable=True)


def rank_in_order(chosen_GSK: Tensor, order_GS: Tensor | None, num_experts: int) -> Tensor:
    """As `rank_by_sorting`, with the tokens of each group in the order of `order_GS`."""
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


def _rank_by_kernels(
    routing_kernels: ModuleType, chosen_GSK: Tensor, priority_GS: Tensor | None, num_experts: int
) -> Tensor:
    """`rank_by_sorting` by Triton's kernels, as far as their limits go."""
    order_GS = None
    if priority_GS is not None:
        by_kernel = priority_GS.shape[1] <= MAX_COMPARED
        order_GS = (routing_kernels.descending_order if by_kernel else sorted_order)(priority_GS)
    return (routing_kernels.ranks if num_experts <= MAX_EXPERTS else rank_in_order)(chosen_GSK, order_GS, num_experts)


def rank_by_counting(chosen_GSK: Tensor, priority_GS: Tensor | None, num_experts: int) -> Tensor:
    """`rank_by_sorting` in operators that every exporter knows: no sort, which ONNX does not promise to be stable."""
    one_hot_GSKE = F.one_hot(chosen_GSK, num_experts + 1)[..., :num_experts]  # no expert is a row of zeros
    place_GS = None if priority_GS is None else _place_by_counting(priority_GS)
    if place_GS is not None:
        index_S = torch.arange(place_GS.shape[1], device=place_GS.device)
        order_GS = torch.zeros_like(place_GS).scatter(1, place_GS, index_S.expand_as(place_GS))
        one_hot_GSKE = _pick_tokens(one_hot_GSKE, order_GS)
    flow_GNE = one_hot_GSKE.transpose(1, 2).flatten(1, 2)
    rank_GN = ((flow_GNE.cumsum(1) - 1) * flow_GNE).sum(-1)
    rank_GSK = rank_GN.view(-1, chosen_GSK.shape[2], chosen_GSK.shape[1]).transpose(1, 2)
    return rank_GSK if place_GS is None else _pick_tokens(rank_GSK, place_GS)


def _place_by_counting(priority_GS: Tensor) -> Tensor:
    """Where each token stands in `sorted_order`, (G, S)."""
    index_S = torch.arange(priority_GS.shape[1], device=priority_GS.device)
    is_before_GSS = priority_GS[:, None, :] > priority_GS[:, :, None]
    is_tied_before_GSS = (priority_GS[:, None, :] == priority_GS[:, :, None]) & (index_S[None, :] < index_S[:, None])
    return (is_before_GSS | is_tied_before_GSS).sum(-1)


def _pick_tokens(values_GSX: Tensor, index_GS: Tensor) -> Tensor:
    """The values of the tokens `index_GS` of each group."""
    shape = (*index_GS.shape, *(1 for _ in values_GSX.shape[2:]))
    return values_GSX.gather(1, index_GS.view(shape).expand_as(values_GSX))


def expert_choice(
    gates_GSE: Tensor, groups: Groups, capacity: Capacity, valid_GS: Tensor | None = None
) -> ExpertChoiceRouting:
    """Each expert takes the C tokens with its largest gates; of equal gates, the earlier token."""
    gates_GES = gates_GSE.transpose(1, 2)
    ranked_GES = gates_GES.detach() if valid_GS is None else gates_GES.detach().masked_fill(~valid_GS[:, None], -1.0)
    chosen_GEC = ranked_GES.argsort(dim=-1, descending=True, stable=True)[..., : capacity.most]
    weights_GEC = gates_GES.gather(-1, chosen_GEC)
    kept_G1C = None
    if capacity.each_G is not None:  # C is at most the group's real tokens, which are ranked first
        kept_G1C = (torch.arange(capacity.most, device=gates_GSE.device) < capacity.each_G[:, None])[:, None]
        weights_GEC = weights_GEC * kept_G1C
    return ExpertChoiceRouting(groups, valid_GS, gates_GSE, chosen_GEC, weights_GEC, kept_G1C)


def taken_by_threshold(gates_GSE: Tensor, capacity: Capacity, valid_GS: Tensor | None = None) -> Tensor:
    """The choice of `expert_choice` in operators that every exporter knows: which tokens an expert takes, (G, S, E).

    An expert takes all gates above its C-th largest, and of those that equal it the first ones.
    """
    most, each_G, _ = capacity
    ranked_GSE = gates_GSE if valid_GS is None else gates_GSE.masked_fill(~valid_GS[..., None], -1.0)
    best_GCE = ranked_GSE.topk(most, dim=1).values
    slots_G11 = most if each_G is None else each_G[:, None, None]
    least_G1E = best_GCE[:, -1:]
    if each_G is not None:  # the last that an expert takes; of padding alone it takes none, whatever this is
        least_G1E = best_GCE.gather(1, (each_G[:, None, None] - 1).clamp_min(0).expand(-1, 1, best_GCE.shape[-1]))
    is_larger_GSE, is_equal_GSE = ranked_GSE > least_G1E, ranked_GSE == least_G1E
    left_G1E = slots_G11 - is_larger_GSE.sum(1, keepdim=True)
    is_taken_GSE = is_larger_GSE | (is_equal_GSE & (is_equal_GSE.long().cumsum(1) <= left_G1E))
    return is_taken_GSE if valid_GS is None else is_taken_GSE & valid_GS[..., None]
