"""Compiles many small GPU operations into a few kernels."""

import warnings
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from vmoe.compiling import mend_compiler


class Fused:
    """Calls a function of tensors, compiled by torch.compile on a GPU; uncompiled elsewhere, or if compilation fails.

    Args:
        function: Its first argument is a tensor. Each new shape is compiled again.
    """

    def __init__(self, function: Callable[..., Tensor | tuple[Tensor, ...]]) -> None:
        self._plain = function

    @cached_property
    def _compiled(self) -> Callable[..., Tensor | tuple[Tensor, ...]] | None:
        mend_compiler()
        return torch.compile(self._plain, dynamic=False)  # importing the compiler takes seconds

    def __call__(self, first: Tensor, *others: Tensor) -> Tensor | tuple[Tensor, ...]:
        if first.is_cuda and self._compiled is not None:
            try:
                return self._compiled(first, *others)
            except TorchDynamoException as error:
                reason = " ".join(str(error).split())[:200]
                warnings.warn(f"images are varied by uncompiled code, which is slower: {reason}", stacklevel=2)
                self._compiled = None
        return self._plain(first, *others)
