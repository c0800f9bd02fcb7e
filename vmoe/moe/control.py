"""Functions that read or change all MoE layers of a model at once."""

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
    """The weighted auxiliary losses of the last forward pass, summed over the MoE layers. Add it to the task's loss.

    A pass may stop early, as timm's `forward_intermediates` does. In a model that `vmoe.sparsify` made, the layers
    after that point do not count. In any other model they count with their loss from an earlier pass. A pass may also
    start late. Layers before its start may count with an older loss.

    Returns:
        A scalar through which gradients flow; zero for a dense model.

    Raises:
        RuntimeError: There was no forward pass, `nn.DataParallel` ran it in copies of the model, or its graph is lost
            (reentrant activation checkpointing).
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
    """Whether the loss comes from a transform of torch.func that has ended: then it has no value."""
    if torch.compiler.is_compiling() or is_transformed():
        return False
    return torch._C._functorch.is_functorch_wrapped_tensor(loss)


def set_auxiliary_scale(model: nn.Module, scale: float | Tensor) -> None:
    """Scales the gradients that `inject_auxiliary_loss` adds, as the training loop scales its loss.

    Args:
        model: A model with MoE layers.
        scale: The loss scale, divided by the number of accumulation steps. A tensor is kept by reference, so
            `scaler._scale` of a GradScaler stays up to date.
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
    """Sets K, the number of experts per token, in all MoE layers of `model`.

    Raises:
        ValueError: K is below 1 or above the number of experts, or the router has no K (expert choice, Soft MoE).
    """
    layers = [layer for _, layer in moe_layers(model)]
    for layer in layers:
        if layer.config.fills_slots:
            raise ValueError(f'top_k={top_k}: has no meaning with router="{layer.config.router}"')
    for layer, config in [(layer, dataclasses.replace(layer.config, top_k=top_k)) for layer in layers]:
        router: Any = layer.router  # every router of the token-choice kind has `top_k`
        layer.config, router.top_k = config, top_k


def update_router_biases(model: nn.Module) -> None:
    """Moves the biases of sigmoid routers towards a fair load. Call it after each update of the weights.

    It does nothing in a model without sigmoid routers.
    """
    for _, layer in moe_layers(model):
        if isinstance(layer.router, SigmoidRouter):
            layer.router.update_bias()
