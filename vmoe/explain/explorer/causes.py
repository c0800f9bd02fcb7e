"""Interventions on experts: accuracy without one of them, with random routing, and at other capacities.

All use the same images, batch by batch, so changes are paired. B images; E experts; C classes; I interventions; n
images.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from operator import length_hint
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vmoe.evaluation.engine import restored_settings, set_capacity, shares_of_choices
from vmoe.explain.explorer.measures import paired_change, wilson
from vmoe.explain.explorer.replay import Prefix
from vmoe.explain.explorer.subject import Subject
from vmoe.moe import MoeMlp, Routing, moe_layers
from vmoe.moe.assignment import Capacity, CapacityError, expert_choice
from vmoe.moe.image_routing import FollowingRouter
from vmoe.moe.routers import SigmoidRouter, top_experts, weights_of
from vmoe.moe.routing import ExpertChoiceRouting, SlotRouting, SoftRouting

_NO_CHOICE = ("hash", "random", "balanced")  # routers without scores: there is no next best expert


@dataclass(frozen=True)
class Causes:
    """The effects of the interventions, in the report's form."""

    images: int  # n
    # by layer, for each expert: "expert", "change", "low", "high" of the accuracy, and "by_class"
    ablation: dict[str, list[dict[str, Any]]]
    random_router: dict[str, dict[str, float]]  # by layer: "change", "low", "high"
    # "factor" (None: nothing is dropped), "priority", "accuracy", "low", "high", "dropped" of each setting; None for
    # Soft MoE, where slots are parameters
    capacity: list[dict[str, Any]] | None


class _Intervention(NamedTuple):
    """A change of a model for one forward pass: of one layer, or of the capacity of all layers."""

    applied: Callable  # a context with the change
    layer: str | None = None
    expert: int | None = None
    factor: float | None = None  # inf drops nothing
    priority: bool | None = None


@torch.inference_mode()
def find_causes(
    subject: Subject,
    batches: Iterable,
    capacity_factors: Sequence[float],
    seed: int,
    track: Callable[[Iterable, str], Iterable] = lambda trials, description: trials,
) -> Causes:
    """Tries every intervention on the same images.

    Args:
        subject: The model. It is restored afterwards.
        batches: Batches (images, labels, ...), normalised for the model.
        capacity_factors: Factors at evaluation; inf drops nothing. A factor is left out if it gives experts no slot or
            more slots than tokens, even if only in a smaller last batch.
        seed: Seed of the random routers.
        track: Wraps the passes in a progress bar.

    Raises:
        UserError: A capacity factor cannot be set.
    """
    model = subject.model
    interventions = list(_interventions(model, capacity_factors, seed, subject.device))
    right: list[list[Tensor]] = [[] for _ in interventions]
    dropped: list[list[Tensor]] = [[] for _ in interventions]
    base, labels = [], []
    trials = _Trials(subject, batches, interventions)
    for trial in track(trials, "causes"):
        if trial.place is None:
            labels.append(trial.labels)
            base.append(subject.is_right(trial.logits, trial.labels))
        elif len(right[trial.place]) + 1 == len(labels):  # else an earlier batch could not have the capacity
            intervention = interventions[trial.place]
            with suppress(CapacityError), trial.reused(), intervention.applied():
                right[trial.place].append(subject.is_right(model(trial.images), trial.labels))
                if intervention.factor is not None:
                    dropped[trial.place].append(_dropped(model, trials.shares) * len(trial.labels))
    possible = [place for place, rows in enumerate(right) if len(rows) == len(labels)]
    return _as_causes(
        [interventions[place] for place in possible],
        torch.stack([torch.cat(rows) for rows in (base, *(right[place] for place in possible))]).cpu(),
        torch.cat(labels).cpu(),
        [float(sum(dropped[place])) / sum(map(len, labels)) for place in possible],
        len(subject.class_names),
    )


class _Trial(NamedTuple):
    """A pass over a batch. Without an intervention `place` is None; `logits` are the result."""

    images: Tensor
    labels: Tensor
    place: int | None
    logits: Tensor | None
    reused: Callable  # a context in which a pass computes nothing before its first changed layer


