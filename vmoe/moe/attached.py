"""What others attach to a module: hooks (as torch's pruning), parametrizations, adapters (as PEFT's LoRA)."""

from torch import nn


def is_bare(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether nothing is attached to a module of this class, so that its parameters may be used without calling it."""
    return type(module) is kind and not (
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    )
