"""Reduces the experts of a V-MoE: drops the least important ones, or merges similar ones.

Importance follows from routing (Koishekenov et al. 2023, https://arxiv.org/abs/2212.09811, by gate statistics; Chen et
al. 2022, https://arxiv.org/abs/2206.00277, for one task). Merging follows M-SMoE (Li et al. 2024,
https://arxiv.org/abs/2310.01334). The most important experts are the heads of groups. Each other expert joins the head
with the most similar router scores. Then hidden units are aligned, and a group's weights are averaged by routed mass.
Every layer keeps the same number of experts, so the result is an ordinary model.

E experts, of which N remain.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vmoe.compress.alignment import best_order, expert_weights, has_gate, reordered
from vmoe.compress.usage import SCORES, ExpertUse
from vmoe.models import densify
from vmoe.moe import MoeConfig, MoeMlp, moe_layers
from vmoe.text import counted

ExpertGroups = Sequence[Sequence[int]]  # for each new expert its old experts, the head first
_ROUTER_ROWS = ("gate.weight", "bias")  # a router's tensors with a leading axis of experts
_STUCK = {
    "soft": "every expert works on every token there, so none can be left out; train one with fewer",
    "hash": "its experts are fixed by a token's position, so it cannot route on among the rest; train one with fewer",
    "random": "its experts are drawn at random, so none matters more than another; train one with fewer",
    "balanced": "it is for benchmarks and assigns tokens in turn; train one with another router",
}


def check_prunable(model: nn.Module, keep: int) -> None:
    """Checks that the MoE layers of a model can be reduced to `keep` experts.

    Raises:
        ValueError: The model is dense or an ensemble, its router cannot lose experts, or `keep` is not between 1 and
            E - 1.
    """
    check_routers(model)
    for name, layer in moe_layers(model):
        moe, most = layer.config, layer.num_experts - 1
        if not 1 <= keep <= most:
            choice = f"1 to {most}" if most else "its only one"
            raise ValueError(f"has {counted(most + 1, 'expert')} in {name}; keep {choice}")
        factors = [factor for factor in (moe.capacity_factor, moe.eval_capacity_factor) if factor is not None]
        if moe.fills_slots and max(factors) > keep:
            raise ValueError(
                f"has experts that choose {max(factors):g} times their share of the tokens, which of {keep} would be "
                "more than all; keep more"
            )


def check_routers(model: nn.Module) -> None:
    """Checks that a model has MoE layers with experts that can be compared by importance.

    Raises:
        ValueError: The model is dense or an ensemble, or a router has no choices.
    """
    layers = moe_layers(model)
    if not layers:
        raise ValueError("is a dense model, without experts")
    for _, layer in layers:
        router = layer.config.router
        if router in _STUCK:
            raise ValueError(f'has router="{router}": {_STUCK[router]}')
        if layer.config.ensemble > 1:
            raise ValueError(f"has ensemble={layer.config.ensemble}: all members must keep as many experts")


def pruned_groups(use: ExpertUse, keep: int, by: str) -> ExpertGroups:
    """Groups of one for the `keep` experts with the highest scores, in the order of the experts."""
    score_E = SCORES[by](use)
    assert score_E is not None
    return [[expert] for expert in sorted(score_E.topk(keep).indices.tolist())]


def merged_groups(use: ExpertUse, keep: int, by: str) -> ExpertGroups:
    """Splits all experts into `keep` groups. The highest scores are the heads; others join the most similar head."""
    heads = [head for (head,) in pruned_groups(use, keep, by)]
    groups = [[head] for head in heads]
    for expert in range(len(use.mass_E)):
        if expert not in heads:
            groups[int(use.affinity_EE[expert, heads].argmax())].append(expert)
    return groups


def groups_of_layers(
    model: nn.Module, use: Mapping[str, ExpertUse], keep: int, by: str, merge: bool = False
) -> dict[str, ExpertGroups]:
    """The new experts of each MoE layer by name. With a shared router they are the same in all layers."""
    choose = merged_groups if merge else pruned_groups
    if any(layer.config.shared_router for _, layer in moe_layers(model)):
        together = choose(_joint_use(use), keep, by)
        return dict.fromkeys(use, together)
    return {name: choose(each, keep, by) for name, each in use.items()}


def experts_in_use(model: nn.Module, use: Mapping[str, ExpertUse]) -> int:
    """The number of experts per layer to keep, so that no layer loses one that was chosen."""
    shared = any(layer.config.shared_router for _, layer in moe_layers(model))
    each = [_joint_use(use)] if shared else use.values()
    return max(int((one.mass_E > 0).sum()) for one in each)


def check_keeps_classes(model: nn.Module) -> None:
    """Checks that a model can keep only the experts of some classes without a change to their logits.

    Raises:
        ValueError: It routes patches.
    """
    check_routers(model)
    if any(layer.images is None for _, layer in moe_layers(model)):
        raise ValueError('has route="patch": the patches of any class meet most experts; give --keep N alone')


def regrouped_config(moe: MoeConfig, keep: int, keeps_gates: bool = False) -> MoeConfig:
    """The config of layers with `keep` experts. K stays, or becomes `keep` if that is smaller.

    With `keeps_gates` the gates of the remaining experts keep their values (see `regrouped_weights`).
    """
    removed = moe.removed_experts + moe.num_experts - keep if keeps_gates and _scores_compete(moe) else 0
    return dataclasses.replace(moe, num_experts=keep, top_k=min(moe.top_k, keep), removed_experts=removed)


@torch.no_grad()
def regrouped_weights(
    model: nn.Module, groups: Mapping[str, ExpertGroups], use: Mapping[str, ExpertUse], keeps_gates: bool = False
) -> dict[str, Tensor]:
    """The state dict of the model with new experts. Each is the mean of a group of old ones, by routed mass.

    Hidden units are first aligned to the group's first expert. A new expert's router row is the same mean of its
    group's rows. A group of one stays that expert, bit for bit.

    Args:
        model: A model that passes `check_prunable`.
        groups: For each MoE layer by name, the old experts of each new one.
        use: The result of `measure_use`.
        keeps_gates: Whether the router continues to score removed experts, if the other gates depend on their scores
            (`MoeConfig.removed_experts`).
    """
    weights = dict(model.state_dict())
    for name, layer in moe_layers(model):
        shares = [_shares(group, use[name].mass_E) for group in groups[name]]
        merged = [_merged_expert(layer, group, share) for group, share in zip(groups[name], shares, strict=True)]
        for key in merged[0]:
            weights[f"{name}.experts.{key}"] = torch.stack([each[key] for each in merged])
        for key in (f"{name}.router.{rows}" for rows in _ROUTER_ROWS):
            if key in weights:
                members = [list(weights[key][list(group)]) for group in groups[name]]
                kept = torch.stack([_mean(rows, share) for rows, share in zip(members, shares, strict=True)])
                if keeps_gates and _scores_compete(layer.config):
                    staying = {expert for group in groups[name] for expert in group}
                    removed = [row for row in range(len(weights[key])) if row not in staying]
                    kept = torch.cat([kept, weights[key][removed]])
                weights[key] = kept
    return weights


def _scores_compete(moe: MoeConfig) -> bool:
    """Whether an expert's combine weight depends on the scores of experts that were not chosen."""
    return moe.router in ("token_choice", "cosine") and not moe.renormalize


