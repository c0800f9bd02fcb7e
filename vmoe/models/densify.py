"""Turns a V-MoE back into a dense model: each MoE layer becomes the MLP it replaced, with weights of its experts.

E experts; D width of a token, H hidden width, O width of the result.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vmoe.models.padding import remove_masks
from vmoe.models.surgery import NormFirst, NoWeightDecay
from vmoe.moe import MoeMlp, moe_layers
from vmoe.moe.mlps import Glu, MlpParts, put_together


def densify(
    model: nn.Module,
    how: Literal["merge", "expert", "join"] = "merge",
    expert: int = 0,
    weights: Mapping[str, Tensor | Sequence[float]] | None = None,
) -> nn.Module:
    """Replaces the MoE layers of a sparsified timm model by dense MLPs, in place.

    The result is a plain timm model: its state dict loads into `timm.create_model` of the same name. A model that was
    just upcycled becomes the original dense one. Trained experts lose their differences, so fine-tune the result.

    Args:
        model: A model made by `vmoe.sparsify`.
        how: "merge" takes the mean of all experts' weights. "expert" takes one expert. "join" puts all experts side by
            side into one hidden layer, which gives the weighted sum of their results. Together they must be as wide as
            the MLP.
        expert: For "expert", its index from 0.
        weights: For "merge", by the layer's name the weight of each expert in the mean, (E,), of any scale. For
            example, the routed mass: `trace.layers[name].gates.mean((0, 1))`. Other layers merge evenly. For "join" the
            factor of each expert's results; 1 / E for other layers.

    Returns:
        `model`.

    Raises:
        ValueError: A bad argument, or a layer that no single MLP can replace (an ensemble, shared experts, experts of
            another width, norms of each expert to join).
    """
    layers = dict(moe_layers(model))
    _check_arguments(layers, how, expert, weights or {})
    for name, layer in layers.items():
        share_E = torch.ones(layer.num_experts) / (layer.num_experts if how == "join" else 1)
        if how == "expert":
            share_E = _one_hot(expert, layer.num_experts)
        if weights and name in weights:
            share_E = torch.as_tensor(weights[name], dtype=torch.float32)
        _put_mlp(model, name, _joined_mlp(layer, share_E) if how == "join" else _dense_mlp(layer, share_E))
    remove_masks(model)
    if isinstance(vars(model).get("no_weight_decay"), NoWeightDecay):
        del model.no_weight_decay
    return model


def _check_arguments(layers: dict[str, MoeMlp], how: str, expert: int, weights: Mapping) -> None:
    if how not in ("merge", "expert", "join"):
        raise ValueError(f'how={how!r}: must be "merge", "expert" or "join"')
    if weights and how == "expert":
        raise ValueError(f'weights are for how="merge" and "join", not {how!r}')
    if not weights.keys() <= layers.keys():
        raise ValueError(f"weights name {sorted(weights.keys() - layers.keys())}; the MoE layers are {list(layers)}")
    for name, layer in layers.items():
        if not 0 <= expert < layer.num_experts:
            raise ValueError(f"expert={expert}: {name} has experts 0 to {layer.num_experts - 1}")
        if layer.config.ensemble > 1:
            raise ValueError(f"{name} has ensemble={layer.config.ensemble}: no single MLP answers as several members")
        if layer.shared is not None:
            raise ValueError(
                f"{name} has shared experts; their results are added, which no MLP of the dense width does"
            )
        if not hasattr(layer, "dense_form"):
            raise ValueError(f"{name} was not made by vmoe.sparsify, so what it replaced is not known")
        if how == "join":
            _check_join(name, layer)
        elif layer.config.expert_width != 1:
            raise ValueError(f"{name} has experts of expert_width={layer.config.expert_width} times the dense width")
        if name in weights:
            share_E = torch.as_tensor(weights[name])
            if share_E.shape != (layer.num_experts,) or (share_E < 0).any() or not 0 < share_E.sum() < float("inf"):
                raise ValueError(f"weights[{name!r}]={share_E.tolist()}: {layer.num_experts} numbers >= 0 are needed")


def _check_join(name: str, layer: MoeMlp) -> None:
    (weight1, _), _ = layer.experts.layers()
    width, dense_width = weight1.shape[1], layer.dense_form.first_width
    if layer.num_experts * width != dense_width:
        raise ValueError(f"{name} has {layer.num_experts} experts of {width} rows to join; the MLP has {dense_width}")
    if layer.experts.norm is not None and layer.num_experts > 1:
        raise ValueError(f"{name} has a norm in each expert: one MLP has only one, over all hidden units")


def _joined_mlp(layer: MoeMlp, factor_E: Tensor) -> nn.Module:
    """The MLP of the experts' hidden units side by side, in order. Before a gate it keeps the two halves apart."""
    experts = layer.experts
    (weight1, bias1), (weight2, bias2) = experts.layers()
    factor_E = factor_E.to(weight2)
    halves = 2 if isinstance(experts.act, Glu) else 1

    def side_by_side(rows: Tensor) -> Tensor:
        return rows.detach().unflatten(1, (halves, -1)).transpose(0, 1).flatten(0, 2)

    norm = None
    if experts.norm is not None:
        norm = _dense_norm(experts.norm, weight2.shape[-1], lambda stacked: stacked.detach()[0])
    weight2_EOH = weight2.detach() * factor_E[:, None, None]
    return _assembled(
        layer,
        side_by_side(weight1),
        None if bias1 is None else side_by_side(bias1),
        weight2_EOH.transpose(0, 1).flatten(1),
        None if bias2 is None else factor_E @ bias2.detach(),
        norm,
    )


