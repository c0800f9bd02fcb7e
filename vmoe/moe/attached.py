"""Checks and copies for modules with attachments: hooks (torch's pruning), parametrizations, adapters (PEFT's LoRA)."""

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def is_bare(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` is of this very class and has no hooks and no `forward` of its own, as accelerate's offloading
    gives it: then its parameters may be used without calling it.
    """
    is_hooked = (
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    )
    return type(module) is kind and "forward" not in module.__dict__ and not is_hooked


def copy_with_attached(model: nn.Module) -> nn.Module:
    """A deep copy of a model. Unlike `copy.deepcopy` it accepts tensors with a graph, which torch's pruning leaves."""
    tensors = [tensor for module in model.modules() for tensor in tensors_in(vars(module))]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in tensors if not tensor.is_leaf})


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in a value that may be a tensor, a dict, a list or a tuple, nested to any depth."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)