def _joint_use(use: Mapping[str, ExpertUse]) -> ExpertUse:
    """The use of the experts over all layers. A shared router gives the same similarity in all of them."""
    each = list(use.values())
    norms = [one.norm_E for one in each if one.norm_E is not None]
    mass_E = torch.stack([one.mass_E for one in each]).mean(0)
    return ExpertUse(mass_E, torch.stack(norms).mean(0) if norms else None, each[0].affinity_EE)


def joined_width(model: nn.Module) -> int:
    """The number of experts that together are as wide as the replaced MLP, in a model of `vmoe.sparsify`.

    Raises:
        ValueError: No number of experts is, or the number differs between layers.
    """
    found = set()
    for name, layer in moe_layers(model):
        width, dense_width = layer.experts.fc1.weight.shape[1], layer.dense_form.first_width
        count = dense_width // width
        if dense_width % width or count > layer.num_experts:
            raise ValueError(
                f"has in {name} {counted(layer.num_experts, 'expert')} of expert_width={layer.config.expert_width}, of "
                "which no number is as wide as the dense MLP"
            )
        found.add(count)
    if len(found) > 1:
        raise ValueError(f"has layers of which {sorted(found)} experts are as wide as the dense MLP")
    return found.pop()


def join_experts(model: nn.Module, groups: Mapping[str, ExpertGroups], use: Mapping[str, ExpertUse]) -> nn.Module:
    """Turns a model with merged experts into a dense one, in place. All experts apply, by their mean combine weights.

    Args:
        model: A model with the weights of `regrouped_weights` and `joined_width` experts.
        groups: The groups of `regrouped_weights`.
        use: The result of `measure_use` for the original model.

    Raises:
        ValueError: As `densify`.
    """
    factors = {
        name: torch.stack([use[name].mass_E[list(group)].sum() for group in of_layer])
        for name, of_layer in groups.items()
    }
    return densify(model, "join", weights=factors)


def _shares(group: Sequence[int], mass_E: Tensor) -> Tensor:
    """The weight of each expert of a group in the mean. The weights are equal if no token was routed to the group."""
    mass = mass_E[list(group)]
    return mass / mass.sum() if mass.sum() > 0 else torch.full_like(mass, 1 / len(group))


def _merged_expert(layer: MoeMlp, group: Sequence[int], shares: Tensor) -> dict[str, Tensor]:
    is_gated = has_gate(layer.experts)
    head, *others = (expert_weights(layer.experts, expert) for expert in group)
    aligned = [head] + [reordered(each, best_order(each, head, is_gated), is_gated) for each in others]
    return {key: _mean([each[key] for each in aligned], shares) for key in head}


def _mean(values: Sequence[Tensor], shares: Tensor) -> Tensor:
    """The weighted mean, computed in float64. The mean of one value is that value, unchanged."""
    return sum(value.double() * share for value, share in zip(values, shares.tolist(), strict=True)).to(values[0].dtype)
