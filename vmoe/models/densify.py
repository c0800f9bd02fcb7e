"""From a V-MoE back to a dense model: each MoE layer becomes the MLP it replaced, with weights of its experts.

E experts; D width of a token, H hidden width, O width of the result.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vmoe.models.padding import remove_masks
from vmoe.models.surgery import NormFirst, NoWeightDecay
from vmoe.moe import MoeMlp, moe_layers
from vmoe.moe.mlps import MlpParts, put_together


def densify(
    model: nn.Module,
    how: Literal["merge", "expert"] = "merge",
    expert: int = 0,
    weights: Mapping[str, Tensor | Sequence[float]] | None = None,
) -> nn.Module:
    """Replaces the MoE layers of a sparsified timm model by dense MLPs, in place.

    The result is a plain timm model: its state dict loads into `timm.create_model` of the same name. An upcycled model
    comes back as the dense one. Trained experts lose what they learnt apart from one another: fine-tune the result.

    Args:
        model: A model made by `vmoe.sparsify`.
        how: "merge": the mean of all experts' weights. "expert": one of them.
        expert: Which one, counted from 0.
        weights: For "merge", per layer's name the weight of each expert in the mean, (E,), of any scale; the mass
            routed to it, say: `trace.layers[name].gates.mean((0, 1))`. Layers that are not named merge evenly.

    Returns:
        `model`.

    Raises:
        ValueError: A bad argument, or a layer whose function no single MLP has (shared experts, experts of another
            width).
    """
    layers = dict(moe_layers(model))
    _check(layers, how, expert, weights or {})
    for name, layer in layers.items():
        share_E = torch.ones(layer.num_experts) if how == "merge" else _one_hot(expert, layer.num_experts)
        if weights and name in weights:
            share_E = torch.as_tensor(weights[name], dtype=torch.float32)
        _put(model, name, _dense_mlp(layer, share_E))
    remove_masks(model)
    if isinstance(vars(model).get("no_weight_decay"), NoWeightDecay):
        del model.no_weight_decay
    return model


def _check(layers: dict[str, MoeMlp], how: str, expert: int, weights: Mapping) -> None:
    if how not in ("merge", "expert"):
        raise ValueError(f'how={how!r}: must be "merge" or "expert"')
    if weights and how != "merge":
        raise ValueError(f'weights are for how="merge", not {how!r}')
    if not weights.keys() <= layers.keys():
        raise ValueError(f"weights name {sorted(weights.keys() - layers.keys())}; the MoE layers are {list(layers)}")
    for name, layer in layers.items():
        if not 0 <= expert < layer.num_experts:
            raise ValueError(f"expert={expert}: {name} has experts 0 to {layer.num_experts - 1}")
        if layer.shared is not None:
            raise ValueError(f"{name} has shared experts, whose results are added: no MLP of the dense width does that")
        if layer.config.expert_width != 1:
            raise ValueError(f"{name} has experts of expert_width={layer.config.expert_width} times the dense width")
        if not hasattr(layer, "dense_form"):
            raise ValueError(f"{name} was not made by vmoe.sparsify, so what it replaced is not known")
        if name in weights:
            share_E = torch.as_tensor(weights[name])
            if share_E.shape != (layer.num_experts,) or (share_E < 0).any() or not 0 < share_E.sum() < float("inf"):
                raise ValueError(f"weights[{name!r}]={share_E.tolist()}: {layer.num_experts} numbers >= 0 are needed")


def _dense_mlp(layer: MoeMlp, share_E: Tensor) -> nn.Module:
    experts = layer.experts
    reference = experts.fc2.weight

    def mean(stacked: Tensor) -> Tensor:
        wide_E = (share_E / share_E.sum()).to(stacked.device, torch.float64)
        return torch.einsum("e...,e->...", stacked.detach().double(), wide_E).to(stacked.dtype)

    norm = None
    if experts.norm is not None:
        means = {key: mean(stacked) for key, stacked in experts.norm.named_parameters()}
        norm = nn.LayerNorm(reference.shape[-1], elementwise_affine="weight" in means, bias="bias" in means)
        norm.load_state_dict(means)
    mlp = layer.dense_form.rebuild(reference.device, reference.dtype).train(layer.training)
    parts = MlpParts(
        fc1=mean(experts.fc1.weight),
        bias1=None if experts.fc1.bias is None else mean(experts.fc1.bias),
        fc2=mean(experts.fc2.weight),
        bias2=None if experts.fc2.bias is None else mean(experts.fc2.bias),
        activation=experts.act,
        norm=norm,
        drop=(0.0, 0.0),
        use_conv=layer.use_conv,
    )
    put_together(mlp, parts)
    return mlp


def _put(model: nn.Module, name: str, mlp: nn.Module) -> None:
    """Puts the MLP in the layer's place, and the norm that stood before it back inside."""
    parent_name = name.rpartition(".")[0]
    parent = model.get_submodule(parent_name)
    if isinstance(parent, NormFirst):
        norm_name, norm = next(iter(parent.named_children()))
        setattr(mlp, norm_name, norm)
        name = parent_name
    model.set_submodule(name, mlp)


def _one_hot(index: int, count: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(index), count).float()
