"""Sentences on a report, only those that its numbers support."""

import math
from collections.abc import Iterator
from typing import Any

from vmoe.text import counted


def findings(report: dict[str, Any]) -> list[str]:
    """The findings in the numbers.

    They claim specialisation only if it exceeds its null, and a change only if its interval excludes zero.
    """
    return [
        *_route_findings(report),
        *_specialisation_findings(report["layers"]),
        *_load_findings(report["layers"]),
        *_ablation_findings(report),
        *_random_router_findings(report["layers"]),
        *_capacity_findings(report["capacity"]),
        *_agreement_findings(report["agreement"]),
        *_runs_findings(report["runs"]),
    ]


def _route_findings(report: dict[str, Any]) -> Iterator[str]:
    layers = report["layers"]
    if layers[0]["route"] == "image":
        yield (
            "Images are routed as a whole (moe.route=image): there is one decision per image, so each map has one "
            "colour. Which experts each class goes to is under Specialisation."
        )
    if report["shared_router"] and len(layers) > 1:
        yield (
            f"The layers share the router of {layers[0]['name']}: an expert of this layer that is left out is left out "
            "in all layers, and random routing there is random in all."
        )
    deciding = layers[:1] if report["shared_router"] else layers
    parts = [(layer["name"], layer["super_classes"]) for layer in deciding if layer["super_classes"]]
    if parts:
        shares = ", ".join(f"{part['own']:.1%} in {name} (purity {part['purity']:.1%})" for name, part in parts)
        yield (
            f"The expert of the image's super-class takes this share of the choices: {shares}. Purity is the share of "
            "the choices in which an expert has an image of the super-class that it takes most."
        )


def _specialisation_findings(layers: list[dict[str, Any]]) -> Iterator[str]:
    links, chance = [], []
    unit = "an image" if layers[0]["route"] == "image" else "a patch"
    for feature in layers[0]["specialisation"]:
        if unit == "an image" and feature == "position":
            continue
        parts = [(layer["specialisation"][feature], layer["name"]) for layer in layers]
        beating = [(part, name) for part, name in parts if part["beats_null"]]
        if beating:
            best, name = max(beating, key=lambda pair: pair[0]["nmi"])
            links.append((best, name, feature, len(beating)))
        else:
            chance.append(feature)
    measure = "NMI (normalised mutual information: 0 none, 1 all)"  # explained at its first mention
    for best, name, feature, count in sorted(links, key=lambda link: -link[0]["nmi"]):
        where = "in every layer" if count == len(layers) else f"in {count} of {len(layers)} layers"
        if len(layers) == 1:
            where = "in its only MoE layer"
        yield (
            f"Experts go {_strength(best)} with the {_spoken(feature, unit)}, beyond chance {where}: most in {name}, "
            f"{measure} {best['nmi']:.3f} ({best['low']:.3f} to {best['high']:.3f}; chance {best['null_mean']:.3f})."
        )
        measure = "NMI"
    if chance:
        spoken = " or the ".join(_spoken(feature, unit) for feature in chance)
        yield f"No layer's experts go with the {spoken} more than chance has it."
    first, last = (layer["specialisation"].get("class") for layer in (layers[0], layers[-1]))
    if first and len(layers) > 1 and last["beats_null"] and last["low"] > first["high"]:
        yield (
            f"Deeper experts say more about the class: NMI {first['nmi']:.3f} in {layers[0]['name']}, "
            f"{last['nmi']:.3f} in {layers[-1]['name']}."
        )


def _strength(part: dict[str, Any]) -> str:
    """A word for the information beyond chance. Its thresholds are a convention."""
    excess = part["nmi"] - part["null_mean"]
    words = ((0.01, "barely"), (0.05, "weakly"), (0.2, "clearly"))
    return next((word for step, word in words if excess < step), "strongly")


def _spoken(feature: str, unit: str) -> str:
    return {"edges": "edge strength", "position": "position of a patch", "class": "class of the image"}.get(
        feature, f"{feature} of {unit}" if feature in ("colour", "brightness") else feature
    )