def _dense_mlp(layer: MoeMlp, share_E: Tensor) -> nn.Module:
    experts = layer.experts

    def mean(stacked: Tensor) -> Tensor:
        wide_E = (share_E / share_E.sum()).to(stacked.device, torch.float64)
        return torch.einsum("e...,e->...", stacked.detach().double(), wide_E).to(stacked.dtype)

    (weight1, bias1), (weight2, bias2) = experts.layers()
    norm = None if experts.norm is None else _dense_norm(experts.norm, weight2.shape[-1], mean)
    return _assembled(
        layer,
        mean(weight1),
        None if bias1 is None else mean(bias1),
        mean(weight2),
        None if bias2 is None else mean(bias2),
        norm,
    )


def _dense_norm(norm: nn.Module, width: int, one: Callable[[Tensor], Tensor]) -> nn.LayerNorm:
    """A norm of `width`. `one` makes each of its parameters from the experts' stacked parameters."""
    stacked_parts = zip(("weight", "bias"), norm(), strict=True)
    parameters = {key: one(stacked) for key, stacked in stacked_parts if stacked is not None}
    dense = nn.LayerNorm(width, elementwise_affine="weight" in parameters, bias="bias" in parameters)
    dense.load_state_dict(parameters)
    return dense


def _assembled(
    layer: MoeMlp, fc1: Tensor, bias1: Tensor | None, fc2: Tensor, bias2: Tensor | None, norm: nn.LayerNorm | None
) -> nn.Module:
    """The MLP that the layer replaced, with these weights."""
    mlp = layer.dense_form.rebuild(fc2.device, fc2.dtype).train(layer.training)
    parts = MlpParts(fc1, bias1, fc2, bias2, layer.experts.act, norm, drop=(0.0, 0.0), use_conv=layer.use_conv)
    put_together(mlp, parts)
    return mlp


def _put_mlp(model: nn.Module, name: str, mlp: nn.Module) -> None:
    """Replaces the layer by the MLP, and moves a norm before the layer back into the MLP."""
    parent_name = name.rpartition(".")[0]
    parent = model.get_submodule(parent_name)
    if isinstance(parent, NormFirst):
        norm_name, norm = next(iter(parent.named_children()))
        setattr(mlp, norm_name, norm)
        name = parent_name
    model.set_submodule(name, mlp)


def _one_hot(index: int, count: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(index), count).float()