class _Trials:
    """All passes, batch by batch: one without an intervention, then one with each."""

    def __init__(self, subject: Subject, batches: Iterable, interventions: Sequence[_Intervention]) -> None:
        self._subject, self._batches, self._interventions = subject, batches, interventions
        self.shares: dict[str, float] = {}  # each layer's share of the choices, after the first pass
        self._differing: set[str] = set()  # layers for which a replay is not exact

    def __length_hint__(self) -> int:
        return length_hint(self._batches) * (1 + len(self._interventions))

    def __iter__(self) -> Iterator[_Trial]:
        model, device = self._subject.model, self._subject.device
        for number, batch in enumerate(self._batches):
            x, y = batch[0].to(device, non_blocking=True), batch[1].to(device, non_blocking=True)
            self.shares = self.shares or shares_of_choices(model, x)
            places = self._places_by_layer()
            prefixes = {name: Prefix(model, name) for name in places if name not in self._differing}
            first, *others = [*places, ""]
            with prefixes[first].recorded() if first in prefixes else nullcontext():
                logits = model(x)
            yield _Trial(x, y, None, logits, nullcontext)
            for name, following in zip(places, others, strict=True):
                prefix, after = prefixes.pop(name, None), prefixes.get(following)
                if prefix is not None and number == 0 and self._differs(prefix, x, logits):
                    self._differing.add(name)
                    prefix = None
                reused = nullcontext if prefix is None else prefix.replayed
                if after is not None:
                    with reused():
                        after.record(model, x)
                for place in places[name]:
                    yield _Trial(x, y, place, None, reused)

    def _places_by_layer(self) -> dict[str, list[int]]:
        """The interventions by their first changed layer, in forward order."""
        places: dict[str, list[int]] = {name: [] for name in self.shares}
        first = next(iter(places))
        for place, intervention in enumerate(self._interventions):
            places[intervention.layer or first].append(place)
        return places

    def _differs(self, prefix: Prefix, x: Tensor, logits: Tensor) -> bool:
        """Whether a replay gives other logits. That follows from the model's code, so one batch shows it."""
        with prefix.replayed():
            again = self._subject.model(x)
        return not torch.allclose(again, logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))


def _dropped(model: nn.Module, shares: dict[str, float]) -> Tensor:
    """The share of all choices that the last pass dropped, weighted over the layers by their choices."""
    parts = [shares[name] * layer.statistics.dropped.double() for name, layer in moe_layers(model)]
    return torch.stack(parts).sum()


def _interventions(
    model: nn.Module, capacity_factors: Sequence[float], seed: int, device: torch.device
) -> Iterator[_Intervention]:
    for name, layer in moe_layers(model):
        experts = layer.num_experts
        if layer.config.router not in _NO_CHOICE and experts > 1:
            for expert in range(experts):
                yield _Intervention(partial(without, layer, expert), name, expert)
        yield _Intervention(partial(random_routing, layer, torch.Generator(device).manual_seed(seed)), name)
    for factor, priority in _capacity_settings(model, capacity_factors):
        yield _Intervention(partial(capacity, model, factor, priority), factor=factor, priority=priority)


def _capacity_settings(model: nn.Module, capacity_factors: Sequence[float]) -> list[tuple[float, bool]]:
    """The capacities to try: the factor, and whether routing is batch prioritized."""
    config = moe_layers(model)[0][1].config
    if config.router == "soft" or config.route == "image":
        return []
    return list(itertools.product(capacity_factors, (False,) if config.fills_slots else (False, True)))


def check_capacities(model: nn.Module, capacity_factors: Sequence[float]) -> None:
    """Tries to set each capacity factor, without a pass.

    Raises:
        UserError: A factor cannot be set for any images.
    """
    with restored_settings(model):
        for factor in capacity_factors:
            set_capacity(model, factor)


def without(layer: MoeMlp, expert: int) -> AbstractContextManager[None]:
    """Removes an expert within the block: its score is minus infinity, and tokens choose the next best expert.

    If tokens go to all experts there is no next best, and the expert's weight is 0. With expert choice and Soft MoE the
    other experts' shares of each token are renormalised.
    """
    return _rerouted(layer, lambda router, routing: _without(router, routing, expert))


def random_routing(layer: MoeMlp, generator: torch.Generator) -> AbstractContextManager[None]:
    """Permutes each token's gates over random experts within the block.

    The gates keep their values, so the router is as confident as before. For Soft MoE tokens also enter random slots.
    """
    return _rerouted(layer, lambda _, routing: _shuffled(routing, generator))


@contextmanager
def capacity(model: nn.Module, factor: float, batch_priority: bool) -> Iterator[None]:
    """Sets the capacity factor of all layers at evaluation within the block, vanilla or batch prioritized.

    Raises:
        UserError: It cannot be set.
    """
    with restored_settings(model):
        set_capacity(model, factor)
        for _, layer in moe_layers(model):
            layer.config = dataclasses.replace(layer.config, batch_priority=batch_priority)
        yield


@contextmanager
def _rerouted(layer: MoeMlp, change: Callable) -> Iterator[None]:
    """Replaces the router's decision before slots are assigned."""
    handle = layer.router.register_forward_hook(
        lambda router, _, routed: routed._replace(routing=change(router, routed.routing))
    )
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        handle.remove()


