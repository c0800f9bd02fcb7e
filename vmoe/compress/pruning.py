"""A V-MoE with fewer experts: those that matter least are dropped, or alike ones merged into one.

Which ones matter is told by what is routed to them (Koishekenov et al. 2023, https://arxiv.org/abs/2212.09811, by
gate statistics; Chen et al. 2022, https://arxiv.org/abs/2206.00277, for one task); merging follows M-SMoE (Li et al.
2024, https://arxiv.org/abs/2310.01334): the most important experts are the heads of groups, each other expert joins
the head that the router finds most like it, and a group's weights are averaged by routed mass once their hidden units
are aligned. Every layer keeps the same number of experts, so the result is an ordinary model.

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

ExpertGroups = Sequence[Sequence[int]]  # of each new expert, the old ones that it is made of, the head first
_ROUTER_ROWS = ("gate.weight", "bias")  # of a router, what has a leading axis of experts
_STUCK = {
    "soft": "every expert works on every token there, so none can be left out; train one with fewer",
    "hash": "its experts are fixed by a token's position, so it cannot route on among the rest; train one with fewer",
    "random": "its experts are drawn at random, so none matters more than another; train one with fewer",
    "balanced": "it is for benchmarks and deals tokens out in turn; train one with another router",
}


def check_prunable(model: nn.Module, keep: int) -> None:
    """Makes sure that the MoE layers of a model can lose experts until `keep` are left.

    Raises:
        ValueError: The model is dense or an ensemble, its router cannot lose experts, or `keep` is not between 1 and
            E - 1.
    """
    check_routers(model)
    for name, layer in moe_layers(model):
        moe, most = layer.config, layer.num_experts - 1
        if not 1 <= keep <= most:
            raise ValueError(f"has {most + 1} experts in {name}; keep " + (f"1 to {most}" if most else "its only one"))
        factors = [factor for factor in (moe.capacity_factor, moe.eval_capacity_factor) if factor is not None]
        if moe.fills_slots and max(factors) > keep:
            raise ValueError(
                f"has experts that choose {max(factors):g} times their share of the tokens, which of {keep} would be "
                "more than all; keep more"
            )


def check_routers(model: nn.Module) -> None:
    """Makes sure that a model has MoE layers whose experts can be weighed against one another.

    Raises:
        ValueError: The model is dense or an ensemble, or a router has no choice among them.
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
    """The `keep` experts that score highest, in their order, each alone in its group."""
    score_E = SCORES[by](use)
    assert score_E is not None
    return [[expert] for expert in sorted(score_E.topk(keep).indices.tolist())]


def merged_groups(use: ExpertUse, keep: int, by: str) -> ExpertGroups:
    """`keep` groups of all experts: their heads score highest; each other expert joins the head it is most like."""
    heads = [head for (head,) in pruned_groups(use, keep, by)]
    groups = [[head] for head in heads]
    for expert in range(len(use.mass_E)):
        if expert not in heads:
            groups[int(use.affinity_EE[expert, heads].argmax())].append(expert)
    return groups


def groups_of_layers(
    model: nn.Module, use: Mapping[str, ExpertUse], keep: int, by: str, merge: bool = False
) -> dict[str, ExpertGroups]:
    """The new experts of each MoE layer by name; where one router decides for all layers, the same ones in all."""
    choose = merged_groups if merge else pruned_groups
    if any(layer.config.shared_router for _, layer in moe_layers(model)):
        together = choose(_joint_use(use), keep, by)
        return dict.fromkeys(use, together)
    return {name: choose(each, keep, by) for name, each in use.items()}


def experts_in_use(model: nn.Module, use: Mapping[str, ExpertUse]) -> int:
    """How many experts each layer must keep, so that none loses one that was chosen."""
    shared = any(layer.config.shared_router for _, layer in moe_layers(model))
    each = [_joint_use(use)] if shared else use.values()
    return max(int((one.mass_E > 0).sum()) for one in each)


