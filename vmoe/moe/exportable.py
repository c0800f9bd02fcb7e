"""MoE layers in a form that exporters understand: plain operators, any batch size, exactly the routed work.

Each expert in turn takes the rows of the tokens that chose it (`where`) and adds its results to them (`index_add`).
The exported program reads their number from the data. So an expert that the example input did not use is not lost, and
no expert computes tokens of others.

B images of N tokens, T = B*N tokens of width D; a group is an image, S = N; E experts; K choices per token; C slots of
an expert for an image. `assignment` decides which choices get slots, by its forms for exporters.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe.moe.assignment import Capacity, assign, taken_by_threshold
from vmoe.moe.config import MoeConfig
from vmoe.moe.experts import Experts, compute_dtype
from vmoe.moe.groups import Groups
from vmoe.moe.image_routing import ImageRouting, choices_of_tokens
from vmoe.moe.routing import Routing
from vmoe.moe.scores import gate_scores


def why_not_exportable(moe: MoeConfig) -> str | None:
    """The reason, in half a line, why no exported file can compute such a layer at evaluation; None if one can."""
    if moe.router == "random":
        return 'router="random" draws its experts each time, so no file could give the same results'
    if moe.router == "balanced":
        return 'router="balanced" is for benchmarks: it chooses experts by an image\'s place in the batch'
    if moe.ensemble > 1 and moe.eval_capacity_factor is not None:
        return (
            f"ensemble={moe.ensemble} with a capacity at evaluation; set eval_capacity_factor=None, which drops nothing"
        )
    if moe.eval_capacity_factor is not None and not moe.fills_slots and moe.routing_group not in ("image", 1):
        return (
            f"eval_capacity_factor={moe.eval_capacity_factor} with group={moe.routing_group!r} makes a prediction "
            'depend on the other images of its batch; use eval_capacity_factor=None or group="image"'
        )
    return None


def why_layer_not_exportable(layer: Any) -> str | None:
    """As `why_not_exportable`, for a `MoeMlp`. Hooks on parts that the exportable form skips are a reason too."""
    for name in ("experts", "router") if layer.config.router == "expert_choice" else ("experts",):
        part = getattr(layer, name)
        if part._forward_hooks or part._forward_pre_hooks:
            return f"forward hooks on its {name} would be left out; remove them first"
    return why_not_exportable(layer.config)


class ExportableForm(ABC):
    """Computes what a `MoeMlp` computes at evaluation, image by image: (B, ..., D) -> (B, ..., O).

    The attributes `config`, `router`, `shared`, `images`, `use_conv` and `out_features` are the layer's.
    """

    config: MoeConfig
    use_conv: bool
    out_features: int
    router: Any  # each kind of router has other attributes
    shared: nn.Module | None
    images: ImageRouting | None

    @abstractmethod
    def one_expert(self, index: int, x_RD: Tensor) -> Tensor:
        """(R, D) -> (R, O): one expert. The number of rows depends on the data."""

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Runs each token through its experts. The arguments are those of `MoeMlp.forward`."""
        if self.use_conv:
            x = x.movedim(1, -1)
        tokens = x.flatten(1, -2).shape[1]
        if torch.jit.is_tracing():  # there sizes are tensors, and no capacity can be computed from them
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
            routing, _ = self.router(x_TD, groups, valid_GS)
            rows_RD = routing.dispatch(x_TD)
            count = groups.count * self.router.mu.shape[-1]  # of an expert; a view (E, ...) would fix G in torch 2.11
            starts = [index * count for index in range(self.config.num_experts)]
            results = [self.one_expert(index, rows_RD[start : start + count]) for index, start in enumerate(starts)]
            return routing.combine(torch.cat(results))
        if self.images is not None:
            x_BND = x_TD.reshape(-1, groups.tokens, x_TD.shape[-1])
            of_images = self.images.route(self.router, x_BND, valid_GS, Groups(groups.count, 1, 1, 1))
            return self._by_choices(x_TD, choices_of_tokens(of_images, groups.tokens, valid_GS))
        capacity = Capacity.of_pass(groups, valid_GS, self.config, is_training=False, exportable=True)
        if self.config.router == "expert_choice":
            gates_GSE = groups.split(gate_scores(x_TD, self.router.gate)).softmax(-1)
            assert capacity is not None  # experts that choose have slots
            is_taken_GSE = taken_by_threshold(gates_GSE, capacity, valid_GS)
            return self._by_experts(x_TD, gates_GSE.flatten(0, 1), is_taken_GSE.flatten(0, 1))
        routing, _ = self.router(x_TD, groups, valid_GS)
        return self._by_choices(x_TD, assign(routing, capacity, self.config.batch_priority, exportable=True))

    def _by_choices(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """The weighted sum of each token's results from the chosen experts in which it has a slot, (T, O)."""
        chosen_GSK, kept_GSK = routing.chosen_GSK, routing.kept_GSK
        is_kept_GSK = torch.ones_like(chosen_GSK, dtype=torch.bool) if kept_GSK is None else kept_GSK
        no_GSE = torch.zeros_like(routing.gates_GSE)
        is_taken_GSE = no_GSE.scatter(-1, chosen_GSK, is_kept_GSK.to(no_GSE.dtype)) > 0
        if chosen_GSK.shape[-1] == 1:  # one product for all experts: programs take time per operator
            y_TO = self._by_experts(x_TD, None, is_taken_GSE.flatten(0, 1))
            return y_TO * routing.weights_GSK.reshape(-1, 1).to(y_TO.dtype)
        weights_GSE = no_GSE.scatter(-1, chosen_GSK, routing.weights_GSK)
        return self._by_experts(x_TD, weights_GSE.flatten(0, 1), is_taken_GSE.flatten(0, 1))

    def _by_experts(self, x_TD: Tensor, weights_TE: Tensor | None, is_taken_TE: Tensor) -> Tensor:
        """The weighted sum of each token's results from the experts that take it, (T, O); None for weights of 1."""
        y_TO = x_TD.new_zeros(x_TD.shape[0], self.out_features, dtype=compute_dtype(x_TD))
        for index in range(self.config.num_experts):
            (token_R,) = torch.where(is_taken_TE[:, index])
            y_RO = self.one_expert(index, x_TD.index_select(0, token_R))
            if weights_TE is not None:
                y_RO = y_RO * weights_TE[:, index].index_select(0, token_R)[:, None].to(y_RO.dtype)
            y_TO = y_TO.index_add(0, token_R, y_RO)
        return y_TO


class LayerForm(ExportableForm):
    """The exportable form of a layer with its stacked experts.

    Args:
        layer: A `MoeMlp`.
        x: Its input.
    """

    def __init__(self, layer: Any, x: Tensor) -> None:
        self.config, self.use_conv, self.out_features = layer.config, layer.use_conv, layer.out_features
        self.router, self.shared, self.images = layer.router, layer.shared, layer.images
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
