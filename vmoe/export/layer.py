"""Copies of models with exportable MoE layers, in which each expert is a separate module."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vmoe.moe import MoeMlp, moe_layers
from vmoe.moe.attached import copy_with_attached
from vmoe.moe.experts import Experts
from vmoe.moe.exportable import ExportableForm, why_layer_not_exportable
from vmoe.moe.routing import Routing

MakeLinear = Callable[[Tensor, Tensor | None], nn.Module]


def exportable_copy(
    model: nn.Module, make_linear: MakeLinear | None = None, layer_type: "type[ExportedMoe] | None" = None
) -> nn.Module:
    """A copy of a model with exportable MoE layers, on the CPU, in float32 and evaluation mode.

    Args:
        model: Any timm model, sparse or dense. It is not changed.
        make_linear: Makes an expert's layer from its weight (out, in) and bias (out,) or None; by default a
            `torch.nn.Linear`.
        layer_type: The class of exportable MoE layers.

    Raises:
        ValueError: A layer's routing cannot be exported, or the form would ignore a hook on it.
    """
    for name, layer in moe_layers(model):
        reason = why_layer_not_exportable(layer)
        if reason is not None:
            raise ValueError(f"{name}: {reason}")
    copied = copy_with_attached(model).cpu().float().eval()
    for name, layer in moe_layers(copied):
        exported = (layer_type or ExportedMoe)(layer, make_linear or plain_linear)
        for key, hook in layer._forward_pre_hooks.items():  # hooks that pass on token masks of padded images
            exported.register_forward_pre_hook(hook, with_kwargs=key in layer._forward_pre_hooks_with_kwargs)
        for key, hook in layer._forward_hooks.items():
            exported.register_forward_hook(
                hook,
                with_kwargs=key in layer._forward_hooks_with_kwargs,
                always_call=key in layer._forward_hooks_always_called,
            )
        copied.set_submodule(name, exported)
    return copied.requires_grad_(False)


def plain_linear(weight_OD: Tensor, bias_O: Tensor | None) -> nn.Linear:
    """A linear layer that holds copies of a weight and a bias."""
    linear = nn.Linear(weight_OD.shape[1], weight_OD.shape[0], bias=bias_O is not None)
    linear.load_state_dict({"weight": weight_OD} if bias_O is None else {"weight": weight_OD, "bias": bias_O})
    return linear


class ExportedMoe(ExportableForm, nn.Module):
    """A `MoeMlp` in its exportable form.

    Args:
        layer: The layer. Its router and shared experts are reused.
        make_linear: See `exportable_copy`.
    """

    def __init__(self, layer: MoeMlp, make_linear: MakeLinear) -> None:
        super().__init__()
        self.config, self.use_conv, self.out_features = layer.config, layer.use_conv, layer.out_features
        self.router, self.shared, self.images = layer.router, layer.shared, layer.images
        layers, norm = layer.experts.layers(), layer.experts.norm
        norm_parts = None if norm is None else norm()
        self.experts = nn.ModuleList(
            _Expert(layer.experts, layers, norm_parts, expert, make_linear) for expert in range(layer.num_experts)
        )

    def one_expert(self, index: int, x_RD: Tensor) -> Tensor:
        return self.experts[index](x_RD)


class DenseExportedMoe(ExportedMoe):
    """The same, with each expert computed for all tokens, for compilers that need fixed shapes.

    It costs E / K times the experts' FLOPs. Results of experts that a token did not choose get the weight 0.
    """

    def _by_choices(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """The weighted sum of each token's results from the chosen experts in which it has a slot, (T, O)."""
        expert_E = torch.arange(self.config.num_experts, device=x_TD.device)
        is_chosen_GSKE = (routing.chosen_GSK[..., None] == expert_E).to(routing.weights_GSK.dtype)  # without a scatter
        weights_GSE = (is_chosen_GSKE * routing.combine_weights_GSK()[..., None]).sum(2)
        return self._by_experts(x_TD, weights_GSE.flatten(0, 1), torch.ones_like(weights_GSE.flatten(0, 1)))

    def _by_experts(self, x_TD: Tensor, weights_TE: Tensor, is_taken_TE: Tensor) -> Tensor:
        """The weighted sum of each token's results from the experts that take it, (T, O)."""
        weights_TE = weights_TE * is_taken_TE.to(weights_TE.dtype)
        y_TO = x_TD.new_zeros(x_TD.shape[0], self.out_features)
        for index in range(self.config.num_experts):
            y_RO = self.one_expert(index, x_TD)
            y_TO = y_TO + y_RO * weights_TE[:, index : index + 1].to(y_RO.dtype)
        return y_TO


def dense_cost(model: nn.Module) -> float:
    """The FLOPs of all experts relative to those of the chosen ones, E / K; 1 for a model without experts.

    With expert choice, K is the number of slots per token. Soft MoE computes its slots in either form.
    """
    layers = [layer.config for _, layer in moe_layers(model) if layer.config.router != "soft"]
    chosen = sum(config.experts_per_token for config in layers)
    return sum(config.num_experts for config in layers) / chosen if layers else 1.0


class _Expert(nn.Module):
    """One expert as a separate MLP: (R, D) -> (R, O). The number of rows depends on the data."""

    def __init__(
        self, experts: Experts, layers: tuple, norm: tuple | None, index: int, make_linear: MakeLinear
    ) -> None:
        super().__init__()
        self.fc1, self.fc2 = (
            make_linear(weight.detach()[index], None if bias is None else bias.detach()[index])
            for weight, bias in layers
        )
        self.act = experts.act
        self.norm: nn.Module = nn.Identity()
        if experts.norm is not None and norm is not None:
            self.norm = own = nn.LayerNorm(layers[1][0].shape[-1], experts.norm.eps)
            for parameter, stacked in zip((own.weight, own.bias), norm, strict=True):
                parameter.data.copy_(stacked.detach()[index]) if stacked is not None else None

    def forward(self, x_RD: Tensor) -> Tensor:
        return self.fc2(self.norm(self.act(self.fc1(x_RD))))
