"""Kernels of the layer's passes, and the choice between them. `README.md` in this folder has the map of the passes.

`routing/` has Triton's kernels for scores, gates, priority and balance losses; `vmoe.moe` has the same formulas in
PyTorch. `experts/` has the backends that compute the experts' MLPs. Both use the sort in `counting`. `sizes` has the
integers and needs no Triton.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from vmoe.moe.kernels.operators import is_transformed
from vmoe.moe.kernels.sizes import MIN_CAPABILITY


class Kernels(NamedTuple):
    """Triton's kernels for one forward pass. `kernels_for` chooses them once; the layer passes them on.

    Attributes:
        routing: The package `kernels.routing`; None to use PyTorch's own operators.
        experts: The backend `kernels.experts.fused`; None to use another backend.
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
    """`TRITON` if Triton is installed and the tensor lies on an NVIDIA GPU that it supports; else `PLAIN`.

    Inside a transform of torch.func it is always `PLAIN`, since the kernels' operators cannot be transformed.
    """
    if not tensor.is_cuda or not tensor.numel() or torch.version.hip is not None or is_transformed():
        return PLAIN
    return TRITON if torch.cuda.get_device_properties(tensor.device).major >= MIN_CAPABILITY else PLAIN
