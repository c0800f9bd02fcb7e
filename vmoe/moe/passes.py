"""Tracks which MoE layers the last forward pass ran. A pass may end early, and then later layers hold old losses."""

from collections.abc import Sequence
from typing import Protocol

import torch


class Mark:
    """Whether a layer ran in the last forward pass of its model, with the marks of the layers around it.

    Compiled layers only write to marks, and each to the same number of them. A guard on values or numbers would compile
    the same block again for each layer. So a compiled layer does not notice that earlier layers were skipped. Skipped
    later layers are always noticed.

    Attributes:
        ran: Whether the layer ran.
        before: The marks of the layers before it in forward order.
        after: The marks of the layers after it, padded at the front to one length for all layers.
    """

    def __init__(self) -> None:
        self.ran = False
        self.before: tuple[Mark, ...] = ()
        self.after: tuple[Mark, ...] = ()

    def set(self) -> None:
        """Records that the layer runs; the layer calls it in its forward pass."""
        if not torch.compiler.is_compiling():
            if is_backward():  # activation checkpointing recomputes layers in reverse order
                return
            if self.ran:  # still set since its last run: no earlier layer ran in between
                for mark in self.before:
                    mark.ran = False
        for mark in self.after:
            mark.ran = False
        self.ran = True


class _Marked(Protocol):
    mark: Mark


def put_in_order(layers: Sequence[_Marked]) -> None:
    """Links the marks of a model's layers, which are given in forward order."""
    marks = tuple(layer.mark for layer in layers)
    for index, mark in enumerate(marks):
        nobody = tuple(Mark() for _ in range(index + 1))
        mark.before, mark.after = marks[:index], nobody + marks[index + 1 :]


def is_backward() -> bool:
    """Whether autograd runs a backward pass in this thread. Checkpointing of PyTorch uses the same test."""
    return torch._C._current_graph_task_id() != -1