def check_keeps_classes(model: nn.Module) -> None:
    """Makes sure that a model can keep just the experts of some classes, without a change to these classes' logits.

    Raises:
        ValueError: It routes patches.
    """
    check_routers(model)
    if any(layer.images is None for _, layer in moe_layers(model)):
        raise ValueError('has route="patch": the patches of any class meet most experts; give --keep N alone')


def regrouped_config(moe: MoeConfig, keep: int, keeps_gates: bool = False) -> MoeConfig:
    """The config of layers of `keep` experts, of which a token takes as many as before while there are.

    With `keeps_gates` the gates of the experts that stay keep their values, as `regrouped_weights` has it.
    """
    removed = moe.removed_experts + moe.num_experts - keep if keeps_gates and _scores_compete(moe) else 0
    return dataclasses.replace(moe, num_experts=keep, top_k=min(moe.top_k, keep), removed_experts=removed)


@torch.no_grad()
def regrouped_weights(
    model: nn.Module, groups: Mapping[str, ExpertGroups], use: Mapping[str, ExpertUse], keeps_gates: bool = False
) -> dict[str, Tensor]:
    """The state dict of the model with new experts, each the mean of a group of old ones by their routed mass.

    Hidden units are brought into the order of the group's first expert before. The router's row of a new expert is the
    same mean of its group's rows. A group of one is that expert, bit for bit.

    Args:
        model: A model that `check_prunable` lets pass.
        groups: For each MoE layer by name, the old experts of each new one.
        use: What `measure_use` found.
        keeps_gates: The router goes on scoring the experts that are left out, where the gates of the others depend on
            their scores (`MoeConfig.removed_experts`).
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
    """Whether the combine weight of an expert depends on the scores of those that were not chosen."""
    return moe.router in ("token_choice", "cosine") and not moe.renormalize


def _joint_use(use: Mapping[str, ExpertUse]) -> ExpertUse:
    """The use of the experts in all layers together; how alike they are is the same in all, where one router scores."""
    each = list(use.values())
    norms = [one.norm_E for one in each if one.norm_E is not None]
    mass_E = torch.stack([one.mass_E for one in each]).mean(0)
    return ExpertUse(mass_E, torch.stack(norms).mean(0) if norms else None, each[0].affinity_EE)


def joined_width(model: nn.Module) -> int:
    """How many experts are together as wide as the MLP whose place they took, in a model of `vmoe.sparsify`.

    Raises:
        ValueError: No number of its experts is, or another one in each layer.
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
    """The dense model of a model with merged experts, in place: all experts at once, by their mean combine weights.

    Args:
        model: With the weights that `regrouped_weights` made, as many experts as `joined_width`.
        groups: The groups it was made with.
        use: What `measure_use` found of the model before.

    Raises:
        ValueError: As `densify`.
    """
    factors = {
        name: torch.stack([use[name].mass_E[list(group)].sum() for group in of_layer])
        for name, of_layer in groups.items()
    }
    return densify(model, "join", weights=factors)


def _shares(group: Sequence[int], mass_E: Tensor) -> Tensor:
    """The weight of each expert of a group in the mean; even where nothing was routed to any."""
    mass = mass_E[list(group)]
    return mass / mass.sum() if mass.sum() > 0 else torch.full_like(mass, 1 / len(group))


def _merged_expert(layer: MoeMlp, group: Sequence[int], shares: Tensor) -> dict[str, Tensor]:
    is_gated = has_gate(layer.experts)
    head, *others = (expert_weights(layer.experts, expert) for expert in group)
    aligned = [head] + [reordered(each, best_order(each, head, is_gated), is_gated) for each in others]
    return {key: _mean([each[key] for each in aligned], shares) for key in head}


def _mean(values: Sequence[Tensor], shares: Tensor) -> Tensor:
    """The weighted mean, in float64; of one value that value."""
    return sum(value.double() * share for value, share in zip(values, shares.tolist(), strict=True)).to(values[0].dtype)
