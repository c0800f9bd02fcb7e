"""What others attach to a module: hooks (as torch's pruning), parametrizations, adapters (as PEFT's LoRA)."""

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def is_bare(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether nothing is attached to a module of this class, so that its parameters may be used without calling it."""
    return type(module) is kind and not (
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    )


def copy_with_attached(model: nn.Module) -> nn.Module:
    """A copy of a model, also where hooks left tensors with a graph in it, as torch's pruning does in each pass."""
    tensors = [tensor for module in model.modules() for tensor in tensors_in(vars(module))]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in tensors if not tensor.is_leaf})


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Those in a tensor, or in dicts, lists and tuples of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)
