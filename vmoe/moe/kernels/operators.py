"""Operators with a gradient of their own, cheap to call from eager code and one node of a compiled graph.

A custom operator of PyTorch costs the host tens of microseconds a call, which on small layers is more than its
kernels take. So it serves tracing, and eager code calls the same functions through a plain `torch.autograd.Function`.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, library


def operator(
    name: str, forward: Callable, fake: Callable, save: Callable | None = None, backward: Callable | None = None
) -> Callable:
    """Registers `forward` as the custom operator vmoe::`name` and returns what calls it.

    Args:
        name: Of the operator.
        forward: Computes it from tensors and plain values; its annotations are the operator's schema.
        fake: Makes empty results of the right shapes.
        save: setup_context(ctx, inputs, output) of the gradient; None without one.
        backward: backward(ctx, *grads) of the gradient.
    """
    registered = library.custom_op(f"vmoe::{name}", _packed(forward), mutates_args=())
    registered.register_fake(_packed(fake))
    traced = getattr(torch.ops.vmoe, name).default
    if backward is None:
        registered.register_autograd(_refusal(name))
        direct = _without_gradient(forward, traced)
    else:
        registered.register_autograd(backward, setup_context=save)
        direct = _function(name, forward, save, backward)

    def call(*arguments):
        if is_traced():
            return traced(*arguments)
        return direct(*arguments) if torch.is_grad_enabled() else forward(*arguments)

    return call


def is_traced() -> bool:
    """Whether a compiler, an exporter, torch.func or a mode such as FakeTensorMode watches what is called."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or is_transformed()


def is_transformed() -> bool:
    """Whether a transform of torch.func (grad, vjp, vmap, ...) is at work, which operators with a gradient refuse."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _packed(function: Callable) -> Callable:
    """`function` of contiguous tensors, so that results like them lie in memory as traced code was told they would."""

    @functools.wraps(function)
    def call(*arguments):
        return function(*(each.contiguous() if isinstance(each, Tensor) else each for each in arguments))

    return call


def _refusal(name: str) -> Callable:
    def refuse(ctx, *grads):
        raise NotImplementedError(
            f"vmoe::{name} has no derivative of its own, so fused kernels give no second derivatives; "
            "compute them on the CPU, or with torch.func, for which other kernels serve"
        )

    return refuse


def _without_gradient(forward: Callable, traced: Callable) -> Callable:
    def direct(*arguments):
        # whose results, once differentiated, are an error that says so
        is_learned = any(isinstance(argument, Tensor) and argument.requires_grad for argument in arguments)
        return traced(*arguments) if is_learned else forward(*arguments)

    return direct


def _function(name: str, forward: Callable, save: Callable, backward: Callable) -> Callable:
    # A forward that takes ctx: with a setup_context of its own, PyTorch inspects the signature in every call
    def forward_and_save(ctx, *arguments):
        output = forward(*arguments)
        save(ctx, arguments, output)
        return output

    methods = {"forward": staticmethod(forward_and_save), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), methods).apply
