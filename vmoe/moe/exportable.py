"""MoE layers in the form that exporters understand: plain operators, a batch of any size, exactly the routed work.

Each expert in turn takes the rows of the tokens that chose it (`where`) and adds its results to them (`index_add`).
Their number is read from the data in the exported program itself, so no expert is lost because an example did not
visit it, and none computes for tokens that are not its own.

B images of N tokens, T = B*N tokens of width D; S = N tokens of a group, which is an image; E experts; K choices a
token; C places an expert has for an image.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe.moe.assignment import Capacity
from vmoe.moe.config import MoeConfig
from vmoe.moe.experts import Experts, compute_dtype
from vmoe.moe.groups import Groups
from vmoe.moe.routing import Routing
from vmoe.moe.scores import scores


def why_not_exportable(moe: MoeConfig) -> str | None:
    """Why no file could compute what such a layer computes at evaluation, in half a line; None when one can."""
    if moe.router == "random":
        return 'router="random" draws its experts anew each time, so no file could give the same results'
    if moe.router == "balanced":
        return 'router="balanced" is for benchmarks: it chooses experts by an image\'s place in the batch'
    if moe.eval_capacity_factor is not None and not moe.fills_slots and moe.routing_group not in ("image", 1):
        return (
            f"eval_capacity_factor={moe.eval_capacity_factor} with group={moe.routing_group!r} makes a prediction "
            'depend on the other images of its batch; use eval_capacity_factor=None or group="image"'
        )
    return None


def why_layer_not_exportable(layer: Any) -> str | None:
    """The same of a `MoeMlp`, and of hooks on parts of it that its exportable form does not call."""
    for name in ("experts", "router") if layer.config.router == "expert_choice" else ("experts",):
        part = getattr(layer, name)
        if part._forward_hooks or part._forward_pre_hooks:
            return f"forward hooks on its {name} would be left out; remove them first"
    return why_not_exportable(layer.config)


class ExportableForm(ABC):
    """What a `MoeMlp` computes at evaluation, image by image: (B, ..., D) -> (B, ..., O).

    Attributes:
        config: The layer's, like `use_conv` and `out_features`.
        router: The layer's.
        shared: The layer's.
    """

    config: MoeConfig
    use_conv: bool
    out_features: int
    router: Any  # which has what its kind needs
    shared: nn.Module | None

    @abstractmethod
    def one_expert(self, index: int, x_RD: Tensor) -> Tensor:
        """(R, D) -> (R, O): an expert of as many rows as the data say."""

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Runs each token through its experts; arguments are `MoeMlp.forward`'s."""
        if self.use_conv:
            x = x.movedim(1, -1)
        tokens = x.flatten(1, -2).shape[1]
        if torch.jit.is_tracing():  # where sizes are tensors, from which no capacity can be computed
            tokens = int(tokens)
        x_TD = x.reshape(-1, x.shape[-1])
        groups = Groups(x.shape[0], tokens, tokens, tokens)
        valid_GS = None if token_mask is None else token_mask.reshape(-1, tokens)
        y_TO = self._routed(x_TD, groups, valid_GS)
        if self.shared is not None:
            shared_TO = self.shared(x_TD)
            y_TO = y_TO + (shared_TO if valid_GS is None else shared_TO.masked_fill(~valid_GS.reshape(-1, 1), 0))
        y = y_TO.reshape(*x.shape[:-1], self.out_features)
        return y.movedim(-1, 1) if self.use_conv else y

    def _routed(self, x_TD: Tensor, groups: Groups, valid_GS: Tensor | None) -> Tensor:
        if self.config.router == "soft":
            routing = self.router(x_TD, groups, valid_GS)
            slots_END = routing.dispatch(x_TD).view(self.config.num_experts, -1, x_TD.shape[-1])
            results = [self.one_expert(index, slots_ND) for index, slots_ND in enumerate(slots_END.unbind(0))]
            return routing.combine(torch.cat(results))
        if self.config.router == "expert_choice":
            weights_GSE, is_taken_GSE = self._expert_choice(x_TD, groups, valid_GS)
        else:
            weights_GSE, is_taken_GSE = self._token_choice(self.router(x_TD, groups, valid_GS))
        return self._by_experts(x_TD, weights_GSE.flatten(0, 1), is_taken_GSE.flatten(0, 1))

    def _by_experts(self, x_TD: Tensor, weights_TE: Tensor, is_taken_TE: Tensor) -> Tensor:
        """The weighted sum of what each expert makes of the tokens it takes, (T, O)."""
        y_TO = x_TD.new_zeros(x_TD.shape[0], self.out_features, dtype=compute_dtype(x_TD))
        for index in range(self.config.num_experts):
            (token_R,) = torch.where(is_taken_TE[:, index])
            y_RO = self.one_expert(index, x_TD.index_select(0, token_R))
            weight_R1 = weights_TE[:, index].index_select(0, token_R)[:, None]
            y_TO = y_TO.index_add(0, token_R, y_RO * weight_R1.to(y_RO.dtype))
        return y_TO

    def _token_choice(self, routing: Routing) -> tuple[Tensor, Tensor]:
        """The combine weights (G, S, E), and which tokens each expert runs on."""
        is_kept_GSK = torch.ones_like(routing.chosen_GSK, dtype=torch.bool)
        if self.config.eval_capacity_factor is not None:
            most, each_G = self.capacity(routing.groups, routing.valid_GS)
            bound = most if each_G is None else each_G[:, None, None]
            is_kept_GSK = slots_in_flow(routing, self.config.batch_priority) < bound
        if routing.valid_GS is not None:
            is_kept_GSK = is_kept_GSK & routing.valid_GS[..., None]
        no_GSE = torch.zeros_like(routing.gates_GSE)
        weights_GSE = no_GSE.scatter(-1, routing.chosen_GSK, routing.weights_GSK)
        return weights_GSE, no_GSE.scatter(-1, routing.chosen_GSK, is_kept_GSK.to(no_GSE.dtype)) > 0

    def capacity(self, groups: Groups, valid_GS: Tensor | None) -> Capacity:
        """C of each image, where the layer has a bound."""
        name = "capacity_factor" if self.config.eval_capacity_factor is None else "eval_capacity_factor"
        factor = getattr(self.config, name)
        whole = Capacity.of(groups, None, self.config, factor, name)
        if valid_GS is None:
            return whole
        # By a table, since an ONNX program would round in float32 what the layer rounds in float64
        table = torch.tensor([Capacity.of_real(tokens, self.config, factor) for tokens in range(groups.size + 1)])
        return whole._replace(each_G=table.to(valid_GS.device)[valid_GS.sum(1)])

    def _expert_choice(self, x_TD: Tensor, groups: Groups, valid_GS: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same where each expert takes the C tokens with its largest gates; of equal gates, the earlier token."""
        gates_GSE = groups.split(scores(x_TD, self.router.gate)).softmax(-1)
        most, each_G = self.capacity(groups, valid_GS)
        ranked_GSE = gates_GSE if valid_GS is None else gates_GSE.masked_fill(~valid_GS[..., None], -1.0)
        best_GCE = ranked_GSE.topk(most, dim=1).values
        taken_G11 = most if each_G is None else each_G[:, None, None]
        least_G1E = best_GCE[:, -1:]
        if each_G is not None:  # the last that an expert takes; of padding alone it takes none, whatever this is
            least_G1E = best_GCE.gather(1, (each_G[:, None, None] - 1).clamp_min(0).expand(-1, 1, best_GCE.shape[-1]))
        is_larger_GSE, is_equal_GSE = ranked_GSE > least_G1E, ranked_GSE == least_G1E
        left_G1E = taken_G11 - is_larger_GSE.sum(1, keepdim=True)
        is_taken_GSE = is_larger_GSE | (is_equal_GSE & (is_equal_GSE.long().cumsum(1) <= left_G1E))
        return gates_GSE, is_taken_GSE if valid_GS is None else is_taken_GSE & valid_GS[..., None]


class LayerForm(ExportableForm):
    """The form of a layer as it stands, of its stacked experts.

    Args:
        layer: A `MoeMlp`.
        x: Its input.
    """

    def __init__(self, layer: Any, x: Tensor) -> None:
        self.config, self.use_conv, self.out_features = layer.config, layer.use_conv, layer.out_features
        self.router, self.shared = layer.router, layer.shared
        self.experts: Experts = layer.experts
        self.layers = self.experts.layers(x)

    def one_expert(self, index: int, x_RD: Tensor) -> Tensor:
        experts, dtype = self.experts, compute_dtype(x_RD)

        def linear(x: Tensor, weight_EOD: Tensor, bias_EO: Tensor | None) -> Tensor:
            bias_O = None if bias_EO is None else bias_EO[index].to(dtype)
            return F.linear(x.to(dtype), weight_EOD[index].to(dtype), bias_O)

        first, second = self.layers
        hidden_RH = experts.act(linear(x_RD, *first))
        return linear(hidden_RH if experts.norm is None else experts.norm(hidden_RH, index), *second)


def slots_in_flow(routing: Routing, batch_priority: bool) -> Tensor:
    """`assignment.rank_in_flow` without sorting, (G, S, K): the place of each choice among those of its expert."""
    chosen_GSK, num_experts = routing.chosen_GSK, routing.gates_GSE.shape[-1]
    if routing.valid_GS is not None:  # padding takes no place: a row of zeros below
        chosen_GSK = torch.where(routing.valid_GS[..., None], chosen_GSK, num_experts)
    one_hot_GSKE = F.one_hot(chosen_GSK, num_experts + 1)[..., :num_experts]
    place_GS = _places_by_gate(routing) if batch_priority else None
    if place_GS is not None:
        index_S = torch.arange(place_GS.shape[1], device=place_GS.device)
        order_GS = torch.zeros_like(place_GS).scatter(1, place_GS, index_S.expand_as(place_GS))
        one_hot_GSKE = _pick(one_hot_GSKE, order_GS)
    flow_GNE = one_hot_GSKE.transpose(1, 2).flatten(1, 2)
    rank_GN = ((flow_GNE.cumsum(1) - 1) * flow_GNE).sum(-1)
    rank_GSK = rank_GN.view(-1, chosen_GSK.shape[2], chosen_GSK.shape[1]).transpose(1, 2)
    return rank_GSK if place_GS is None else _pick(rank_GSK, place_GS)


def _places_by_gate(routing: Routing) -> Tensor:
    """The place of each token of a group (G, S) by falling top-1 gate; of equal ones, the earlier first."""
    best_GS = routing.gates_GSE.amax(-1)
    if routing.valid_GS is not None:
        best_GS = best_GS.masked_fill(~routing.valid_GS, -1.0)
    index_S = torch.arange(best_GS.shape[1], device=best_GS.device)
    is_before_GSS = best_GS[:, None, :] > best_GS[:, :, None]
    is_tied_before_GSS = (best_GS[:, None, :] == best_GS[:, :, None]) & (index_S[None, :] < index_S[:, None])
    return (is_before_GSS | is_tied_before_GSS).sum(-1)


def _pick(values_GSX: Tensor, index_GS: Tensor) -> Tensor:
    """Row `index_GS` of each group's rows."""
    shape = (*index_GS.shape, *(1 for _ in values_GSX.shape[2:]))
    return values_GSX.gather(1, index_GS.view(shape).expand_as(values_GSX))
