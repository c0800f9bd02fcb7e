"""Low-rank adapters (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685) of attention, MLPs and experts.

An adapter is a parametrization of a weight. So every backend, torch.compile and CUDA graphs work with it, and merging
gives exactly the same numbers. PEFT's LoRA works on these models too (`docs/finetuning.md`), but not with torch.compile
and CUDA graphs, since it attaches itself in every forward pass.

E experts; R rank.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vmoe.models.freezing import classifier_names
from vmoe.moe import moe_layers
from vmoe.moe.experts import ExpertLinear, SharedExpert

TARGETS = ("attention", "mlp", "experts")
_KINDS = {"attention": ("attn", "attention"), "mlp": ("mlp", "swiglu")}  # parts of timm's class names
_ORIGINAL = ".parametrizations.weight.original"
_ADAPTER = ".parametrizations.weight.0."


class LowRank(nn.Module):
    """Adds scale * up @ down, which is zero at the start, to a weight (out, in) or (E, out, in).

    Attributes:
        down: (R, in) or (E, R, in).
        up: (out, R) or (E, out, R).
        scale: ().
    """

    scale: Tensor

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        *stack, rows, columns = weight.shape
        placement: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.down = nn.Parameter(torch.empty(*stack, rank, columns, **placement))
        self.up = nn.Parameter(torch.zeros(*stack, rows, rank, **placement))
        self.register_buffer("scale", torch.tensor(alpha / rank, **placement))
        nn.init.uniform_(self.down, -1 / math.sqrt(columns), 1 / math.sqrt(columns))

    def forward(self, weight: Tensor) -> Tensor:
        if weight.is_meta:  # the meta device has no autocast
            return adapted(weight, self.down, self.up, self.scale)
        with torch.autocast(weight.device.type, enabled=False):  # rounding would make merging inexact
            return adapted(weight, self.down, self.up, self.scale)


def adapted(weight: Tensor, down: Tensor, up: Tensor, scale: Tensor) -> Tensor:
    """The weight with its adapter, of the same shape."""
    return weight + scale * (up @ down)


def add_lora(
    model: nn.Module, rank: int = 8, alpha: float = 16.0, targets: str | Sequence[str] | None = None
) -> nn.Module:
    """Adds low-rank adapters to a timm model, dense or sparse, and freezes all else except its classifier and routers.

        model = vmoe.add_lora(vmoe.load("runs/photos"), rank=8, targets=["attention", "experts"])
        ...  # train it by any loop
        vmoe.save(vmoe.merge_lora(model), "model.safetensors", class_names)

    At first the outputs do not change. Routers learn all their weights, since those of an upcycled model are untrained.

    Args:
        model: The model. It is changed.
        rank: R of each adapter. Each expert has its own adapter.
        alpha: Adapters are multiplied by alpha / rank.
        targets: Modules with adapters, one or several of "attention", "mlp" (dense MLPs) and "experts" (with shared
            experts). None takes all that the model has.

    Returns:
        The model.

    Raises:
        ValueError: The rank is not allowed, a target is unknown or not in this model, or it has adapters already.
    """
    if rank < 1:
        raise ValueError(f"rank={rank}: must be a whole number >= 1")
    if has_lora(model):
        raise ValueError(
            "the model has low-rank adapters already; vmoe.merge_lora(model) makes them part of its weights"
        )
    found = _adaptable(model)
    words = [targets] if isinstance(targets, str) else list(targets or [word for word in TARGETS if found[word]])
    for word in words:
        if word not in TARGETS:
            raise ValueError(f"targets={word!r}: must be {', '.join(TARGETS)}")
        if not found[word]:
            raise ValueError(f"targets={word!r}: the model has none of linear layers")
    modules: list[Any] = [module for word in words for module in found[word]]
    if not modules:
        raise ValueError("the model has neither attention nor MLPs of linear layers")
    learning = [model.get_submodule(name) for name in classifier_names(model)]
    learning += [layer.router for _, layer in moe_layers(model)]
    model.requires_grad_(False)
    for learns in learning:
        learns.requires_grad_(True)
    for module in modules:
        parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank, alpha), unsafe=True)
    return model


def merge_lora(model: nn.Module) -> nn.Module:
    """Merges the adapters of `add_lora` into the weights, which become plain parameters again.

    The outputs stay the same, bit for bit on the same device. All parameters learn again.

    Args:
        model: The model. It is changed.

    Returns:
        The model.
    """
    adapted_modules = _with_adapters(model)
    for module in adapted_modules:
        _merge(module)
    return model.requires_grad_(True) if adapted_modules else model


def _merge(module: Any) -> None:
    # torch's remove_parametrizations changes the class, which deep copies of the module share: it would break them
    weight = nn.Parameter(module.weight.detach())
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    others = dict(module._parameters)
    module._parameters.clear()
    module._parameters.update({"weight": weight, **others})  # keeps the usual order of parameters


def has_lora(model: nn.Module) -> bool:
    """Whether a model has adapters of `add_lora`."""
    return bool(_with_adapters(model))


def merged_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with adapters merged into their weights."""
    names = [name.removesuffix(_ORIGINAL) for name in weights if name.endswith(_ORIGINAL)]
    names = [name for name in names if f"{name}{_ADAPTER}down" in weights]
    if not names:
        return weights
    prefixes = tuple(f"{name}.parametrizations.weight." for name in names)
    merged = {name: value for name, value in weights.items() if not name.startswith(prefixes)}
    for name in names:
        parts = (weights[f"{name}{_ADAPTER}{part}"] for part in ("down", "up", "scale"))
        merged[f"{name}.weight"] = adapted(weights[f"{name}{_ORIGINAL}"], *parts)
    return merged


def _with_adapters(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if parametrize.is_parametrized(module) and _is_adapted(module)]


def _is_adapted(module: Any) -> bool:
    """Whether an adapter is the only parametrization of a module."""
    parts = [part for weight in module.parametrizations.values() for part in weight]
    return len(parts) == 1 and isinstance(parts[0], LowRank)


def _adaptable(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The modules with a weight to adapt, by target name."""
    of_moe = {part for _, layer in moe_layers(model) for part in layer.modules()}
    heads = {part for name in classifier_names(model) for part in model.get_submodule(name).modules()}
    found: dict[str, list[nn.Module]] = {word: [] for word in TARGETS}
    for _, layer in moe_layers(model):
        shared = [layer.shared.fc1, layer.shared.fc2] if isinstance(layer.shared, SharedExpert) else []
        found["experts"] += [layer.experts.fc1, layer.experts.fc2, *shared]
    taken = set(found["experts"])
    for parent in model.modules():
        kind = type(parent).__name__.lower()
        word = next((word for word, parts in _KINDS.items() if any(part in kind for part in parts)), "")
        for module in parent.modules() if word and parent not in of_moe else ():
            if type(module) in (nn.Linear, ExpertLinear) and module not in taken | of_moe | heads:
                found[word].append(module)
                taken.add(module)
    return found
