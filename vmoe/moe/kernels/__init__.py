"""Compute backends: how the experts' MLPs are computed from plain tensors, which never see a router.

A backend is a module with

    expert_mlp(x_TD, choices, mlp) -> (T, O)

the sum over a token's choices of weight * mlp(token), for `interface.Choices` and `interface.Mlp`. Every backend
computes the same; they differ in which shapes, types and devices they take and are fast on: `segments` takes all,
`padded` all with a capacity, `fused` those that it does not refuse, `cpu` those on a CPU with GELU and no more.
"""

from types import ModuleType

import torch
from torch import Tensor

from vmoe.moe.kernels.operators import is_transformed

try:
    from vmoe.moe.kernels import fused
except ModuleNotFoundError as error:
    if error.name.split(".")[0] != "triton":
        raise
    fused = None


def fused_for(tensor: Tensor) -> ModuleType | None:
    """The package `kernels.fused`, where there is Triton and the tensor lies on an NVIDIA GPU it serves; else None.

    None too where torch.func transforms what is computed.
    """
    if fused is None or not tensor.is_cuda or not tensor.numel() or torch.version.hip is not None or is_transformed():
        return None
    return fused if torch.cuda.get_device_properties(tensor.device).major >= fused.MIN_CAPABILITY else None
