"""Kernels of the layer's passes, and which of them serve. `README.md` beside this file has the map of the passes.

`routing/` has Triton's kernels for scores, gates, priority and balance losses, beside which the formulas in `vmoe.moe`
stand. `experts/` has the backends that compute the experts' MLPs. `counting` is the sort that both of them use; `sizes`
has the integers, and needs no Triton.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from vmoe.moe.kernels.operators import is_transformed
from vmoe.moe.kernels.sizes import MIN_CAPABILITY


class Kernels(NamedTuple):
    """Triton's kernels for one forward pass: chosen once, by `kernels_for`, and then handed on.

    Attributes:
        routing: The package `kernels.routing`; None where PyTorch's own operators serve.
        experts: The backend `kernels.experts.fused`; None where another one serves.
    """

    routing: ModuleType | None
    experts: ModuleType | None


PLAIN = Kernels(None, None)

try:
    from vmoe.moe.kernels import routing
    from vmoe.moe.kernels.experts import fused
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] != "triton":
        raise
    TRITON = PLAIN
else:
    TRITON = Kernels(routing, fused)


def kernels_for(tensor: Tensor) -> Kernels:
    """`TRITON` where there is Triton and the tensor lies on an NVIDIA GPU that it serves; else `PLAIN`.

    `PLAIN` too where torch.func transforms what is computed.
    """
    if not tensor.is_cuda or not tensor.numel() or torch.version.hip is not None or is_transformed():
        return PLAIN
    return TRITON if torch.cuda.get_device_properties(tensor.device).major >= MIN_CAPABILITY else PLAIN
