"""The activations, types and shapes that the backend `fused` supports. The planner reads them without Triton."""

from typing import NamedTuple

import torch
from torch import nn

from vmoe.moe.attached import is_bare
from vmoe.moe.kernels.interface import Mlp
from vmoe.moe.mlps import Glu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Form(NamedTuple):
    """The function between the two layers.

    Attributes:
        function: "gelu", "gelu_tanh" or "silu".
        gate: The half of the input that goes through the function and multiplies the other: "first" or "last"; ""
            without a gate.
    """

    function: str
    gate: str

    @classmethod
    def of(cls, activation: nn.Module) -> "Form | None":
        """The form of a module, or None if the kernels do not support it."""
        if is_bare(activation, Glu):
            form = cls.of(activation.act)
            return form and form._replace(gate="first" if activation.gate_first else "last")
        if is_bare(activation, nn.GELU):
            return cls("gelu_tanh" if activation.approximate == "tanh" else "gelu", "")
        return cls("silu", "") if is_bare(activation, nn.SiLU) else None


def missing_feature(mlp: Mlp) -> str | None:
    """The feature of the experts that the kernels do not support, or None."""
    if Form.of(mlp.activation) is None:
        return f"activation {type(getattr(mlp.activation, 'act', mlp.activation)).__name__}"
    if mlp.norm is not None:
        return "a norm"
    if mlp.dropout > 0:
        return "dropout"
    return None if mlp.dtype in DTYPES else f"type {mlp.dtype}"


def unsupported_width(mlp: Mlp) -> str | None:
    """The width that the kernels do not support, or None."""
    width_O, width_H = mlp.weight2.shape[1:]
    multiple = 16 // mlp.dtype.itemsize
    widths = {"in_features": mlp.weight1.shape[2], "hidden_features": width_H, "out_features": width_O}
    for name, width in widths.items():
        if width % multiple:
            return f"{name}={width} is no multiple of {multiple}"
    return None
