"""Makes the report from counts: plain numbers, lists and names for the page, the figures and the JSON.

n sampled images; P prefix tokens and N positions of a layer's grid; E experts; C classes.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vmoe.evaluation.guidance import Guidance
from vmoe.explain.explorer.collection import Collection, LayerCollection
from vmoe.explain.explorer.measures import (
    class_log_ratio,
    clustered_order,
    coactivation,
    coefficient_of_variation,
    relative_load,
    wilson,
)

GALLERY = 12  # number of shown patches per expert, best and random
TOP_CLASSES = 5


def layer_report(layer: LayerCollection, images: dict[str, Any], classes: Sequence[str], seed: int) -> dict[str, Any]:
    """The report of one layer, from its counts and its part of the sample (see `ImageSample.stacked`).

    The random patches of the galleries follow from `seed`.
    """
    facts, counts = layer.facts, layer.counts
    load = relative_load(_array(counts.load))
    tokens = max(float(counts.tokens), 1.0)
    used = _array(counts.images_by_experts)
    of_class = _preferences(layer, "class")
    return {
        "name": facts.name,
        "num_experts": facts.num_experts,
        "top_k": facts.top_k,
        "router": facts.router,
        "route": facts.route,
        "kind": "tokens" if facts.top_k is not None else "slots",
        "grid": list(facts.grid),
        "prefix": facts.prefix,
        "prefix_names": list(facts.prefix_names),
        "load": load.tolist(),
        "load_cv": coefficient_of_variation(load),
        "max_load": float(load.max()),
        "dropped": float(counts.dropped / counts.choices) if counts.choices else None,
        "entropy": float(counts.entropy) / tokens,
        "specialisation": {
            name: tables.specialisation()._asdict() for name, tables in layer.association.tables.items()
        },
        "class_log_ratio": of_class,
        "patch_label_log_ratio": _preferences(layer, "patch label"),
        "coactivation": coactivation(_array(counts.together), tokens, facts.top_k).tolist(),
        "experts_per_image": {
            "mean": float((used * np.arange(len(used))).sum() / used.sum()),
            "histogram": used.astype(int).tolist(),
        },
        "experts": _expert_reports(layer, images, _favourites(layer, of_class, classes), seed),
        "consistency": None,
        "ablation": None,
        "random_router": None,
    }


def super_classes_report(layer: LayerCollection, guidance: Guidance) -> dict[str, Any] | None:
    """How well a layer's experts divide the images by super-class; None without labels.

    `own` is the share of the choices that go to the super-class's own expert, and `shares` (E super-classes, E experts)
    those of each super-class that go to each expert.
    """
    tables = layer.association.tables.get("class")
    if tables is None:
        return None
    counts = _array(guidance.targets).T @ _array(tables.value)  # choices by super-class and expert
    total = max(float(counts.sum()), 1e-300)
    return {
        "names": guidance.names,
        "own": float(counts.trace() / total),
        "purity": float(counts.max(0).sum() / total),
        "shares": (counts / np.maximum(counts.sum(1, keepdims=True), 1e-300)).tolist(),
    }


def _preferences(layer: LayerCollection, feature: str) -> dict[str, Any] | None:
    """ln(P(value | expert) / P(value)) of the "class" or the "patch label", (E, values), and an order of the values.

    None if the feature is unknown.
    """
    tables = layer.association.tables.get(feature)
    if tables is None:
        return None
    an_image = float(math.prod(layer.facts.grid) * (layer.facts.top_k or 1))  # choices
    ratio = class_log_ratio(_array(tables.value).T, prior_patches=an_image)
    return {"matrix": ratio.tolist(), "order": clustered_order(ratio)}


def _expert_reports(
    layer: LayerCollection, images: dict[str, Any], favourites: list[list[dict[str, Any]]], seed: int
) -> list[dict[str, Any]]:
    facts, counts = layer.facts, layer.counts
    position, colour = _array(counts.position), _array(counts.colour)
    taken = position.sum(0)
    places = len(position)
    experts = []
    for expert in range(facts.num_experts):
        total = max(taken[expert], 1e-300)
        is_dead = not counts.load[expert] > 0
        experts.append(
            {
                "dead": is_dead,
                **_patches_of_expert(images, expert, facts.prefix, seed),
                "classes": [] if is_dead else favourites[expert],
                "position": (position[:, expert] * places / total).reshape(facts.grid).tolist(),
                "colour": None if is_dead else (255 * colour[expert] / total).round().clip(0, 255).astype(int).tolist(),
            }
        )
    return experts


def _favourites(
    layer: LayerCollection, of_class: dict[str, Any] | None, classes: Sequence[str]
) -> list[list[dict[str, Any]]]:
    """Each expert's classes that it takes most above their share of all choices, descending; none without labels."""
    if of_class is None:
        return [[] for _ in range(layer.facts.num_experts)]
    favourites = []
    for counts, ratio in zip(_array(layer.association.tables["class"].value).T, of_class["matrix"], strict=True):
        share = counts / max(counts.sum(), 1e-300)
        best = np.argsort(-np.array(ratio), kind="stable")[:TOP_CLASSES]
        favourites.append([{"name": classes[c], "share": float(share[c]), "ratio": math.exp(ratio[c])} for c in best])
    return favourites


def _patches_of_expert(images: dict[str, Any], expert: int, prefix: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """An expert's patches in the sampled images: those with the largest gates, one per image, and random ones."""
    gates = images["gates"][:, prefix:, expert].astype(np.float32)
    takes = (images["chosen"][:, prefix:] == expert).any(-1)
    image, patch = np.nonzero(takes)
    random = np.random.default_rng([seed, expert]).permutation(len(image))[:GALLERY]
    ranked = np.where(takes, gates, -1.0)
    best = ranked.argmax(1)
    largest = ranked.max(1)
    top = [number for number in np.argsort(-largest, kind="stable")[:GALLERY] if largest[number] >= 0]

    def described(number: int, place: int) -> dict[str, Any]:
        return {"image": int(number), "patch": int(place), "gate": float(gates[number, place])}

    return {
        "top": [described(number, best[number]) for number in top],
        "random": [described(image[index], patch[index]) for index in sorted(random)],
    }


def flows_report(collection: Collection) -> list[dict[str, Any]]:
    """The share of patches for each pair of experts of a layer and the next one, by first choices."""
    return [
        {"from": index, "to": index + 1, "matrix": (_array(flow.counts) / max(float(flow.counts.sum()), 1.0)).tolist()}
        for index, flow in enumerate(collection.flows)
    ]


def run_report(name: str, collection: Collection) -> dict[str, Any]:
    """The figures that are compared between runs."""
    layers = []
    for layer in collection.layers:
        counts = layer.counts
        layers.append(
            {
                "name": layer.facts.name,
                "load_cv": coefficient_of_variation(relative_load(_array(counts.load))),
                "nmi": {
                    feature: tables.specialisation()._asdict() for feature, tables in layer.association.tables.items()
                },
                "dropped": float(counts.dropped / counts.choices) if counts.choices else None,
            }
        )
    return {"name": name, "accuracy": accuracy_report(collection), "is_dense": not collection.layers, "layers": layers}


def accuracy_report(collection: Collection) -> dict[str, float] | None:
    """The share of right predictions with its interval; None without labels."""
    return None if collection.correct is None else wilson(collection.correct, collection.images).as_dict()


def rounded(value: Any, digits: int = 6) -> Any:
    """Nested plain types with floats rounded to `digits` significant digits, and None for NaN and infinity."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def _array(values: Any) -> np.ndarray:
    return values.cpu().numpy()
