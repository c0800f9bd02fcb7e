"""Turns a timm transformer into a V-MoE by replacing some of its MLPs with MoE layers of the same shape."""

import warnings
from collections import OrderedDict
from typing import Any, Literal

import timm
import torch
from timm.layers import DropPath
from timm.models import register_notrace_module
from torch import nn

from vmoe.models.families import EligibleMlp, eligible_mlps, has_class_token, on_meta
from vmoe.models.lora import has_lora
from vmoe.models.members import add_member_hooks, check_ensemble
from vmoe.models.padding import add_mask_hooks
from vmoe.models.released import is_released
from vmoe.moe import MoeConfig, MoeMlp, moe_layers
from vmoe.moe.image_routing import share_router
from vmoe.moe.mlps import split_leading_norm, take_apart
from vmoe.moe.passes import put_in_order

register_notrace_module(MoeMlp)  # timm's torch.fx feature extractors then treat it as one node


CREATED_WITH = "created_with"  # the attribute with a model's creation arguments, for `vmoe.save`


def create_model(name: str, moe: MoeConfig | Literal[False] | None = None, **timm_kwargs: Any) -> nn.Module:
    """Creates a timm model and makes it a V-MoE.

    Args:
        name: A model name of timm, or of a released model (`vmoe models` lists them).
        moe: The MoE layers. None gives the dense twin, built by the same code and from the same random numbers. A name
            "vmoe_..." or of a released model has its own MoE layers: None keeps them, False gives the dense twin.
        **timm_kwargs: Arguments of `timm.create_model`: num_classes, img_size, patch_size, pretrained, drop_path_rate,
            ... With weights (`pretrained=True`, `checkpoint_path`) their dense model is upcycled.

    Raises:
        RuntimeError: timm knows no such model.
        ValueError: The model's family or the chosen layers do not allow MoE layers.
    """
    if is_released(name):
        return timm.create_model(name, moe=moe, **timm_kwargs)  # which knows how its like is built
    if name.startswith("vmoe_"):
        model = timm.create_model(name, moe=moe, **timm_kwargs)
    else:
        model = timm.create_model(name, **timm_kwargs)
        model = _with_moe(model, moe, timm_kwargs) if moe else model
    setattr(model, CREATED_WITH, {"name": name, "kwargs": timm_kwargs})
    return model


def _with_moe(model: nn.Module, moe: MoeConfig, timm_kwargs: dict[str, Any]) -> nn.Module:
    """Adds MoE layers to a model that timm has created. They start from its weights if it was created with weights."""
    has_weights = timm_kwargs.get("pretrained") or timm_kwargs.get("checkpoint_path")
    if has_weights and moe.expert_width != 1:
        warnings.warn(
            f"expert_width={moe.expert_width}: the experts start at random, not from the weights", stacklevel=3
        )
        has_weights = False
    return sparsify(model, moe, init="upcycle" if has_weights else "random")


def sparsify(
    model: nn.Module,
    moe: MoeConfig,
    init: Literal["random", "upcycle"] = "random",
    *,
    upcycle_noise: float = 0.0,
    image_size: int | tuple[int, int] | None = None,
) -> nn.Module:
    """Replaces MLPs of a timm model by MoE layers, in place. Device, type and training mode are kept.

    Args:
        model: A timm model with MLPs that work on one token at a time.
        moe: The MoE layers. `moe.layers` selects MLPs of the model, counted in forward order. MLPs that mix tokens or
            see only a class token do not count.
        init: "random" initialises experts randomly. "upcycle" starts every expert as the MLP it replaces (Komatsuzaki
            et al. 2023, https://arxiv.org/abs/2212.05055), and shared experts as zero. With renormalised combine
            weights and nothing dropped the logits then equal the dense model's.
        upcycle_noise: Standard deviation of normal noise that makes upcycled experts differ, relative to that of the
            weights of the same output unit.
        image_size: Pixels of the model's images, one side of a square or (rows, columns), for Soft MoE: its number of
            slots depends on the number of tokens. None takes the size that the model was built for.

    Returns:
        `model`.

    Raises:
        ValueError: Bad `init` or `upcycle_noise`, experts of another width to upcycle, a model without suitable MLPs,
            layers that the model does not have, or a family that cannot be an ensemble.
    """
    if init not in ("random", "upcycle"):
        raise ValueError(f'init={init!r}: must be "random" or "upcycle"')
    if upcycle_noise < 0 or (upcycle_noise and init != "upcycle"):
        raise ValueError(f'upcycle_noise={upcycle_noise!r}: must be >= 0, and 0 unless init="upcycle"')
    if init == "upcycle" and moe.expert_width != 1:
        raise ValueError(f"expert_width={moe.expert_width!r}: must be 1 to upcycle, where experts start as whole MLPs")
    if has_lora(model):
        raise ValueError(
            "the model has low-rank adapters; first make them part of its weights by vmoe.merge_lora(model)"
        )
    eligible = eligible_mlps(model, image_size)
    chosen = [eligible[index] for index in moe.select_layers(len(eligible))]
    layers = dict(_replace(model, mlp, moe, init == "upcycle", upcycle_noise) for mlp in chosen)
    put_in_order(list(layers.values()))
    for mlp, layer in zip(chosen, layers.values(), strict=True):
        if layer.images is not None:
            layer.images.class_token = has_class_token(model, mlp, image_size)
    if moe.shared_router and layers:
        share_router(list(layers.values()))
    add_mask_hooks(model, layers)
    if moe.ensemble > 1 and layers:
        check_ensemble(model, image_size)
        add_member_hooks(model, layers)
    timm_model: Any = model
    own = timm_model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    timm_model.no_weight_decay = NoWeightDecay({*own, *_undecayed(layers)})
    return model


