"""Turning a timm transformer into a V-MoE: some of its MLPs are replaced by MoE layers of the same shape."""

from typing import Any, Literal

import timm
from timm.layers import Mlp
from torch import nn

from vmoe.moe import MoeConfig, MoeMlp

# Families whose every `Mlp` works on all tokens of an image, one at a time; by the file of timm that defines them.
FAMILIES = ("vision_transformer", "deit")


def create_model(name: str, moe: MoeConfig | None = None, **timm_kwargs: Any) -> nn.Module:
    """Creates a timm model and makes it a V-MoE.

    Args:
        name: A model name of timm.
        moe: The MoE layers; None gives the dense twin, built by the same code and from the same random numbers.
        **timm_kwargs: For `timm.create_model`: num_classes, img_size, patch_size, pretrained, drop_path_rate, ...

    Raises:
        RuntimeError: timm knows no such model.
        ValueError: The model's family or the chosen layers do not go with MoE layers.
    """
    model = timm.create_model(name, **timm_kwargs)
    return model if moe is None else sparsify(model, moe)


def sparsify(model: nn.Module, moe: MoeConfig, init: Literal["random", "upcycle"] = "random") -> nn.Module:
    """Replaces MLPs of a timm model by MoE layers, in place. Device, type and training mode are kept.

    Args:
        model: A model of a supported timm family.
        moe: The MoE layers; `moe.layers` chooses among the model's MLPs.
        init: "random": fresh experts. "upcycle": every expert starts as the MLP it replaces (Komatsuzaki et al. 2023,
            https://arxiv.org/abs/2212.05055).

    Returns:
        `model`.

    Raises:
        ValueError: Unknown `init`, a family that is not supported, or layers that the model does not have.
    """
    if init not in ("random", "upcycle"):
        raise ValueError(f'init={init!r}: must be "random" or "upcycle"')
    mlps = eligible_mlps(model)
    replaced = {name: MoeMlp.from_mlp(mlp, moe) for name, mlp in (mlps[i] for i in moe.select_layers(len(mlps)))}
    for name, layer in replaced.items():
        if init == "upcycle":
            layer.copy_into_experts(model.get_submodule(name))
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer)
    undecayed = [
        f"{name}.{parameter}"
        for name, layer in replaced.items()
        for parameter, _ in layer.named_parameters()
        if parameter.endswith(".bias")
    ]
    model.no_weight_decay = _NoWeightDecay({*model.no_weight_decay(), *undecayed})
    return model


def eligible_mlps(model: nn.Module) -> list[tuple[str, Mlp]]:
    """The MLPs of a timm model that can become MoE layers, with their names, in forward order.

    Raises:
        ValueError: The model's family is not supported, or its blocks hold no MLP.
    """
    family = type(model).__module__.rpartition(".")[2]
    if any(isinstance(module, MoeMlp) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has MoE layers already; sparsify a dense model")
    if family not in FAMILIES:
        raise ValueError(f"{type(model).__name__} of timm's {family}.py: the families are {', '.join(FAMILIES)}")
    mlps = [(name, module) for name, module in model.named_modules() if type(module) is Mlp]
    if not mlps:
        raise ValueError(f"{type(model).__name__}: its blocks hold no timm Mlp to replace")
    return mlps


class _NoWeightDecay:
    """In the place of a timm model's `no_weight_decay`: stacked biases have two axes, so they must be named."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def __call__(self) -> set[str]:
        return set(self.names)
