"""Experts: MLPs of one shape with stacked weights, and the choice of a backend that computes them.

T tokens of width D; H hidden width of an expert; E experts; K choices a token; R rows of the buffer that experts
compute.
"""

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe.moe.kernels import padded, rows, segments
from vmoe.moe.mlps import Glu
from vmoe.moe.routing import Routing, SlotRouting


class ExpertLinear(nn.Module):
    """E linear layers as one: `weight` (E, out, in) and `bias` (E, out) or None."""

    def __init__(
        self, num_experts: int, in_features: int, out_features: int, bias: bool, device=None, dtype=None
    ) -> None:
        super().__init__()
        placement = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, **placement))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features, **placement)) if bias else None
        _start(self)

    def fill(self, weight: Tensor, bias: Tensor | None) -> None:
        """Gives every expert the same `weight` (out, in) and `bias` (out,)."""
        self.weight.copy_(weight.expand_as(self.weight))
        if self.bias is not None:
            self.bias.copy_(bias.expand_as(self.bias))

    def extra_repr(self) -> str:
        num_experts, out_features, in_features = self.weight.shape
        return f"{num_experts} x {in_features} -> {out_features}, bias={self.bias is not None}"


class ExpertNorm(nn.Module):
    """E layer norms as one: `weight` and `bias` (E, width), or None where the template has none."""

    def __init__(self, num_experts: int, template: nn.Module, device=None, dtype=None) -> None:
        super().__init__()
        if not isinstance(template, nn.LayerNorm):
            raise ValueError(f"norm_layer makes {type(template).__name__}: experts can have a LayerNorm, or None")
        self.eps = template.eps
        self.weight = self.bias = None
        if template.weight is not None:
            self.weight = nn.Parameter(torch.ones(num_experts, *template.normalized_shape, device=device, dtype=dtype))
        if template.bias is not None:
            self.bias = nn.Parameter(torch.zeros(num_experts, *template.normalized_shape, device=device, dtype=dtype))

    def fill(self, norm: nn.LayerNorm) -> None:
        """Gives every expert the weights of `norm`."""
        for own, dense in ((self.weight, norm.weight), (self.bias, norm.bias)):
            if own is not None:
                own.copy_(dense.expand_as(own))

    def forward(self, x_RH: Tensor, expert_R: Tensor) -> Tensor:
        x_RH = F.layer_norm(x_RH, x_RH.shape[-1:], eps=self.eps)
        if self.weight is not None:
            x_RH = x_RH * self.weight.to(x_RH.dtype)[expert_R]
        return x_RH if self.bias is None else x_RH + self.bias.to(x_RH.dtype)[expert_R]


class Experts(nn.Module):
    """E two-layer MLPs; each runs on the tokens routed to it, and a token's results are summed by its combine weights.

    Args:
        num_experts: E.
        in_features: D.
        hidden_features: H.
        out_features: Width of the results.
        activation: Between the two layers. Before a `Glu` the first layer is twice as wide.
        norm_layer: Makes the LayerNorm behind the activation, or None.
        bias: Whether the first and the second layer have biases.
        hidden_dropout: Dropout rate behind the activation.
        device: Where the parameters are created.
        dtype: Their type.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        hidden_features: int,
        out_features: int,
        activation: nn.Module,
        norm_layer: Callable[[int], nn.Module] | None = None,
        bias: tuple[bool, bool] = (True, True),
        hidden_dropout: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        placement = {"device": device, "dtype": dtype}
        first_width = hidden_features * (2 if isinstance(activation, Glu) else 1)
        self.fc1 = ExpertLinear(num_experts, in_features, first_width, bias[0], **placement)
        self.act = activation
        self.drop1 = nn.Dropout(hidden_dropout)
        self.norm = None
        if norm_layer is not None:
            self.norm = ExpertNorm(num_experts, norm_layer(hidden_features), **placement)
        self.fc2 = ExpertLinear(num_experts, hidden_features, out_features, bias[1], **placement)

    def forward(self, x_TD: Tensor, routing: Routing | SlotRouting) -> Tensor:
        """(T, D) -> (T, out). Runs in autocast's type where autocast is on."""
        dtype = _compute_dtype(x_TD)
        x_TD = x_TD.to(dtype)
        backend = choose_backend(x_TD.device, routing)
        layout = self._layout(backend, routing)
        x_RD = routing.dispatch(x_TD) if layout is None else rows.dispatch(x_TD, layout)
        hidden_RH = backend.linear(x_RD, *_parameters_as(self.fc1, dtype), layout)
        hidden_RH = self.drop1(self.act(hidden_RH))
        if self.norm is not None:
            expert_R = rows.expert_of_row(layout, hidden_RH.shape[0], self.fc1.weight.shape[0], hidden_RH.device)
            hidden_RH = self.norm(hidden_RH, expert_R).to(dtype)
        y_RD = backend.linear(hidden_RH, *_parameters_as(self.fc2, dtype), layout)
        if layout is None:
            return routing.combine(y_RD)
        return rows.combine(y_RD, routing.groups.merge(routing.combine_weights_GSK()), layout)

    def _layout(self, backend: ModuleType, routing: Routing | SlotRouting) -> rows.Layout | None:
        """Where the choices stand among the rows; None where the routing itself fills equal slots."""
        if not isinstance(routing, Routing):
            return None
        merge = routing.groups.merge
        kept_TK, slots_TK = (None if part is None else merge(part) for part in (routing.kept_GSK, routing.slots_GSK))
        num_experts = self.fc1.weight.shape[0]
        return backend.layout(
            merge(routing.chosen_GSK), kept_TK, slots_TK, routing.groups, routing.capacity, num_experts
        )


class SharedExpert(nn.Module):
    """The experts that take every token, as one MLP of their joint width."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        activation: nn.Module,
        norm_layer: Callable[[int], nn.Module] | None = None,
        bias: tuple[bool, bool] = (True, True),
        hidden_dropout: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        placement = {"device": device, "dtype": dtype}
        first_width = hidden_features * (2 if isinstance(activation, Glu) else 1)
        self.fc1 = nn.Linear(in_features, first_width, bias[0], **placement)
        self.act = activation
        self.drop1 = nn.Dropout(hidden_dropout)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(hidden_features).to(device, dtype)
        self.fc2 = nn.Linear(hidden_features, out_features, bias[1], **placement)
        _start(self.fc1)
        _start(self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.drop1(self.act(self.fc1(x)))))


def choose_backend(device: torch.device, routing: Routing | SlotRouting) -> ModuleType:
    """`padded` for slots, and on a GPU where there is a capacity; `segments` otherwise."""
    if not isinstance(routing, Routing):
        return padded
    return padded if device.type == "cuda" and routing.capacity is not None else segments


def _start(linear: ExpertLinear | nn.Linear) -> None:
    """Truncated normal weights of standard deviation 0.02 and zero biases, as timm's transformers start."""
    nn.init.trunc_normal_(linear.weight, std=0.02)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def _compute_dtype(x: Tensor) -> torch.dtype:
    device_type = x.device.type
    if device_type != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def _parameters_as(linear: ExpertLinear, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return linear.weight.to(dtype), None if linear.bias is None else linear.bias.to(dtype)
