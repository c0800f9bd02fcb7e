"""Sums of the routers' statistics over an epoch. They stay on the device and are read once at its end.

Axes: E experts of a layer.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vmoe.moe import moe_layers
from vmoe.training.parallel.collectives import rank_of_all, total

DEAD_LOAD = 0.01
TAKEN_OVER_SHARE = 0.5
TAKEN_OVER_LOAD = 4.0


class RoutingSums:
    """Per MoE layer, the mean over an epoch's steps of each expert's load, the dropped share and the gate entropy."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # (E + 3,) per layer: load of each expert, dropped, entropy, steps

    def update(self, model: nn.Module) -> None:
        """Adds the statistics of the model's last forward pass."""
        for name, layer in moe_layers(model):
            s = layer.statistics
            scalars = [s.dropped, s.entropy, torch.ones_like(s.entropy)]
            row = torch.cat([s.load.float(), torch.stack([scalar.float() for scalar in scalars])])
            if name in self._sums:
                self._sums[name] += row
            else:
                self._sums[name] = row

    def means(self) -> dict[str, tuple[list[float], float, float]]:
        """Means per layer: relative load of each expert (1 = fair, 0 = dead), dropped share, gate entropy in nats.

        They cover all ranks, and all ranks must call it.
        """
        result = {}
        for name, sums in self._sums.items():
            *loads, dropped, entropy, steps = total(sums).tolist()
            result[name] = ([load / steps * len(loads) for load in loads], dropped / steps, entropy / steps)
        return result

    def reset(self) -> None:
        for sums in self._sums.values():  # in place: a CUDA graph adds to these tensors
            sums.zero_()

    def to(self, device: torch.device) -> None:
        self._sums = {name: sums.to(device) for name, sums in self._sums.items()}

    def state(self) -> dict[str, Any]:
        """The mean of the sums over the ranks, so that a step has the same weight with any number of ranks."""
        return {name: (total(sums) / rank_of_all()[1]).cpu() for name, sums in self._sums.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        rank, ranks = rank_of_all()
        share = 0 if rank else ranks
        self._sums = {name: sums * share for name, sums in state.items()}


def metric_columns(model: nn.Module) -> list[str]:
    """The names of the metrics that `as_metrics` gives for a model's MoE layers."""
    return list(as_metrics({name: ([0.0] * layer.num_experts, 0.0, 0.0) for name, layer in moe_layers(model)}))


def as_metrics(means: dict[str, tuple[list[float], float, float]]) -> dict[str, float]:
    """The means of an epoch under their names in metrics.csv."""
    metrics = {}
    for name, (loads, dropped, entropy) in means.items():
        metrics |= {f"moe/{name}/load/{expert}": load for expert, load in enumerate(loads)}
        metrics |= {f"moe/{name}/max_load": max(loads), f"moe/{name}/dropped": dropped, f"moe/{name}/entropy": entropy}
    return metrics


def dead_experts(loads: list[float]) -> list[int]:
    """The dead experts of a layer, from the relative loads (E,)."""
    return [expert for expert, load in enumerate(loads) if load < DEAD_LOAD]


def warnings_of(means: dict[str, tuple[list[float], float, float]]) -> list[str]:
    """A line for each layer in which experts are dead or one has taken over; none for balanced routing."""
    lines = []
    for name, (loads, _, _) in means.items():
        dead = dead_experts(loads)
        largest = max(range(len(loads)), key=loads.__getitem__)
        share = loads[largest] / len(loads)
        if dead:
            lines.append(f"{name}: {_experts(dead)} got under {DEAD_LOAD:.0%} of a fair share of the tokens this epoch")
        if share > TAKEN_OVER_SHARE and loads[largest] > TAKEN_OVER_LOAD:
            lines.append(f"{name}: expert {largest} has taken over, with {share:.0%} of the tokens")
    return [f"{line}; raise moe.importance_loss_weight and moe.load_loss_weight, or lower optim.lr" for line in lines]


def _experts(indices: list[int]) -> str:
    return f"expert{'s' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"
