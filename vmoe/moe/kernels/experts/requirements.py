"""What the backend `fused` computes and which shapes it takes. Needs no Triton, so that the planner knows it too."""

from typing import NamedTuple

import torch
from torch import nn

from vmoe.moe.attached import is_bare
from vmoe.moe.kernels.interface import Mlp
from vmoe.moe.mlps import Glu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Form(NamedTuple):
    """What is computed between the two layers.

    Attributes:
        function: "gelu", "gelu_tanh" or "silu".
        gate: Which half of its input goes through the function and multiplies the other: "first" or "last"; "" where
            all of it goes through the function.
    """

    function: str
    gate: str

    @classmethod
    def of(cls, activation: nn.Module) -> "Form | None":
        """The form of a module; None where the kernels do not compute it."""
        if is_bare(activation, Glu):
            form = cls.of(activation.act)
            return form and form._replace(gate="first" if activation.gate_first else "last")
        if is_bare(activation, nn.GELU):
            return cls("gelu_tanh" if activation.approximate == "tanh" else "gelu", "")
        return cls("silu", "") if is_bare(activation, nn.SiLU) else None


def what_it_lacks(mlp: Mlp) -> str | None:
    """Which feature of the experts the kernels do not have; None when they have all."""
    if Form.of(mlp.activation) is None:
        return f"activation {type(getattr(mlp.activation, 'act', mlp.activation)).__name__}"
    if mlp.norm is not None:
        return "a norm"
    if mlp.dropout > 0:
        return "dropout"
    return None if mlp.dtype in DTYPES else f"type {mlp.dtype}"


def what_does_not_fit(mlp: Mlp) -> str | None:
    """Which width the kernels cannot take; None when they can."""
    width_O, width_H = mlp.weight2.shape[1:]
    multiple = 16 // mlp.dtype.itemsize
    widths = {"in_features": mlp.weight1.shape[2], "hidden_features": width_H, "out_features": width_O}
    for name, width in widths.items():
        if width % multiple:
            return f"{name}={width} is no multiple of {multiple}"
    return None
