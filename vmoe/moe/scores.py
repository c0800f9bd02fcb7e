"""Scores (logits) of routers, in float32 or wider even under autocast."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe.moe.attached import is_bare
from vmoe.moe.kernels import PLAIN, Kernels, kernels_for
from vmoe.moe.kernels.sizes import MAX_SCORES


def full_precision_linear(x: Tensor, weight: Tensor, kernels: Kernels = PLAIN) -> Tensor:
    """The product x @ weight.T, in float64 if either is float64 and else in float32, even under autocast."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    routing = kernels.routing
    if routing is not None and x.dim() == 2 and dtype == torch.float32 and weight.shape[0] <= MAX_SCORES:
        return routing.scores(x, weight)
    wide = _wide_enough(x, dtype)
    with _without_autocast(x):
        return F.linear(x.to(wide), weight.to(wide)).to(dtype)


class Gate(nn.Linear):
    """A router's linear layer without bias, in float32 or wider."""

    def forward(self, x: Tensor) -> Tensor:
        # hooks and adapters call it with x alone, so it chooses the kernels itself
        return full_precision_linear(x, self.weight, kernels_for(x))


def gate_scores(x: Tensor, gate: Gate, kernels: Kernels = PLAIN) -> Tensor:
    """The gate's scores of x, in float32 or wider. Adapters and hooks on the gate compute in that type too."""
    if is_bare(gate, Gate):
        return full_precision_linear(x, gate.weight, kernels if kernels.routing is not None else kernels_for(x))
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = _wide_enough(x, dtype)
    with _without_autocast(x):
        if wide != dtype:
            return gate(x.to(wide)).to(dtype)
        return gate(x.to(dtype))


def scores_with_tokens(x_TD: Tensor, gate: Gate, kernels: Kernels = PLAIN) -> tuple[Tensor, Tensor]:
    """The gate's scores of x, and x for its other uses, so that one kernel can add both gradients of x."""
    if kernels.routing is not None and is_bare(gate, Gate):
        dtype = torch.promote_types(x_TD.dtype, gate.weight.dtype)
        if dtype != torch.float64 and gate.weight.shape[0] <= MAX_SCORES:
            return kernels.routing.scores_and_tokens(x_TD, gate.weight)
    return gate_scores(x_TD, gate, kernels), x_TD


def with_noise(logits: Tensor, scale: float, draw: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Adds normal noise of standard deviation `scale`, from `draw` or torch. With 0 it returns the same tensor."""
    return torch.add(logits, (draw or torch.randn_like)(logits), alpha=scale) if scale > 0 else logits


def _without_autocast(x: Tensor) -> AbstractContextManager:
    """A context without autocast. Where there is none already, it costs nothing."""
    device_type = _device_type(x)
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def _device_type(x: Tensor) -> str:
    """The device type that autocast is asked for; a meta tensor counts as the CPU's."""
    return x.device.type if x.device.type != "meta" else "cpu"


def _wide_enough(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, but float64 where torch.jit traces under autocast: the traced program would narrow float32 again."""
    is_narrowed = torch.jit.is_tracing() and torch.is_autocast_enabled(_device_type(x))
    return torch.float64 if is_narrowed else dtype
