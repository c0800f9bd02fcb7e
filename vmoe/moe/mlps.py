"""One form for the MLPs of transformers: timm's `Mlp`, `GluMlp`, `SwiGLU` and similar classes.

D width of a token, H hidden width (the second layer's input), O width of the result.
"""

import copy
from operator import attrgetter
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


class PartNames(NamedTuple):
    """The names that a class of MLPs gives its parts.

    Attributes:
        first: The first layer; two names where gate and value are separate layers.
        last: The second layer.
        act: The activation.
        norm: The norm after the activation, if the class can have one.
        leading_norm: The norm of the tokens before the first layer, if the class can have one.
        drops: The dropouts of the hidden layer and of the output.
        is_gated: Whether the activation of one half multiplies the other.
    """

    first: tuple[str, ...] = ("fc1",)
    last: str = "fc2"
    act: str = "act"
    norm: str | None = "norm"
    leading_norm: str | None = None
    drops: tuple[str | None, str | None] = ("drop1", "drop2")
    is_gated: bool = False


_CONV_MLP = PartNames(norm=None, drops=("drop", None))
# Keys are timm's file and class. Such an MLP works on single tokens, unless it has parts that are not named here.
PART_NAMES = {
    "mlp.Mlp": PartNames(),
    "mlp.GluMlp": PartNames(is_gated=True),
    "mlp.SwiGLU": PartNames(first=("fc1_g", "fc1_x"), is_gated=True),
    "mlp.GatedMlp": PartNames(),
    "mlp.ConvMlp": _CONV_MLP,
    "inception_next.ConvMlp": _CONV_MLP,
    "vitamin.GeGluMlp": PartNames(first=("w0", "w1"), last="w2", norm=None, leading_norm="norm", is_gated=True),
    "tiny_vit.NormMlp": PartNames(norm=None, leading_norm="norm"),
    "swiftformer.Mlp": PartNames(norm=None, leading_norm="norm1", drops=("drop", "drop")),
    "visformer.SpatialMlp": PartNames(("conv1",), "conv3", "act1", norm=None, drops=("drop1", "drop3")),
    "gemma4_vit.Gemma4GatedMlp": PartNames(
        first=("gate_proj.linear", "up_proj.linear"),
        last="down_proj.linear",
        norm=None,
        drops=(None, "drop"),
        is_gated=True,
    ),
}


class MlpParts(NamedTuple):
    """The parts of a dense MLP: norm(act(x @ fc1.T + bias1)) @ fc2.T + bias2.

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
        return nn.LayerNorm(width, self.norm.eps, self.norm.elementwise_affine, bias=self.norm.bias is not None)


def class_key(module: nn.Module) -> str:
    """The name of a module's class in `PART_NAMES`: its file and class."""
    return f"{type(module).__module__.rpartition('.')[2]}.{type(module).__name__}"


def take_apart(mlp: nn.Module) -> MlpParts:
    """Reads an MLP of a class in `PART_NAMES`, or of another with timm's names for its parts.

    Raises:
        ValueError: Its convolutions are larger than 1x1, or it has a part that experts do not have.
    """
    names = _names_of(mlp)
    _check_parts(mlp, names)
    firsts, last = [_part(mlp, name) for name in names.first], _part(mlp, names.last)
    norm = _part(mlp, names.norm)
    biases = [layer.bias for layer in firsts]
    return MlpParts(
        fc1=torch.cat([layer.weight.detach().flatten(1) for layer in firsts]),
        bias1=None if biases[0] is None else torch.cat([bias.detach() for bias in biases]),
        fc2=last.weight.detach().flatten(1),
        bias2=None if last.bias is None else last.bias.detach(),
        activation=_activation(mlp, names),
        norm=norm if isinstance(norm, nn.LayerNorm) else None,
        drop=tuple(getattr(_part(mlp, name), "p", 0.0) for name in names.drops),
        use_conv=isinstance(last, nn.Conv2d),
    )


@torch.no_grad()
def put_together(mlp: nn.Module, parts: MlpParts) -> None:
    """Writes parts into an MLP of the class they came from. It is the inverse of `take_apart`."""
    names = _names_of(mlp)
    firsts, last = [_part(mlp, name) for name in names.first], _part(mlp, names.last)
    rows = [layer.weight.shape[0] for layer in firsts]
    for layer, weight in zip(firsts, parts.fc1.split(rows), strict=True):
        layer.weight.copy_(weight.view_as(layer.weight))
    last.weight.copy_(parts.fc2.view_as(last.weight))
    if parts.bias1 is not None:
        for layer, bias in zip(firsts, parts.bias1.split(rows), strict=True):
            layer.bias.copy_(bias)
    if parts.bias2 is not None:
        last.bias.copy_(parts.bias2)
    if parts.norm is not None:
        _part(mlp, names.norm).load_state_dict(parts.norm.state_dict())
    activation = parts.activation.act if names.is_gated else parts.activation
    _part(mlp, names.act).load_state_dict(activation.state_dict())


def split_leading_norm(mlp: nn.Module) -> tuple[str | None, nn.Module]:
    """Splits the leading norm off an MLP: router and experts must see the same tokens, so the norm goes before both.

    Returns:
        The norm's name in `mlp` or None, and the MLP without it. The latter shares all other parts with `mlp`.
    """
    name = _names_of(mlp).leading_norm
    if name is None or isinstance(_part(mlp, name), nn.Identity):
        return None, mlp
    body = copy.copy(mlp)
    body._modules = {**mlp._modules, name: nn.Identity()}
    return name, body


def _names_of(mlp: nn.Module) -> PartNames:
    known = PART_NAMES.get(class_key(mlp))
    if known is None:
        known = PART_NAMES["mlp.SwiGLU" if hasattr(mlp, "fc1_g") else "mlp.GluMlp" if _is_glu(mlp) else "mlp.Mlp"]
    return known


def _is_glu(mlp: nn.Module) -> bool:
    return hasattr(mlp, "gate_last")


def _check_parts(mlp: nn.Module, names: PartNames) -> None:
    name = type(mlp).__name__
    norm = _part(mlp, names.norm)
    if not isinstance(norm, nn.Identity | nn.LayerNorm | None):
        raise ValueError(f"{name}: experts can have a LayerNorm between their layers, not {type(norm).__name__}")
    named = {part.partition(".")[0] for part in (*names.first, names.last, names.act, names.norm, *names.drops) if part}
    for part, module in mlp.named_children():
        if part not in named and not isinstance(module, nn.Identity):
            raise ValueError(f"{name}: experts have no {part} ({type(module).__name__})")
    if next(mlp.buffers(), None) is not None:
        raise ValueError(f"{name}: experts have no {next(mlp.named_buffers())[0]}")
    for layer in (_part(mlp, part) for part in (*names.first, names.last)):
        if layer.weight[0, 0].numel() != 1:
            raise ValueError(f"{name}: its convolutions see {tuple(layer.kernel_size)} pixels, so they mix tokens")


def _activation(mlp: nn.Module, names: PartNames) -> nn.Module:
    activation = _part(mlp, names.act)
    return Glu(activation, gate_first=not getattr(mlp, "gate_last", False)) if names.is_gated else activation


def _part(mlp: nn.Module, name: str | None) -> nn.Module | Tensor | None:
    try:
        return None if name is None else attrgetter(name)(mlp)
    except AttributeError:
        return None
