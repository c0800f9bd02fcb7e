"""Compute backends: how the experts' MLPs are computed from plain tensors, which never see a router.

A backend is a module with

    expert_mlp(x_TD, choices, mlp) -> (T, O)

the sum over a token's choices of weight * mlp(token), for `interface.Choices` and `interface.Mlp`. Every backend
computes the same; they differ in which shapes, types and devices they take and are fast on: `segments` takes all,
`padded` all with a capacity, `fused` those that it does not refuse, `cpu` those on a CPU with GELU and no more.
"""

import importlib
import importlib.util
from functools import cache
from types import ModuleType

from torch import Tensor


def fused_for(tensor: Tensor) -> ModuleType | None:
    """The package `kernels.fused`, where there is Triton and the tensor lies on a GPU; else None."""
    return _fused() if tensor.is_cuda and tensor.numel() else None


@cache
def _fused() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("vmoe.moe.kernels.fused")
