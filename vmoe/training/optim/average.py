"""The exponential moving average of a model's weights, kept on the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vmoe.training.optim.weight_passes import move_towards
from vmoe.training.parallel.collectives import local


class WeightAverage:
    """The average of the weights after each update: average = decay * average + (1 - decay) * weights.

    The decay at update t is at most (1 + t) / (10 + t), so the initial weights are soon forgotten. timm's and torch's
    averages keep the decay or the count on the host. Here an update never synchronises, works in a CUDA graph, and is
    skipped if the guard blocked it.

    Args:
        model: The model. Its buffers are not averaged.
        decay: The highest decay.

    Attributes:
        weights: The average of each parameter, by its name in the model.
        updates: () the number of updates in the average.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self.updates = torch.zeros(())
        self._parameters = dict(model.named_parameters())

    def to(self, device: torch.device) -> None:
        self.weights = {name: weight.to(device) for name, weight in self.weights.items()}
        self.updates = self.updates.to(device)

    def is_of(self, model: nn.Module) -> bool:
        """Whether this is the average of `model`."""
        return all(self._parameters.get(name) is parameter for name, parameter in model.named_parameters())

    @torch.no_grad()
    def update(self, found_inf: Tensor | None) -> None:
        """Adds the weights to the average, unless `found_inf` () is 1."""
        step = 1 - ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)
        counts = torch.ones_like(step) if found_inf is None else (found_inf <= 0).to(step)
        move_towards(*self._pairs(), step * counts)
        self.updates += counts

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Swaps the average into the model within the context, then restores the weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state(self) -> dict[str, Any]:
        return {"weights": dict(self.weights), "updates": self.updates}

    def load_state(self, state: dict[str, Any]) -> None:
        for name, weight in state.get("weights", {}).items():  # with shards they are loaded together with the weights
            self.weights[name].copy_(weight)
        self.updates.copy_(state["updates"])

    @torch.no_grad()
    def _swap(self) -> None:
        weights, parameters = self._pairs()
        kept = [parameter.clone() for parameter in parameters]
        torch._foreach_copy_(parameters, weights)
        torch._foreach_copy_(weights, kept)

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """The averages and the parameters (this rank's shards), in the same order."""
        return [local(weight) for weight in self.weights.values()], [local(self._parameters[n]) for n in self.weights]
