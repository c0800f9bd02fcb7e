"""The optimiser with its parameter groups."""

from typing import Any

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vmoe.moe import moe_layers
from vmoe.moe.experts import ExpertLinear
from vmoe.training.config import OptimConfig
from vmoe.training.optim.muon import Muon
from vmoe.training.optim.timm_optimizers import timm_optimizer

# Modules of timm's models that turn pixels into the first tokens. torch's documentation leaves them to AdamW.
_EMBEDDINGS = ("patch_embed", "embeds")


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser of all parameters that learn. Biases, norms and `model.no_weight_decay()` have no weight decay.

    A fused optimiser and our Muon have a flag on the device that blocks an update (see `vmoe.training.guard`).

    Raises:
        UserError: timm has no such optimiser, or cannot make it with these arguments.
    """
    groups = optimizer_groups(model, config)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    if config.is_of_timm:
        return timm_optimizer(groups, config)
    return Muon(groups, config.betas)


def optimizer_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """The `parameter_groups` of a model that may be sharded.

    Matrices that are sharded by rows go to AdamW. Stacks that are sharded between matrices stay with Muon.
    """
    groups = []
    for group in parameter_groups(model, config):
        rows = [p for p in group["params"] if group["method"] == "muon" and not _holds_whole_matrices(p)]
        whole = [p for p in group["params"] if all(p is not other for other in rows)]
        rate = group["lr"] / config.lr * (config.adamw_lr or config.lr)
        groups += [{**group, "params": whole}] if whole else []
        groups += [{**group, "params": rows, "method": "adamw", "lr": rate}] if rows else []
    return by_mesh(groups)


def _holds_whole_matrices(parameter: Tensor) -> bool:
    if not isinstance(parameter, DTensor):
        return True
    return parameter.dim() == 3 and all(place.is_shard(0) or place.is_replicate() for place in parameter.placements)


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """The parameters, grouped by the method, learning rate and weight decay that `config` gives them."""
    names = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    if config.layer_decay is None:
        given = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=names)
    else:
        given = param_groups_layer_decay(
            model, config.weight_decay, no_weight_decay_list=names, layer_decay=config.layer_decay
        )
    matrices = set(hidden_matrices(model)) if config.name == "muon" else set()
    experts = {parameter for _, layer in moe_layers(model) for parameter in layer.experts.parameters()}
    groups: dict[tuple[str, float, float], list[Tensor]] = {}
    for group in given:
        for parameter in group["params"]:
            method = "muon" if parameter in matrices else "adamw"
            rate = config.adamw_lr if method == "adamw" and config.adamw_lr else config.lr
            decay = group["weight_decay"]
            if decay and parameter in experts and config.expert_weight_decay is not None:
                decay = config.expert_weight_decay
            groups.setdefault((method, rate * group.get("lr_scale", 1.0), decay), []).append(parameter)
    return [
        {"params": parameters, "method": method, "lr": rate, "weight_decay": decay}
        for (method, rate, decay), parameters in groups.items()
    ]


def by_mesh(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups, each split by the mesh of its parameters, since a fused kernel takes parameters of one mesh."""
    result = []
    for group in groups:
        parts: dict[Any, list[Tensor]] = {}
        for parameter in group["params"]:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            parts.setdefault(mesh, []).append(parameter)
        result += [{**group, "params": parameters} for parameters in parts.values()]
    return result


def by_name(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """An optimiser's state dict with parameter names in place of numbers. `names` has the optimiser's order."""
    if not all(isinstance(key, int) for key in state["state"]):
        return state
    groups = [{**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[number]: value for number, value in state["state"].items()}, "param_groups": groups}


def by_number(state: dict[str, Any], names: list[str], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The inverse of `by_name`, for an optimiser with `groups`, which may differ from those of `state`."""
    if all(isinstance(key, int) for key in state["state"]):
        return state
    group_of = {name: group for group in state["param_groups"] for name in group["params"]}
    numbered, first = [], 0
    for group in groups:
        numbers = list(range(first, first + len(group["params"])))
        numbered.append({**group_of[names[first]], "params": numbers})
        first += len(numbers)
    states = {number: state["state"][name] for number, name in enumerate(names) if name in state["state"]}
    return {"state": states, "param_groups": numbered}


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """The parameters of a timm model for Muon: the weights of its linear layers and of its experts.

    Routers, classifiers and the patch embedding (the first layer) are left out.
    """
    heads = model.get_classifier()
    others = [layer.router for _, layer in moe_layers(model)]
    others += [getattr(model, name) for name in _EMBEDDINGS if hasattr(model, name)]
    others += heads if isinstance(heads, tuple) else [heads]
    excluded = {part for module in others for part in module.modules()}
    linears = [module for module in model.modules() if isinstance(module, nn.Linear | ExpertLinear)]
    return [module.weight for module in linears if module not in excluded and module.weight.requires_grad]
