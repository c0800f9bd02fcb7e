"""Operators with a gradient of their own, cheap to call from eager code and one node of a compiled graph.

A custom operator of PyTorch costs the host tens of microseconds per call, which on small layers is more than its
kernels take. So it serves tracing, and eager code calls the same functions through a plain `torch.autograd.Function`.
"""

import functools
import inspect
import typing
from collections import namedtuple
from collections.abc import Callable

import torch
from torch import Tensor, library


def operator(
    name: str, forward: Callable, fake: Callable, save: Callable | None = None, backward: Callable | None = None
) -> Callable:
    """Registers `forward` as the custom operator vmoe::`name` and returns what calls it.

    An operator's schema is a flat list of arguments. A `forward` that has many takes one record instead, a NamedTuple
    class that its only parameter is annotated with: then `fake` takes the record too, and the caller gives it unpacked.

    Args:
        name: Of the operator.
        forward: Computes it from tensors and plain values; its annotations are the operator's schema.
        fake: Makes empty results of the right shapes.
        save: save(ctx, inputs, output) before a backward pass; `inputs` has the arguments by name. None without one.
        backward: backward(ctx, *grads) gives the arguments' gradients by name, and none for those that have none.
    """
    record = _record_of(forward)
    if record is not None:
        forward, fake = _flat(forward, record), _flat(fake, record)
    registered = library.custom_op(f"vmoe::{name}", _of_contiguous(forward), mutates_args=())
    registered.register_fake(_of_contiguous(fake))
    traced = getattr(torch.ops.vmoe, name).default
    if save is None or backward is None:
        registered.register_autograd(_refuse_second_derivative(name))
        direct = _without_gradient(forward, traced)
    else:
        names = tuple(inspect.signature(forward).parameters)
        save, backward = _by_name(save, record or namedtuple(name, names)), _in_order(backward, names)
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


def _record_of(forward: Callable) -> type | None:
    """The NamedTuple class that holds all arguments; None where they are parameters of their own."""
    kinds = [parameter.annotation for parameter in inspect.signature(forward).parameters.values()]
    return kinds[0] if len(kinds) == 1 and hasattr(kinds[0], "_fields") else None


def _flat(function: Callable, record: type) -> Callable:
    """`function` of the record's fields."""

    def call(*arguments):
        return function(record(*arguments))

    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
        for name, kind in typing.get_type_hints(record).items()
    ]
    call.__signature__ = inspect.signature(function).replace(parameters=parameters)
    return call


def _by_name(save: Callable, record: type) -> Callable:
    def save_record(ctx, inputs, output):
        save(ctx, record(*inputs), output)

    return save_record


def _in_order(backward: Callable, names: tuple[str, ...]) -> Callable:
    def gradients(ctx, *grads):
        found = backward(ctx, *grads)
        return tuple(map(found.get, names))

    return gradients


def _of_contiguous(function: Callable) -> Callable:
    """`function` of contiguous tensors, so that results like them lie in memory as traced code expects."""

    @functools.wraps(function)
    def call(*arguments):
        return function(*(each.contiguous() if isinstance(each, Tensor) else each for each in arguments))

    return call


def _refuse_second_derivative(name: str) -> Callable:
    def refuse(ctx, *grads):
        raise NotImplementedError(
            f"vmoe::{name} has no derivative of its own, so fused kernels give no second derivatives; "
            "compute them on the CPU, or with torch.func, for which other kernels serve"
        )

    return refuse


def _without_gradient(forward: Callable, traced: Callable) -> Callable:
    def direct(*arguments):
        # once differentiated, the results of the traced operator are an error that says why
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
