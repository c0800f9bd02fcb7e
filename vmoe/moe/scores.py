"""Scores of routers, in float32 or wider whatever the autocast."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vmoe.moe.kernels import fused_for


def full_precision_linear(x: Tensor, weight: Tensor) -> Tensor:
    """X @ weight.T in float32, or in float64 when either is, also under autocast."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    fused = fused_for(x)
    if fused is not None and x.dim() == 2 and dtype == torch.float32 and weight.shape[0] <= fused.MAX_SCORES:
        return fused.scores(x, weight)
    with torch.autocast(x.device.type if x.device.type != "meta" else "cpu", enabled=False):
        return F.linear(x.to(dtype), weight.to(dtype))


def scores_and_tokens(x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    """`full_precision_linear`, and x for its other uses, whose gradient may then meet this one's at no cost."""
    fused = fused_for(x_TD)
    dtype = torch.promote_types(x_TD.dtype, weight_ED.dtype)
    if fused is not None and dtype != torch.float64 and weight_ED.shape[0] <= fused.MAX_SCORES:
        return fused.scores_and_tokens(x_TD, weight_ED)
    return full_precision_linear(x_TD, weight_ED), x_TD


def with_noise(logits: Tensor, scale: float, draw: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Logits plus normal noise of standard deviation `scale`, by `draw` or torch; the same tensor where it is 0."""
    return torch.add(logits, (draw or torch.randn_like)(logits), alpha=scale) if scale > 0 else logits
