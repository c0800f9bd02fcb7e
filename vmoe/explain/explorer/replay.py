"""Replays passes that change nothing before a layer: the part before it is computed only once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn


class Prefix:
    """The results of the modules before one layer of a model, for one batch.

    It keeps whole blocks before the layer's block, and the parts of its own block. Computation between modules, such as
    a residual connection, is repeated.

    Args:
        model: A model in evaluation mode.
        name: The layer's name in the model.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self._layer = model.get_submodule(name)
        parts = name.split(".")
        way = [model.get_submodule(".".join(parts[:length])) for length in range(len(parts) + 1)]
        self._beside = [
            (above, module) for above in way[:-1] for module in above.children() if not any(module is on for on in way)
        ]
        self._chains = [above for above in way[:-1] if type(above) is nn.Sequential]
        self._given: dict[nn.Module, list[Any]] = {}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Records one pass of the model within the block."""
        self._given = {}
        called: set[nn.Module] = set()
        last: dict[nn.Module, nn.Module] = {}
        is_before = True

        def reach(*_: object) -> None:
            nonlocal is_before
            is_before = False

        def keeper(above: nn.Module) -> Callable:
            def keep(module: nn.Module, inputs: tuple, output: Any) -> None:
                if not is_before:
                    return
                given = self._given.setdefault(module, [])
                given.append(_copied(output))
                if above in called and given[-1] is not _UNKNOWN:  # it hides the result of the module before it
                    if above in last:
                        self._given[last[above]][-1] = _PASSED_ON
                    last[above] = module
                else:
                    last.pop(above, None)

            return keep

        handles = [self._layer.register_forward_pre_hook(reach)]
        handles += [above.register_forward_pre_hook(lambda module, _: called.add(module)) for above in self._chains]
        handles += [module.register_forward_hook(keeper(above)) for above, module in self._beside]
        try:
            with torch.compiler.set_stance("force_eager"):  # compiled code calls no hooks
                yield
        finally:
            for handle in handles:
                handle.remove()

    def record(self, model: nn.Module, images: Tensor) -> None:
        """Records a pass over a batch that ends where the layer begins."""
        with self.recorded(), suppress(_Reached):
            handle = self._layer.register_forward_pre_hook(_stop)
            try:
                model(images)
            finally:
                handle.remove()

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Replays one pass over the same batch within the block, without computing the part before the layer."""
        own = {module: module.__dict__.get("forward") for module in self._given}
        for module, given in self._given.items():
            module.forward = _giver(module.forward, given)
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            for module, forward in own.items():
                module.__dict__.pop("forward", None)
                if forward is not None:
                    module.forward = forward


class _Reached(Exception):
    """Ends a pass at the layer."""


def _stop(*_: object) -> None:
    raise _Reached


_PASSED_ON = object()  # the result is not needed: the next module of a chain has a kept result
_UNKNOWN = object()  # the result holds no tensors, so it is computed again


def _copied(output: Any) -> Any:
    """A copy of an output, since later code may change it in place."""
    if isinstance(output, Tensor):
        return output.clone()
    if type(output) in (tuple, list) and all(isinstance(part, Tensor) for part in output):
        return type(output)(part.clone() for part in output)
    return _UNKNOWN


def _giver(forward: Callable, given: list[Any]) -> Callable:
    """A forward method that returns its kept results call by call, and computes further ones."""
    left = iter(given)

    def give(*inputs: Any, **named: Any) -> Any:
        output = next(left, _UNKNOWN)
        if output is _PASSED_ON:
            return inputs[0]
        return forward(*inputs, **named) if output is _UNKNOWN else _copied(output)

    return give
