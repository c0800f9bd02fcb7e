"""Operators with their own gradient: cheap to call from eager code, and one node of a compiled graph.

A custom operator of PyTorch costs the host tens of microseconds per call. On small layers that is more than its kernels
take. So only traced code uses it; eager code calls the same functions through a plain `torch.autograd.Function`.
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
    """Registers `forward` as the custom operator vmoe::`name` and returns a function that calls it.

    An operator's schema is a flat list of arguments. If `forward` has many, it can take one record instead: its only
    parameter is annotated with a NamedTuple class. Then `fake` takes the record too, and callers unpack it.

    Args:
        name: Name of the operator.
        forward: Computes the results from tensors and plain values. Its annotations are the operator's schema.
        fake: Returns empty results of the right shapes.
        save: save(ctx, inputs, output) keeps what the backward pass needs; `inputs` has the arguments by name. None
            for an operator without gradient.
        backward: backward(ctx, *grads) returns a dict from argument names to gradients; others have no gradient.
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
    """Whether a compiler, an exporter, torch.func or a dispatch mode (FakeTensorMode) traces the current code."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or is_transformed()


def is_transformed() -> bool:
    """Whether a transform of torch.func (grad, vjp, vmap, ...) is active. Operators with a gradient refuse those."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def is_capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph records what is done on the tensor's device."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _record_of(forward: Callable) -> type | None:
    """The NamedTuple class of the only parameter, or None if the arguments are separate parameters."""
    kinds = [parameter.annotation for parameter in inspect.signature(forward).parameters.values()]
    return kinds[0] if len(kinds) == 1 and hasattr(kinds[0], "_fields") else None


def _flat(function: Callable, record: type) -> Callable:
    """A version of `function` that takes the record's fields as separate arguments."""

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
    """Makes tensor arguments contiguous, so that results made like them have the strides that traced code expects."""

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


def first_derivative_only(name: str, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The gradients as they are; to take their gradient is an error."""
    return _FirstDerivativeOnly.apply(name, torch.empty(0, requires_grad=True), *grads)


class _FirstDerivativeOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name: str, _: Tensor, *grads: Tensor | None):
        ctx.name = name
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx, *grads):
        _refuse_second_derivative(ctx.name)(ctx, *grads)


def _without_gradient(forward: Callable, traced: Callable) -> Callable:
    def direct(*arguments):
        # the traced operator's backward raises an error with the reason
        is_learned = any(isinstance(argument, Tensor) and argument.requires_grad for argument in arguments)
        return traced(*arguments) if is_learned else forward(*arguments)

    return direct


def _function(name: str, forward: Callable, save: Callable, backward: Callable) -> Callable:
    # forward takes ctx, because with a separate setup_context PyTorch inspects the signature in every call
    def forward_and_save(ctx, *arguments):
        output = forward(*arguments)
        save(ctx, arguments, output)
        return output

    methods = {"forward": staticmethod(forward_and_save), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), methods).apply
