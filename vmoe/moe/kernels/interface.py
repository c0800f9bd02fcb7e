"""The records that experts.py passes to a backend. Their tensors are plain ones, never sharded."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vmoe.moe.groups import Groups
from vmoe.moe.routing import Routing


class Choices(NamedTuple):
    """The K experts that each of T tokens chose.

    Attributes:
        chosen_TK: The experts.
        weights_TK: The combine weights, before drops.
        kept_TK: Which choices count; None for all.
        slots_TK: The slot of each choice in its group and expert; None without a capacity.
        groups: How the tokens are grouped.
        capacity: C, the slots an expert has for a group; None for no bound.
    """

    chosen_TK: Tensor
    weights_TK: Tensor
    kept_TK: Tensor | None
    slots_TK: Tensor | None
    groups: Groups
    capacity: int | None

    @classmethod
    def of(cls, routing: Routing) -> "Choices":
        """The choices of a routing decision."""
        merge = routing.groups.merge
        kept_TK, slots_TK = (None if part is None else merge(part) for part in (routing.kept_GSK, routing.slots_GSK))
        chosen_TK, weights_TK = merge(routing.chosen_GSK), merge(routing.weights_GSK)
        return cls(chosen_TK, weights_TK, kept_TK, slots_TK, routing.groups, routing.capacity)

    @property
    def slots_of_expert(self) -> int | None:
        """G * C, the choices that an expert takes at most; None for no bound."""
        return None if self.capacity is None else self.groups.count * self.capacity

    def combine_weights_TK(self) -> Tensor:
        """The combine weights, zero where the choice does not count."""
        return self.weights_TK if self.kept_TK is None else self.weights_TK * self.kept_TK


class Mlp(NamedTuple):
    """E expert MLPs: dropout(activation(x @ weight1.T + bias1)), a norm, @ weight2.T + bias2.

    Attributes:
        weight1: (E, H, D); the parameter, to which the gradient goes.
        bias1: (E, H) or None.
        weight2: (E, O, H).
        bias2: (E, O) or None.
        activation: The activation between the layers.
        norm: The norm after it, called as norm(hidden rows, the expert of each row); or None.
        dropout: The dropout rate, 0 at evaluation.
        dtype: The compute type.
        cast: Returns one of the weights in `dtype`, without gradient.
        keeps_casts: Whether `cast` keeps its results.
        recompute: Whether the backward pass computes activations again instead of keeping them, if the backend can.
    """

    weight1: Tensor
    bias1: Tensor | None
    weight2: Tensor
    bias2: Tensor | None
    activation: nn.Module
    norm: nn.Module | None
    dropout: float
    dtype: torch.dtype
    cast: Callable[[Tensor], Tensor]
    keeps_casts: bool = False
    recompute: bool = False

    def is_learned(self, *others: Tensor) -> bool:
        """Whether the weights, the biases or other tensors need a gradient."""
        learned = (*others, self.weight1, self.bias1, self.weight2, self.bias2)
        return any(tensor is not None and tensor.requires_grad for tensor in learned)
