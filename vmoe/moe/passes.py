"""Which MoE layers of a model the last forward pass ran: some passes end early, and what later layers hold is old."""

from collections.abc import Sequence
from typing import Protocol

import torch


class Mark:
    """Whether a layer ran in the last forward pass of its model, and the marks of the layers around it.

    In compiled code layers only write to marks, and all layers to as many of them: a guard on their values or numbers
    would compile the same block once more for each of its places. A compiled layer therefore does not notice that
    earlier layers were skipped. That later layers were skipped is always noticed.

    Attributes:
        ran: Whether it did.
        before: Of the layers before it in forward order.
        after: Of those after it, behind as many marks of no layer as make it as long for all.
    """

    def __init__(self) -> None:
        self.ran = False
        self.before: tuple[Mark, ...] = ()
        self.after: tuple[Mark, ...] = ()

    def set(self) -> None:
        """Called by a layer that runs."""
        if not torch.compiler.is_compiling():
            if is_backward():  # activation checkpointing computes a pass again, from its end
                return
            if self.ran:  # since then no layer before it ran
                for mark in self.before:
                    mark.ran = False
        for mark in self.after:
            mark.ran = False
        self.ran = True


class _Marked(Protocol):
    mark: Mark


def put_in_order(layers: Sequence[_Marked]) -> None:
    """Tells layers of one model, in forward order, of one another."""
    marks = tuple(layer.mark for layer in layers)
    for index, mark in enumerate(marks):
        nobody = tuple(Mark() for _ in range(index + 1))
        mark.before, mark.after = marks[:index], nobody + marks[index + 1 :]


def is_backward() -> bool:
    """Whether autograd runs a backward pass in this thread; checkpointing itself asks so."""
    return torch._C._current_graph_task_id() != -1
