"""Experts: MLPs of one shape with stacked weights, and the choice of a backend that computes them.

T tokens of width D; H hidden width of an expert; E experts; K choices per token; R rows of the buffer that experts
compute.
"""

import warnings
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from vmoe.moe.attached import is_bare
from vmoe.moe.kernels import PLAIN, Kernels, kernels_for
from vmoe.moe.kernels.experts import composed, cpu, padded, requirements, segments
from vmoe.moe.kernels.interface import Choices, Mlp
from vmoe.moe.kernels.memory import shared_memory
from vmoe.moe.kernels.operators import is_traced, is_transformed
from vmoe.moe.mlps import Glu
from vmoe.moe.routing import Routing, SlotRouting


class ExpertLinear(nn.Module):
    """E linear layers in one module: `weight` (E, out, in) and `bias` (E, out) or None."""

    def __init__(
        self, num_experts: int, in_features: int, out_features: int, bias: bool, device=None, dtype=None
    ) -> None:
        super().__init__()
        placement = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, **placement))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features, **placement)) if bias else None
        _start(self)

    def forward(self, x: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Returns the weight and the bias. Hooks, parametrizations and adapters can change them in this call.

        Args:
            x: The rows that will be multiplied; some adapters expect an input.
        """
        return self.weight, self.bias

    def fill(self, weight: Tensor, bias: Tensor | None) -> None:
        """Gives every expert the same `weight` (out, in) and `bias` (out,)."""
        self.weight.copy_(weight.expand_as(self.weight))
        if self.bias is not None:
            assert bias is not None
            self.bias.copy_(bias.expand_as(self.bias))

    def extra_repr(self) -> str:
        num_experts, out_features, in_features = self.weight.shape
        return f"{num_experts} x {in_features} -> {out_features}, bias={self.bias is not None}"


class ExpertNorm(nn.Module):
    """E layer norms in one module: `weight` and `bias` (E, width), or None where the template has none."""

    def __init__(self, num_experts: int, template: nn.Module, device=None, dtype=None) -> None:
        super().__init__()
        if not isinstance(template, nn.LayerNorm):
            raise ValueError(f"norm_layer makes {type(template).__name__}: experts can have a LayerNorm, or None")
        self.eps = template.eps
        self.weight = self.bias = None
        if template.weight is not None:
            self.weight = nn.Parameter(torch.ones(num_experts, *template.normalized_shape, device=device, dtype=dtype))
        if template.bias is not None:
            self.bias = nn.Parameter(torch.zeros(num_experts, *template.normalized_shape, device=device, dtype=dtype))

    def fill(self, norm: nn.LayerNorm) -> None:
        """Gives every expert the weights of `norm`."""
        for own, dense in ((self.weight, norm.weight), (self.bias, norm.bias)):
            if own is not None:
                own.copy_(dense.expand_as(own))

    def forward(self, x_RH: Tensor | None = None, expert_R: Tensor | int | None = None) -> Any:
        """Normalises each row by its expert's norm. Without rows it returns the weight and the bias."""
        if x_RH is None:
            return self.weight, self.bias
        x_RH = F.layer_norm(x_RH, x_RH.shape[-1:], eps=self.eps)
        if self.weight is not None:
            x_RH = x_RH * self.weight.to(x_RH.dtype)[expert_R]
        return x_RH if self.bias is None else x_RH + self.bias.to(x_RH.dtype)[expert_R]


class ExpertSpec(NamedTuple):
    """The shape of every expert's MLP.

    Attributes:
        in_features: D.
        hidden_features: H.
        out_features: Width of the results.
        activation: Between the two layers. Before a `Glu` the first layer is twice as wide.
        norm_layer: Makes the LayerNorm after the activation, or None.
        bias: Whether the first and the second layer have biases.
        dropout: Dropout rate after the activation.
    """

    in_features: int
    hidden_features: int
    out_features: int
    activation: nn.Module
    norm_layer: Callable[[int], nn.Module] | None = None
    bias: tuple[bool, bool] = (True, True)
    dropout: float = 0.0

    @property
    def first_width(self) -> int:
        """Width of the first layer's results."""
        return self.hidden_features * (2 if isinstance(self.activation, Glu) else 1)


# A ParametrizationList holds the module's own (stacked) parameters; modules inside it may have others of any shape
_STACKED = (ExpertLinear, ExpertNorm, ParametrizationList)


class _KeptCast(NamedTuple):
    weight: Tensor
    state: tuple
    cast: Tensor


class Experts(nn.Module):
    """E two-layer MLPs; each runs on the tokens routed to it, and a token's results are summed by its combine weights.

    Args:
        num_experts: E.
        spec: The shape of each expert.
        backend: See `MoeConfig`.
        recompute_activation: Whether the backward pass computes the activations again; see `MoeConfig`.
        device: Where the parameters are created.
        dtype: Their type.
    """

    def __init__(
        self,
        num_experts: int,
        spec: ExpertSpec,
        backend: str = "auto",
        recompute_activation: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        placement = {"device": device, "dtype": dtype}
        self.fc1 = ExpertLinear(num_experts, spec.in_features, spec.first_width, spec.bias[0], **placement)
        self.act = spec.activation
        self.drop1 = nn.Dropout(spec.dropout)
        self.norm = None
        if spec.norm_layer is not None:
            self.norm = ExpertNorm(num_experts, spec.norm_layer(spec.hidden_features), **placement)
        self.fc2 = ExpertLinear(num_experts, spec.hidden_features, spec.out_features, spec.bias[1], **placement)
        self.backend, self.recompute_activation = backend, recompute_activation
        self._casts: dict[int, _KeptCast] | None = None
        self._memory = shared_memory()  # this reference keeps it alive as long as there are experts

    def stacked(self) -> list[ExpertLinear | ExpertNorm]:
        """The modules with a stacked part per expert. A learned activation is not among them: all experts share it."""
        return [self.fc1, *([] if self.norm is None else [self.norm]), self.fc2]

    def stacked_parameters(self) -> list[nn.Parameter]:
        """The parameters with the experts as first axis."""
        parts = [part for module in self.stacked() for part in module.modules() if isinstance(part, _STACKED)]
        return [parameter for part in parts for parameter in part.parameters(recurse=False)]

    def forward(self, x_TD: Tensor, routing: Routing | SlotRouting, kernels: Kernels | None = None) -> Tensor:
        """(T, D) -> (T, out), in autocast's type where autocast is on.

        Args:
            x_TD: The tokens.
            routing: Which experts take them.
            kernels: The layer's choice of kernels; None chooses here.
        """
        dtype = compute_dtype(x_TD)
        mlp = self._mlp(dtype, x_TD)
        if isinstance(routing, Routing):
            choices = Choices.of(routing)
            kernels = kernels_for(x_TD) if kernels is None else kernels
            return choose_backend(x_TD, choices, mlp, self.backend, kernels).expert_mlp(x_TD, choices, mlp)
        slots_RD = routing.dispatch(x_TD.to(dtype))
        return routing.combine(composed.two_layers(slots_RD, mlp, None, padded.padded_linear))

    def takes_one_image(self, x_TD: Tensor) -> bool:
        """Whether `of_one_image` computes at evaluation on a CPU what calling the module does."""
        are_plain = self.backend in ("auto", "cpu") and self.norm is None and not self.training
        are_bare = is_bare(self, Experts) and is_bare(self.act, nn.GELU)
        # autocast casts both factors of a product
        is_one_type = x_TD.dtype == self.fc1.weight.dtype or torch.is_autocast_enabled("cpu")
        return are_plain and are_bare and is_one_type and x_TD.shape[0] > 0

    def of_one_image(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """(T, D) -> (T, out), without gradient. All tokens are of one image, and `routing` is the decision for it."""
        (weight1, bias1), (weight2, bias2) = self.layers(x_TD)
        y_TO = None
        choices = zip(routing.chosen_GSK.view(-1).tolist(), routing.weights_GSK.view(-1).tolist(), strict=True)
        for expert, weight in choices:
            hidden_TH = F.linear(x_TD, weight1[expert], None if bias1 is None else bias1[expert])
            torch.ops.aten.gelu_(hidden_TH, approximate=self.act.approximate)
            bias_O = x_TD.new_zeros(()) if bias2 is None else bias2[expert]
            if y_TO is None:
                y_TO = torch.addmm(bias_O, hidden_TH, weight2[expert].t(), beta=weight, alpha=weight)
            else:
                y_TO.addmm_(hidden_TH, weight2[expert].t(), alpha=weight).add_(bias_O, alpha=weight)
        assert y_TO is not None
        return y_TO

    def layers(self, x_TD: Tensor | None = None) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        """Weight (E, out, in) and bias (E, out) or None of both layers, as hooks and adapters change them.

        Args:
            x_TD: The tokens, for adapters that expect an input.
        """
        first, second = (
            (layer.weight, layer.bias) if is_bare(layer, ExpertLinear) else layer(x_TD)
            for layer in (self.fc1, self.fc2)
        )
        return first, second

    def _mlp(self, dtype: torch.dtype, x_TD: Tensor | None = None) -> Mlp:
        (weight1, bias1), (weight2, bias2) = self.layers(x_TD)
        # the kernels take nothing else; parametrizations, for one, may make transposed weights
        weight1, weight2 = weight1.contiguous(), weight2.contiguous()
        bias1, bias2 = (None if bias is None else bias.contiguous() for bias in (bias1, bias2))
        dropout = self.drop1.p if self.training else 0.0
        cast = partial(self._cast, dtype=dtype)
        keeps_casts = self._casts is not None
        parts = (weight1, bias1, weight2, bias2, self.act, self.norm)
        return Mlp(*parts, dropout, dtype, cast, keeps_casts, self.recompute_activation)

    def _cast(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight in another type, without gradient. After `keep_casts` it is kept until the weight changes."""
        if self._casts is None or weight.dtype == dtype or is_traced():
            return weight.detach().to(dtype)
        # only a parameter outlives a pass, and a tensor made in inference mode has no version counter to check
        if not isinstance(weight, nn.Parameter) or weight.is_inference() or _is_capturing(weight):
            return weight.detach().to(dtype)
        state = (weight._version, weight.data_ptr(), dtype)
        kept = self._casts.get(id(weight))
        if kept is None or kept.weight is not weight or kept.state != state:
            with torch.inference_mode(False):  # so that training can use a cast that an evaluation kept
                cast = weight.detach().to(dtype)
            kept = self._casts[id(weight)] = _KeptCast(weight, state, cast)
        return kept.cast

    def keep_casts(self, keep: bool = True) -> None:
        """Keeps the weights' copies in autocast's type between forward passes, until an update changes the weights.

        With gradient accumulation this saves a pass over the weights in each micro-step after the first. It costs the
        copies' memory. Changes that autograd cannot see (through `.data`, in a CUDA graph) need another call of this.
        """
        self._casts = {} if keep else None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_casts": None if self._casts is None else {}}


class SharedExpert(nn.Module):
    """The experts that take every token, as one MLP. The hidden width in `spec` is the sum of theirs."""

    def __init__(self, spec: ExpertSpec, device=None, dtype=None) -> None:
        super().__init__()
        placement = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(spec.in_features, spec.first_width, spec.bias[0], **placement)
        self.act = spec.activation
        self.drop1 = nn.Dropout(spec.dropout)
        self.norm: nn.Module = nn.Identity()
        if spec.norm_layer is not None:
            self.norm = spec.norm_layer(spec.hidden_features).to(device, dtype)
        self.fc2 = nn.Linear(spec.hidden_features, spec.out_features, spec.bias[1], **placement)
        _start(self.fc1)
        _start(self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.drop1(self.act(self.fc1(x)))))


def choose_backend(
    x_TD: Tensor, choices: Choices, mlp: Mlp, name: str = "auto", kernels: Kernels = PLAIN
) -> ModuleType:
    """The backend of that name. If it cannot compute these experts, another one is chosen, with one warning.

    "auto" takes `fused` on a GPU and `cpu` on a CPU if they support the experts. Else it takes `padded` on a GPU with a
    capacity, and `segments` for all else. The meta device always gets `segments`, so that counts of FLOPs hold no rows
    that only a layout needs. Inside a transform of torch.func neither `fused` nor `cpu` is chosen.
    """
    if x_TD.is_meta:
        return segments
    if name != "auto" and x_TD.shape[0]:
        reason = _reason_against(name, x_TD, choices, mlp, kernels)
        if reason is None:
            named = {"fused": kernels.experts, "cpu": cpu, "padded": padded, "segments": segments}[name]
            assert named is not None
            return named
        _warn_once(f'backend="{name}": {reason}; another backend is used')
    if x_TD.is_cpu and cpu.takes(mlp) and not is_transformed():
        return cpu
    if not x_TD.is_cuda or x_TD.shape[0] == 0:
        return segments
    if kernels.experts is not None and requirements.missing_feature(mlp) is None:
        misfit = requirements.unsupported_width(mlp)
        if misfit is None:
            return kernels.experts
        _warn_once(f"experts with {misfit}: the fused kernels do not support that width, so slower ones are used")
    return segments if choices.capacity is None else padded


def _reason_against(name: str, x_TD: Tensor, choices: Choices, mlp: Mlp, kernels: Kernels) -> str | None:
    """The reason why a backend cannot compute these experts, or None."""
    if name in ("fused", "cpu") and is_transformed():
        return "torch.func cannot transform it"
    if name == "fused":
        if kernels.experts is None:
            return "it needs an NVIDIA GPU and Triton"
        lacking = requirements.missing_feature(mlp) or requirements.unsupported_width(mlp)
        return lacking and f"it does not take {lacking}"
    if name == "cpu":
        return None if x_TD.is_cpu and cpu.takes(mlp) else "it computes two layers with GELU between them, on a CPU"
    return "it needs a capacity" if name == "padded" and choices.capacity is None else None


@torch.compiler.assume_constant_result  # so that compiled code warns too, once
def _warn_once(message: str) -> None:
    _warn(message)


@cache
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _start(linear: ExpertLinear | nn.Linear) -> None:
    """Initialises as timm's transformers do: truncated normal weights (standard deviation 0.02) and zero biases."""
    nn.init.trunc_normal_(linear.weight, std=0.02)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The compute type of experts: autocast's where autocast is on, else that of `x`."""
    device_type = x.device.type
    if device_type != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype
