"""The MLPs of transformers as experts see them: one shape for timm's `Mlp`, `GluMlp`, `SwiGLU` and their like.

D width of a token, H hidden width (of what the second layer takes), O width of the result.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Glu(nn.Module):
    """The gated activation of GLU experts: (R, 2H) -> (R, H), one half times the activation of the other.

    Args:
        act: The gate's activation.
        gate_first: Whether the gate is the first half (SwiGLU, Shazeer 2020, https://arxiv.org/abs/2002.05202).
    """

    def __init__(self, act: nn.Module, gate_first: bool) -> None:
        super().__init__()
        self.act = act
        self.gate_first = gate_first

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return self.act(first) * second if self.gate_first else first * self.act(second)


class MlpParts(NamedTuple):
    """A dense MLP taken apart: norm(act(x @ fc1.T + bias1)) @ fc2.T + bias2.

    Attributes:
        fc1: (H or 2H, D); 2H with a gated activation.
        bias1: (H or 2H,) or None.
        fc2: (O, H).
        bias2: (O,) or None.
        activation: The MLP's own; `Glu` where it is gated.
        norm: The norm of the hidden layer, or None.
        drop: Dropout rates of the hidden layer and the output.
        use_conv: Whether tokens come channels first.
    """

    fc1: Tensor
    bias1: Tensor | None
    fc2: Tensor
    bias2: Tensor | None
    activation: nn.Module
    norm: nn.LayerNorm | None
    drop: tuple[float, float]
    use_conv: bool

    def copy_activation(self) -> nn.Module:
        """A new activation of the same kind."""
        return copy.deepcopy(self.activation)

    def make_norm(self, width: int) -> nn.LayerNorm:
        """A new norm of the same kind."""
        return type(self.norm)(width, eps=self.norm.eps, elementwise_affine=self.norm.elementwise_affine)


def take_apart(mlp: nn.Module) -> MlpParts:
    """Reads an MLP with timm's names for its parts.

    Raises:
        ValueError: Its layers are no 1x1 convolutions, or it has a part that experts do not have.
    """
    name = type(mlp).__name__
    norm = getattr(mlp, "norm", None)
    if norm is not None and not isinstance(norm, nn.Identity | nn.LayerNorm):
        raise ValueError(f"{name}: experts can have a LayerNorm between their layers, not {type(norm).__name__}")
    activation = mlp.act
    if hasattr(mlp, "fc1_g"):
        firsts, activation = [mlp.fc1_g, mlp.fc1_x], Glu(activation, gate_first=True)
    elif hasattr(mlp, "gate_last"):
        firsts, activation = [mlp.fc1], Glu(activation, gate_first=not mlp.gate_last)
    else:
        firsts = [mlp.fc1]
    for layer in (*firsts, mlp.fc2):
        if layer.weight[0, 0].numel() != 1:
            raise ValueError(f"{name}: its convolutions see {tuple(layer.kernel_size)} pixels, so they mix tokens")
    biases = [layer.bias for layer in firsts]
    return MlpParts(
        fc1=torch.cat([layer.weight.detach().flatten(1) for layer in firsts]),
        bias1=None if biases[0] is None else torch.cat([bias.detach() for bias in biases]),
        fc2=mlp.fc2.weight.detach().flatten(1),
        bias2=None if mlp.fc2.bias is None else mlp.fc2.bias.detach(),
        activation=activation,
        norm=norm if isinstance(norm, nn.LayerNorm) else None,
        drop=tuple(_rate(mlp, drop) for drop in ("drop1", "drop2")),
        use_conv=isinstance(mlp.fc2, nn.Conv2d),
    )


def _rate(mlp: nn.Module, drop: str) -> float:
    """The rate of one of the MLP's dropouts; some MLPs have one for both, some none."""
    dropout = getattr(mlp, drop, getattr(mlp, "drop", None))
    return getattr(dropout, "p", 0.0)