def _without(router: nn.Module, routing: Routing | SlotRouting, expert: int) -> Routing | SlotRouting:
    if isinstance(routing, SoftRouting):
        left = routing.combine_weights_GSEC.clone()
        left[:, :, expert] = 0
        left = left / left.sum((2, 3), keepdim=True).clamp_min(torch.finfo(left.dtype).tiny)
        return routing._replace(combine_weights_GSEC=left)
    is_expert = torch.arange(routing.gates_GSE.shape[-1], device=routing.gates_GSE.device) == expert
    if isinstance(routing, ExpertChoiceRouting):
        left = routing.gates_GSE.masked_fill(is_expert, 0)
        left = left / left.sum(-1, keepdim=True).clamp_min(torch.finfo(left.dtype).tiny)
        return _experts_choose(left, routing)
    logits = routing.logits_GSE.masked_fill(is_expert, -math.inf)
    router = router.decision.router if isinstance(router, FollowingRouter) else router
    if isinstance(router, SigmoidRouter):
        gates = routing.gates_GSE.masked_fill(is_expert, 0)
        ranking = gates + router.bias
    else:
        gates = ranking = logits.softmax(-1)
        if getattr(router, "removed", 0):  # experts that pruning has removed keep their share
            removed = routing.gates_GSE[..., is_expert]
            left = routing.gates_GSE.sum(-1, keepdim=True) - removed
            gates = ranking = gates * left / (1 - removed).clamp_min(torch.finfo(gates.dtype).tiny)
    # the lowest score, but above chosen experts, which are at minus infinity: with K = E it is chosen with weight 0
    ranking = ranking.masked_fill(is_expert, torch.finfo(ranking.dtype).min)
    chosen = top_experts(ranking, routing.chosen_GSK.shape[-1])
    weights = weights_of(gates, chosen, router.renormalize)
    return routing._replace(
        logits_GSE=logits, noisy_logits_GSE=logits, gates_GSE=gates, chosen_GSK=chosen, weights_GSK=weights
    )


def _shuffled(routing: Routing | SlotRouting, generator: torch.Generator) -> Routing | SlotRouting:
    if isinstance(routing, SoftRouting):
        dispatch, combine = routing.dispatch_weights_GSEC, routing.combine_weights_GSEC
        order = _orders(dispatch.movedim(1, -1), generator).movedim(-1, 1)
        flat = combine.flatten(2)
        return routing._replace(
            dispatch_weights_GSEC=dispatch.gather(1, order),
            combine_weights_GSEC=flat.gather(-1, _orders(flat, generator)).view_as(combine),
        )
    order = _orders(routing.gates_GSE, generator)  # expert e's gates go to expert order[e]
    gates = torch.empty_like(routing.gates_GSE).scatter(-1, order, routing.gates_GSE)
    if isinstance(routing, ExpertChoiceRouting):
        return _experts_choose(gates, routing)
    logits = torch.empty_like(routing.logits_GSE).scatter(-1, order, routing.logits_GSE)
    chosen = order.gather(-1, routing.chosen_GSK)
    return routing._replace(logits_GSE=logits, noisy_logits_GSE=logits, gates_GSE=gates, chosen_GSK=chosen)


def _experts_choose(gates: Tensor, routing: ExpertChoiceRouting) -> ExpertChoiceRouting:
    """Repeats expert choice with other gates and the capacity of `routing`."""
    slots = None if routing.kept_G1C is None else routing.kept_G1C.sum((1, 2))
    return expert_choice(gates, routing.groups, Capacity(routing.chosen_GEC.shape[-1], slots), routing.valid_GS)


def _orders(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random permutations along the last axis."""
    return torch.rand(like.shape, generator=generator, device=like.device).argsort(-1)


def _as_causes(
    interventions: Sequence[_Intervention], right: Tensor, labels: Tensor, dropped: Sequence[float], num_classes: int
) -> Causes:
    """The report's form of `right` (1 + I, n), the correctness of each image; the first row has no intervention.

    With labels (n, C) an image counts for each of its classes.
    """
    base, changed = right[0], right[1:]
    ablation: dict[str, list[dict[str, Any]]] = {}
    random_router, capacities = {}, []
    of_class = _sums_by_class(torch.ones(len(labels)).double(), labels, num_classes).clamp_min(1)
    for intervention, now, drop in zip(interventions, changed, dropped, strict=True):
        change = paired_change(int((now & ~base).sum()), int((base & ~now).sum()), len(labels)).as_dict("change")
        if intervention.expert is not None:
            difference = _sums_by_class(now.double() - base.double(), labels, num_classes) / of_class
            entry = {"expert": intervention.expert, **change, "by_class": difference.tolist()}
            ablation.setdefault(intervention.layer, []).append(entry)
        elif intervention.layer is not None:
            random_router[intervention.layer] = change
        else:
            accuracy = wilson(int(now.sum()), len(labels)).as_dict("accuracy")
            factor = intervention.factor
            setting = {"factor": None if factor == math.inf else factor, "priority": intervention.priority}
            capacities.append({**setting, **accuracy, "dropped": drop})
    return Causes(len(labels), ablation, random_router, capacities or None)


def _sums_by_class(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """The sums (C,) of values (n,) float64 over the images of each class."""
    if labels.dim() == 2:
        return values @ labels.double()
    return torch.bincount(labels, values, num_classes)