def _load_findings(layers: list[dict[str, Any]]) -> Iterator[str]:
    dead = [(layer["name"], sum(expert["dead"] for expert in layer["experts"])) for layer in layers]
    if any(count for _, count in dead):
        yield (
            f"Dead experts, which take no {layers[0]['route']}: "
            + ", ".join(f"{count} in {name}" for name, count in dead if count)
            + "."
        )
    fullest = max(layers, key=lambda layer: layer["max_load"])
    if fullest["kind"] == "tokens":
        yield (
            f"The fullest expert is in {fullest['name']}, with {fullest['max_load']:.2f} times the fair load "
            f"(coefficient of variation of the load there {fullest['load_cv']:.2f}; 0 is equal load)."
        )


def _ablation_findings(report: dict[str, Any]) -> Iterator[str]:
    tried = [(layer, part) for layer in report["layers"] for part in layer["ablation"] or ()]
    if not tried:
        return
    needed = [(layer, part) for layer, part in tried if part["high"] < 0]
    if not needed:
        yield f"Of {counted(len(tried), 'expert')} none is missed when left out alone: no interval lies below zero."
        return
    layer, worst = min(needed, key=lambda pair: pair[1]["change"])
    index = min(range(len(worst["by_class"])), key=worst["by_class"].__getitem__)
    yield (
        f"Without expert {worst['expert']} of {layer['name']} accuracy falls by {_points(worst)}, most for "
        f"{report['classes'][index]} ({100 * worst['by_class'][index]:+.1f}); {len(needed)} of {len(tried)} experts' "
        f"intervals lie below zero, where chance alone would put about {0.025 * len(tried):.1f}."
    )


def _random_router_findings(layers: list[dict[str, Any]]) -> Iterator[str]:
    tried = [(layer["name"], layer["random_router"]) for layer in layers if layer["random_router"] is not None]
    if not tried:
        return
    name, worst = min(tried, key=lambda pair: pair[1]["change"])
    if worst["high"] < 0:
        yield f"Routing at random costs most in {name}: {_points(worst)} of accuracy."
    else:
        yield "Random routing in a single layer does not lower accuracy measurably: no interval lies below zero."


def _capacity_findings(settings: list[dict[str, Any]] | None) -> Iterator[str]:
    by_factor: dict[float, dict[bool, dict[str, Any]]] = {}
    for setting in settings or ():
        factor = math.inf if setting["factor"] is None else setting["factor"]
        by_factor.setdefault(factor, {})[setting["priority"]] = setting
    for factor, pair in sorted(by_factor.items()):
        if len(pair) == 2 and pair[True]["low"] > pair[False]["high"]:
            yield (
                f"At capacity factor {factor:g}, which drops {pair[False]['dropped']:.0%} of the choices, accuracy is "
                f"{pair[True]['accuracy']:.1%} with batch prioritized routing, {pair[False]['accuracy']:.1%} without."
            )
            return


def _agreement_findings(runs: list[dict[str, Any]] | None) -> Iterator[str]:
    for run in runs or ():
        for name, part in run["layers"].items():
            verdict = "more than" if part["value"] > part["null_high"] else "no more than"
            yield (
                f"The experts of {name} and those of {run['run']} agree {verdict} by chance: on {part['value']:.1%} of "
                f"the patches once paired as well as can be, chance {part['null_mean']:.1%}."
            )


def _runs_findings(runs: list[dict[str, Any]]) -> Iterator[str]:
    first = runs[0]
    for run in runs[1:] if first["accuracy"] else ():
        here, there = first["accuracy"], run["accuracy"]
        apart = here["low"] > there["high"] or there["low"] > here["high"]
        yield (
            f"Accuracy {here['value']:.1%} against {there['value']:.1%} of {run['name']}"
            f"{' (dense)' if run['is_dense'] else ''}: their intervals {'are apart' if apart else 'overlap'}."
        )


def _points(change: dict[str, float]) -> str:
    """A fall with its interval, in points."""
    return f"{-100 * change['change']:.1f} points ({-100 * change['high']:.1f} to {-100 * change['low']:.1f})"
