"""What one asks of all the MoE layers of a model at once."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from vmoe.moe.kernels.operators import is_transformed
from vmoe.moe.layer import MoeMlp
from vmoe.moe.routers import SigmoidRouter


def moe_layers(model: nn.Module) -> list[tuple[str, MoeMlp]]:
    """The MoE layers of `model` with their names, in forward order; a compiled model's names are the original's."""
    model = getattr(model, "_orig_mod", model)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, MoeMlp)]


def auxiliary_loss(model: nn.Module) -> Tensor:
    """The weighted auxiliary losses of the last forward pass, summed over the MoE layers: add it to the task's loss.

    Layers behind those that the pass ran do not count, as where timm's `forward_intermediates` stops early. That is
    known of layers that `vmoe.sparsify` made; those of a model made otherwise count with the last pass that ran them. A
    layer before those that the pass ran may count too, with an older loss.

    Returns:
        A scalar through which gradients flow; zero for a dense model.

    Raises:
        RuntimeError: There was no forward pass, or `nn.DataParallel` ran it in copies of the model, or its graph is
            gone (reentrant activation checkpointing).
    """
    total, layers = None, moe_layers(model)
    for name, layer in layers:
        loss = layer.last_auxiliary_loss
        if loss is None or not layer.mark.ran or _has_escaped(loss):
            continue
        if torch.is_grad_enabled() and layer.expects_gradient() and not loss.requires_grad:
            raise RuntimeError(
                f"{name}: the auxiliary loss has lost its graph, as under reentrant activation checkpointing; "
                "use MoeConfig(inject_auxiliary_loss=True), which needs no auxiliary_loss()"
            )
        total = loss if total is None else total + loss.to(total.device)
    if layers and total is None:
        raise RuntimeError(
            f"{layers[0][0]}: no auxiliary loss yet; call the model first (nn.DataParallel runs copies of it, which "
            "keep their losses: use DistributedDataParallel; after torch.func, call this inside of the transform)"
        )
    if total is None:
        parameter = next(model.parameters(), None)
        return torch.zeros((), device=None if parameter is None else parameter.device)
    return total


def _has_escaped(loss: Tensor) -> bool:
    """Whether a transform of torch.func left it behind: it has no value outside."""
    if torch.compiler.is_compiling() or is_transformed():
        return False
    return torch._C._functorch.is_functorch_wrapped_tensor(loss)


def set_auxiliary_scale(model: nn.Module, scale: float | Tensor) -> None:
    """Scales the gradients that `inject_auxiliary_loss` adds, as the training loop scales its loss.

    Args:
        model: A model with MoE layers.
        scale: The loss scale, divided by the steps of a gradient accumulation. A tensor is kept by reference, so that a
            GradScaler's own (`scaler._scale`) stays up to date.
    """
    for _, layer in moe_layers(model):
        device = next(layer.parameters()).device
        layer.auxiliary_scale = torch.as_tensor(scale, dtype=torch.float32, device=device)


def set_eval_capacity_factor(model: nn.Module, factor: float | None) -> None:
    """Sets the capacity factor that all MoE layers of `model` use at evaluation; None drops nothing.

    Raises:
        ValueError: The factor is not positive, or the layers' slots are part of their parameters (Soft MoE).
    """
    for _, layer in moe_layers(model):
        layer.config = dataclasses.replace(layer.config, eval_capacity_factor=factor)


def set_top_k(model: nn.Module, top_k: int) -> None:
    """Sets K, the experts a token is sent to, in all MoE layers of `model`.

    Raises:
        ValueError: K is below 1 or above the number of experts, or tokens do not choose (expert choice, Soft MoE).
    """
    layers = [layer for _, layer in moe_layers(model)]
    for layer in layers:
        if layer.config.fills_slots:
            raise ValueError(f'top_k={top_k}: has no meaning with router="{layer.config.router}"')
    for layer, config in [(layer, dataclasses.replace(layer.config, top_k=top_k)) for layer in layers]:
        router: Any = layer.router  # all routers by which tokens choose have it
        layer.config, router.top_k = config, top_k


def update_router_biases(model: nn.Module) -> None:
    """Moves the biases of sigmoid routers towards a fair load; call it after each update of the weights.

    A model without sigmoid routers is left as it is.
    """
    for _, layer in moe_layers(model):
        if isinstance(layer.router, SigmoidRouter):
            layer.router.update_bias()
