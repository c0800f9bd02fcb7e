"""Measures the use of a model's experts, to choose those to keep, and their similarity for the router.

T tokens of width D; E experts; K choices per token; G images; C slots of an expert for an image.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vmoe.moe import ExpertChoiceRouting, MoeMlp, Routing, moe_layers

Choosing = Routing | ExpertChoiceRouting


class ExpertUse(NamedTuple):
    """The use of one layer's experts over a number of images; float64 on the CPU.

    Attributes:
        mass_E: Routed mass: the mean over all tokens of each expert's combine weight.
        norm_E: Mean over all tokens of the 2-norm of each expert's weighted output; None if not measured.
        affinity_EE: Cosine similarity of the experts' router scores over the tokens, in [-1, 1].
    """

    mass_E: Tensor
    norm_E: Tensor | None
    affinity_EE: Tensor


@torch.no_grad()
def measure_use(
    model: nn.Module, batches: Iterable, device: torch.device | str = "cpu", with_norms: bool = False
) -> dict[str, ExpertUse]:
    """Measures the use of the experts of every MoE layer, by the layer's name.

    Args:
        model: A model with token choice or expert choice, not Soft MoE. It is put in evaluation mode and moved to
            `device`.
        batches: Batches (images (B, 3, H, W), ...).
        device: The device to run on.
        with_norms: Whether to measure `norm_E` too, for which every expert runs a second time.
    """
    model = model.to(device).eval()
    counters = {name: _Counter(layer, with_norms) for name, layer in moe_layers(model)}
    handles = [layer.experts.register_forward_hook(counters[name]) for name, layer in moe_layers(model)]
    try:
        for images, *_ in batches:
            model(images.to(device, non_blocking=True))
    finally:
        for handle in handles:
            handle.remove()
    return {name: counter.result() for name, counter in counters.items()}


class _Counter:
    """A forward hook on a layer's experts that sums up their use."""

    def __init__(self, layer: MoeMlp, with_norms: bool) -> None:
        experts, device = layer.num_experts, layer.experts.fc1.weight.device
        self.tokens = 0
        self.mass_E = torch.zeros(experts, dtype=torch.float64, device=device)
        self.norm_E = torch.zeros_like(self.mass_E) if with_norms else None
        self.products_EE = torch.zeros(experts, experts, dtype=torch.float64, device=device)

    def __call__(self, experts: nn.Module, inputs: tuple[Tensor, Choosing, Any], output: Tensor) -> None:
        x_TD, routing, *_ = inputs
        self.tokens += x_TD.shape[0]
        self.mass_E += _mass_E(routing)
        scores_TE = _scores_GSE(routing).flatten(0, 1).double()
        scores_TE = scores_TE - scores_TE.mean(-1, keepdim=True)  # only differences between experts matter
        self.products_EE += scores_TE.T @ scores_TE
        if self.norm_E is not None:
            for expert in range(len(self.norm_E)):
                alone_TD = experts.forward(x_TD, _alone(routing, expert))  # not a call, which would run this hook again
                self.norm_E[expert] += alone_TD.norm(dim=-1).sum(dtype=torch.float64)

    def result(self) -> ExpertUse:
        length_E = self.products_EE.diagonal().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        affinity_EE = (self.products_EE / length_E / length_E[:, None]).clamp(-1, 1)
        norm_E = None if self.norm_E is None else self.norm_E.cpu() / max(1, self.tokens)
        return ExpertUse(self.mass_E.cpu() / max(1, self.tokens), norm_E, affinity_EE.cpu())


def _mass_E(routing: Choosing) -> Tensor:
    """Sum over the tokens of the combine weights of each expert, after drops."""
    if isinstance(routing, ExpertChoiceRouting):
        return routing.weights_GEC.sum((0, 2), dtype=torch.float64)
    weights = routing.combine_weights_GSK().flatten().double()
    return weights.new_zeros(routing.gates_GSE.shape[-1]).scatter_add(0, routing.chosen_GSK.flatten(), weights)


def _scores_GSE(routing: Choosing) -> Tensor:
    """The router's logits, up to a constant per token."""
    if isinstance(routing, ExpertChoiceRouting):
        return routing.gates_GSE.clamp_min(torch.finfo(routing.gates_GSE.dtype).tiny).log()
    return routing.logits_GSE


def _alone(routing: Choosing, expert: int) -> Choosing:
    """The routing with the weights of all other experts at zero."""
    if isinstance(routing, ExpertChoiceRouting):
        weights_GEC = torch.zeros_like(routing.weights_GEC)
        weights_GEC[:, expert] = routing.weights_GEC[:, expert]
        return routing._replace(weights_GEC=weights_GEC)
    return routing._replace(weights_GSK=routing.weights_GSK * (routing.chosen_GSK == expert))


SCORES: dict[str, Callable[[ExpertUse], Tensor | None]] = {
    "routed-mass": lambda use: use.mass_E,
    "activation-norm": lambda use: use.norm_E,
}
