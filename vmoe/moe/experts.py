"""Experts: MLPs of one shape with stacked weights, and the choice of a backend that computes them.

T tokens of width D; H hidden width of an expert; E experts; K choices a token.
"""

from types import ModuleType

import torch
from torch import Tensor, nn

from vmoe.moe.kernels import padded, rows, segments
from vmoe.moe.routers import Routing


class ExpertLinear(nn.Module):
    """E linear layers as one: `weight` (E, out, in) and `bias` (E, out) or None."""

    def __init__(
        self, num_experts: int, in_features: int, out_features: int, bias: bool, device=None, dtype=None
    ) -> None:
        super().__init__()
        placement = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, **placement))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features, **placement)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal weights of standard deviation 0.02 and zero biases, as timm's transformers start."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        num_experts, out_features, in_features = self.weight.shape
        return f"{num_experts} x {in_features} -> {out_features}, bias={self.bias is not None}"


class Experts(nn.Module):
    """E two-layer MLPs; each runs on the tokens routed to it, and a token's results are summed by its combine weights.

    Args:
        num_experts: E.
        in_features: D.
        hidden_features: H.
        out_features: Width of the results.
        activation: Between the two layers.
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
        bias: tuple[bool, bool] = (True, True),
        hidden_dropout: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.fc1 = ExpertLinear(num_experts, in_features, hidden_features, bias[0], device, dtype)
        self.act = activation
        self.drop1 = nn.Dropout(hidden_dropout)
        self.fc2 = ExpertLinear(num_experts, hidden_features, out_features, bias[1], device, dtype)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """(T, D) -> (T, out). Runs in autocast's type where autocast is on."""
        backend = choose_backend(x_TD.device, routing)
        merge = routing.groups.merge
        kept_TK, slots_TK = (None if part is None else merge(part) for part in (routing.kept_GSK, routing.slots_GSK))
        layout = backend.layout(
            merge(routing.chosen_GSK), kept_TK, slots_TK, routing.groups, routing.capacity, self.fc1.weight.shape[0]
        )
        dtype = _compute_dtype(x_TD)
        x_RD = rows.dispatch(x_TD.to(dtype), layout)
        hidden_RH = backend.linear(x_RD, *_parameters_as(self.fc1, dtype), layout)
        hidden_RH = self.drop1(self.act(hidden_RH))
        y_RD = backend.linear(hidden_RH, *_parameters_as(self.fc2, dtype), layout)
        return rows.combine(y_RD, merge(routing.combine_weights_GSK()), layout)


class SharedExpert(nn.Module):
    """The experts that take every token, as one MLP of their joint width."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        activation: nn.Module,
        bias: tuple[bool, bool] = (True, True),
        hidden_dropout: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features, bias[0], device=device, dtype=dtype)
        self.act = activation
        self.drop1 = nn.Dropout(hidden_dropout)
        self.fc2 = nn.Linear(hidden_features, out_features, bias[1], device=device, dtype=dtype)
        for linear in (self.fc1, self.fc2):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop1(self.act(self.fc1(x))))


def choose_backend(device: torch.device, routing: Routing) -> ModuleType:
    """`padded` on a GPU where there is a capacity, `segments` otherwise."""
    return padded if device.type == "cuda" and routing.capacity is not None else segments


def _compute_dtype(x: Tensor) -> torch.dtype:
    device_type = x.device.type
    if device_type != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def _parameters_as(linear: ExpertLinear, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return linear.weight.to(dtype), None if linear.bias is None else linear.bias.to(dtype)