def set_moe_drop_path(model: nn.Module, rate: float) -> None:
    """Sets the drop path rate of the branches with MoE layers. Other branches keep theirs.

    Raises:
        ValueError: The blocks of this family have no drop path for the MLP alone.
    """
    for name, _ in moe_layers(model):
        *path, _ = name.split(".")
        if isinstance(model.get_submodule(".".join(path)), NormFirst):
            path.pop()
        block = model.get_submodule(".".join(path))
        if not hasattr(block, "drop_path2"):
            raise ValueError(f"{type(block).__name__} has no drop path for its MLP alone")
        block.drop_path2 = DropPath(rate).train(block.training)


class NormFirst(nn.Sequential):
    """An MLP's leading norm, then the MoE layer, so that router and experts see the same normalised tokens."""


class DenseForm:
    """The MLP that an MoE layer replaced, without its values."""

    def __init__(self, mlp: nn.Module) -> None:
        self.mlp = on_meta(mlp)

    @property
    def first_width(self) -> int:
        """The number of rows of its first layer: its hidden width, or twice that with a gate."""
        return take_apart(self.mlp).fc1.shape[0]

    def rebuild(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """A new MLP of the same kind, with uninitialised values."""
        return on_meta(self.mlp).to(dtype).to_empty(device=device)


class NoWeightDecay:
    """Replaces a timm model's `no_weight_decay`. It adds stacked biases: timm would decay them for their two axes."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def __call__(self) -> set[str]:
        return set(self.names)


def _replace(model: nn.Module, old: EligibleMlp, moe: MoeConfig, upcycle: bool, noise: float) -> tuple[str, MoeMlp]:
    """Replaces an MLP by an MoE layer, and returns the layer's name and the layer."""
    norm, body = split_leading_norm(old.mlp)
    layer = MoeMlp.from_mlp(body, moe, tokens=old.tokens)
    if upcycle:
        layer.copy_into_experts(body)
        _add_noise(layer, noise)
    layer.dense_form = DenseForm(body)
    if norm is None:
        model.set_submodule(old.name, layer)
        return old.name, layer
    both = NormFirst(OrderedDict({norm: getattr(old.mlp, norm), "moe": layer}))
    model.set_submodule(old.name, both.train(old.mlp.training))
    return f"{old.name}.moe", layer


@torch.no_grad()
def _add_noise(layer: MoeMlp, noise: float) -> None:
    if noise:
        for linear in (layer.experts.fc1, layer.experts.fc2):
            linear.weight.add_(torch.randn_like(linear.weight) * noise * linear.weight.std(-1, keepdim=True))


def _undecayed(layers: dict[str, MoeMlp]) -> list[str]:
    """The names of biases and of the experts' other stacked vectors."""
    return [
        f"{name}.{parameter}"
        for name, layer in layers.items()
        for parameter, value in layer.named_parameters()
        if parameter.endswith(".bias") or (parameter.startswith("experts.") and value.dim() == 2)
    ]
