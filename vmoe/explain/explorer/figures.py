"""The explorer's figures as pages, drawn from the report alone. `draw_figures` returns all of them by name.

E experts; C classes.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter

from vmoe.explain.explorer.panels import (
    diverging,
    interval,
    layer_ticks,
    matrix,
    panel_page,
    panel_title,
    plot,
    ramp,
    shades,
)
from vmoe.figures.style import ACCENT, BODY, MUTED, RULE, SMALL, Page, label, text_width
from vmoe.palette import expert_hex

Report = dict[str, Any]
_PLOT = (360, 240)
_LARGEST_RATIO = np.log(16)  # the darkest shade


def draw_figures(report: Report) -> Iterator[tuple[str, Page]]:
    """Draws every figure for which the report has numbers, by file name without suffix."""
    yield "load", _load_figure(report)
    yield "specialisation", _specialisation_figure(report)
    for index, layer in enumerate(report["layers"]):
        if layer["class_log_ratio"] is not None:
            yield f"classes-{index}", _ratio_figure(report, layer, layer["class_log_ratio"], report["classes"], "class")
        if layer["patch_label_log_ratio"] is not None:
            names, known = report["patch_names"], layer["patch_label_log_ratio"]
            yield f"patch-labels-{index}", _ratio_figure(report, layer, known, names, "patch label")
    if any(layer["top_k"] != 1 for layer in report["layers"]):
        yield "coactivation", _coactivation_figure(report)
    if report["flows"] and not report["shared_router"]:
        yield "flows", _flows_figure(report)
    if not _is_whole(report):
        yield "experts-per-image", _experts_per_image_figure(report)
    if report["layers"][0]["consistency"] is not None:
        yield "consistency", _consistency_figure(report)
    if any(layer["ablation"] for layer in report["layers"]):
        yield "ablation", _ablation_figure(report)
    if report["capacity"]:
        yield "capacity", _capacity_figure(report)
    if report["training"] is not None:
        yield "training-load", _training_figure(report)
    if report["saturation"] is not None:
        yield "saturation", _saturation_figure(report)
    if len(report["runs"]) > 1:
        yield "runs", _runs_figure(report)


def _subtitle(report: Report, count: str = "num_images") -> str:
    """A subtitle with the source of the numbers. `count` is the key of the number of images in the provenance."""
    known = report["provenance"]
    where = " of ".join(str(known[key]) for key in ("split", "data") if known.get(key))
    images = f"{known[count]:,} images" + ("" if report["accuracy"] else " without labels")
    parts = (images, where, report["runs"][0]["name"])
    return " · ".join(part for part in parts if part)


def _is_whole(report: Report) -> bool:
    """Whether images are routed as a whole: then they have no patches, and no positions."""
    return report["layers"][0]["route"] == "image"


def _layer_names(report: Report) -> list[str]:
    return [layer["name"] for layer in report["layers"]]


def _load_figure(report: Report) -> Page:
    layers = report["layers"]
    experts = max(layer["num_experts"] for layer in layers)
    cell = int(np.clip(900 // experts, 14, 64))
    title = "Load of the experts"
    legend = (
        "Each cell is an expert's share of the choices over the fair share: 1 is fair, 0 is dead. Variation is "
        "the standard deviation of the loads over their mean."
    )
    size = (experts * cell + 330, len(layers) * 30)
    page, places = panel_page(title, _subtitle(report), legend, 1, size, 1, left=180)
    x, y = next(places)
    for column, text in enumerate(("variation", "largest", "dropped")):
        page.text(x + experts * cell + 90 + 100 * column, y - 12, text, SMALL, color=MUTED, ha="right")
    for index, layer in enumerate(layers):
        top, load = y + index * 30, np.array([layer["load"]])
        page.text(x - 16, top + 14, page.fit(layer["name"], BODY, 170), BODY, ha="right", va="center_baseline")
        matrix(page, (x, top), (cell, 22), load, shades(load, 2), row_experts=False, form=".2f")
        dropped = "-" if layer["dropped"] is None else f"{layer['dropped']:.1%}"
        for column, text in enumerate((f"{layer['load_cv']:.2f}", f"{layer['max_load']:.2f}", dropped)):
            right = x + experts * cell + 90 + 100 * column
            page.text(right, top + 14, text, BODY, ha="right", va="center_baseline")
    return page


def _specialisation_figure(report: Report) -> Page:
    layers = report["layers"]
    features = [name for name in layers[0]["specialisation"] if name != "position" or not _is_whole(report)]
    legend = (
        "Normalised mutual information (NMI) of expert and feature, with 95 % intervals over images. It is 0 where the "
        "expert says nothing about the feature, and 1 where it says all. The grey holds 95 % of the permutations, "
        "which are chance. A hollow point is no more than chance."
    )
    page, places = panel_page("What experts specialise in", _subtitle(report), legend, len(features), _PLOT, 3, left=40)
    for feature, (x, y) in zip(features, places, strict=True):
        parts = [layer["specialisation"][feature] for layer in layers]
        axes = plot(page, x, y, _PLOT, f"Expert and {feature}")
        steps = np.arange(len(parts))
        axes.bar(steps, [part["null_high"] for part in parts], width=0.7, color=RULE)
        for step, part in zip(steps, parts, strict=True):
            interval(axes, step, part, ACCENT, filled=part["beats_null"], key="nmi")
        axes.set_ylim(0, 1.15 * max(max(part["high"], part["null_high"]) for part in parts) + 1e-6)
        layer_ticks(axes, _layer_names(report))
        label(axes, "MoE layer", "NMI")
    return page


def _ratio_figure(report: Report, layer: Report, ratio: Report, names: list[str], what: str) -> Page:
    values = np.array(ratio["matrix"])[:, ratio["order"]]
    experts, columns = values.shape
    cell = int(np.clip(1200 // columns, 1, 40)), int(np.clip(480 // experts, 10, 32))
    ordered = [names[index] for index in ratio["order"]]
    shown = [name if len(name) <= 18 else name[:17] + "…" for name in ordered] if cell[0] >= 8 else None
    part = layer["specialisation"][what]
    verdict = f"NMI {part['nmi']:.3f}, chance {part['null_mean']:.3f}"
    verdict += "" if part["beats_null"] else ": no more than chance"
    legend = (
        f"The natural logarithm of P({what} | expert) / P({what}): blue, the expert takes more of it than experts do "
        "on average; orange, less. Columns that are alike stand side by side."
    )
    size = (columns * cell[0], experts * cell[1] + (160 if shown else 30))
    page, places = panel_page(
        f"Experts and {what}: {layer['name']}", f"{_subtitle(report)} · {verdict}", legend, 1, size, 1, left=40
    )
    x, y = next(places)
    largest = float(np.clip(np.abs(values).max(), 0.25, _LARGEST_RATIO))
    matrix(page, (x, y), cell, values, diverging(values, largest), column_names=shown or [""] * columns, form=".1f")
    bottom = y + experts * cell[1] + (150 if shown else 20)
    texts = [f"1/{np.exp(largest):.2g}", "as often as all", f"{np.exp(largest):.2g} times"]
    ramp(page, x + 20, bottom, diverging(np.linspace(-largest, largest, 120), largest), texts)
    return page


def _matrix_size(side: int, titles: Iterable[str]) -> tuple[float, int]:
    """The size of panels with a square matrix each and space for titles."""
    return max(side, *(text_width(title, BODY, weight="bold") + 1 for title in titles)), side


def _coactivation_figure(report: Report) -> Page:
    layers = [layer for layer in report["layers"] if layer["top_k"] != 1]
    experts = max(layer["num_experts"] for layer in layers)
    cell = int(np.clip(320 // experts, 5, 40))
    legend = "How often two experts take the same token over what chance gives: blue more, orange less (log scale)."
    size = _matrix_size(experts * cell, [layer["name"] for layer in layers])
    page, places = panel_page("Experts that work together", _subtitle(report), legend, len(layers), size, 4, left=40)
    for layer, (x, y) in zip(layers, places, strict=True):
        ratio = np.array([[np.nan if value is None else value for value in row] for row in layer["coactivation"]])
        panel_title(page, x, y, layer["name"], size[0])
        logs = np.where(np.isnan(ratio), np.nan, np.log2(np.clip(ratio, 0.125, 8)))
        matrix(page, (x, y), (cell, cell), ratio, diverging(logs, 3), form=".1f")
    return page


def _flows_figure(report: Report) -> Page:
    flows, layers = report["flows"], report["layers"]
    experts = max(layer["num_experts"] for layer in layers)
    cell = int(np.clip(320 // experts, 5, 40))
    legend = "Rows: expert of a patch in a layer; columns: in the next one; the shade is the share of the row."
    titles = [f"{layers[flow['from']]['name']} → {layers[flow['to']]['name']}" for flow in flows]
    size = _matrix_size(experts * cell, titles)
    page, places = panel_page("From layer to layer", _subtitle(report), legend, len(flows), size, 4, left=40)
    for flow, title, (x, y) in zip(flows, titles, places, strict=True):
        shares = np.array(flow["matrix"])
        shares = shares / np.maximum(shares.sum(1, keepdims=True), 1e-12)
        panel_title(page, x, y, title, size[0])
        matrix(page, (x, y), (cell, cell), shares, shades(shares, 1), form=".0%")
    return page


def _experts_per_image_figure(report: Report) -> Page:
    layers = report["layers"]
    legend = "How many different experts the patches of an image choose."
    page, places = panel_page("Experts per image", _subtitle(report), legend, len(layers), _PLOT, 3, left=40)
    for layer, (x, y) in zip(layers, places, strict=True):
        used = layer["experts_per_image"]
        axes = plot(page, x, y, _PLOT, f"{layer['name']}: {used['mean']:.1f} on average")
        axes.bar(range(len(used["histogram"])), used["histogram"], color=ACCENT, width=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        label(axes, "experts", "images")
    return page


def _consistency_figure(report: Report) -> Page:
    kept = "images" if _is_whole(report) else "patches"
    legend = f"Share of the {kept} that keep their first expert, 95 % intervals over images; grey: agreement by chance."
    page, places = panel_page("Does routing stay?", _subtitle(report, "probe_images"), legend, 2, _PLOT, 2, left=40)
    titles = {"flip": "The image mirrored", "shift": "The image moved by 1/64 of its side"}
    for (name, title), (x, y) in zip(titles.items(), places, strict=True):
        axes = plot(page, x, y, _PLOT, title)
        for step, layer in enumerate(report["layers"]):
            part = layer["consistency"][name]
            axes.bar([step], [part["chance"]], width=0.7, color=RULE)
            interval(axes, step, part, ACCENT)
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        layer_ticks(axes, _layer_names(report))
        label(axes, "MoE layer", kept)
    return page


def _ablation_figure(report: Report) -> Page:
    layers = [layer for layer in report["layers"] if layer["ablation"]]
    legend = "Accuracy lost without an expert (the next best is chosen), paired 95 % intervals; dashed: random routing."
    page, places = panel_page(
        "What depends on an expert", _subtitle(report, "cause_images"), legend, len(layers), _PLOT, 3, left=50
    )
    for layer, (x, y) in zip(layers, places, strict=True):
        axes = plot(page, x, y, _PLOT, layer["name"])
        axes.axhline(0, color=MUTED, linewidth=1)
        for part in layer["ablation"]:
            interval(axes, part["expert"], part, expert_hex(part["expert"]), key="change")
        axes.axhline(layer["random_router"]["change"], color=MUTED, linestyle="--", linewidth=1)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        label(axes, "expert", "change of accuracy (points)")
    return page


def _capacity_figure(report: Report) -> Page:
    legend = "Each factor leaves the experts that many times their fair share of slots; shaded: 95 % intervals."
    page, places = panel_page(
        "Accuracy against capacity", _subtitle(report, "cause_images"), legend, 2, _PLOT, 2, left=50
    )
    titles = (("accuracy", "Accuracy"), ("dropped", "Dropped choices"))
    numbers = [part["factor"] for part in report["capacity"] if part["factor"] is not None] or [0.0]
    beyond = max(numbers) + max(max(numbers) - min(numbers), 1) / 8  # the position of inf, which is None in the report

    def place(part: dict) -> float:
        return beyond if part["factor"] is None else part["factor"]

    for (key, title), (x, y) in zip(titles, places, strict=True):
        axes = plot(page, x, y, _PLOT, title)
        for priority, colour, name in ((False, "#b3520c", "vanilla"), (True, ACCENT, "batch prioritized")):
            parts = sorted((part for part in report["capacity"] if part["priority"] == priority), key=place)
            if parts:
                factors = [place(part) for part in parts]
                axes.plot(factors, [part[key] for part in parts], "o-", color=colour, markersize=5, label=name)
                if key == "accuracy":
                    bounds = [[part[side] for part in parts] for side in ("low", "high")]
                    axes.fill_between(factors, *bounds, color=colour, alpha=0.15, linewidth=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.legend(frameon=False, fontsize=9)
        if any(part["factor"] is None for part in report["capacity"]):
            ticks = [tick for tick in axes.get_xticks() if min(numbers) <= tick <= max(numbers)]
            axes.set_xticks([*ticks, beyond], [*(f"{tick:g}" for tick in ticks), "inf"])
        label(axes, "capacity factor")
    return page


def _training_figure(report: Report) -> Page:
    training = report["training"]
    steps = training["steps"]
    experts = max(len(part["load"][0]) for part in training["layers"].values())
    width, height = max(1, 360 // len(steps)), int(np.clip(240 // experts, 4, 20))
    size = (width * len(steps), height * experts)
    span = f"steps {steps[0]:,} to {steps[-1]:,}"
    legend = f"Rows: experts; from left to right the epochs, {span}; shade: load, white at 0, full at twice the fair."
    page, places = panel_page(
        "Load while training", report["runs"][0]["name"], legend, len(training["layers"]), size, 3, left=50
    )
    for (name, part), (x, y) in zip(training["layers"].items(), places, strict=True):
        panel_title(page, x, y, name, size[0])
        load = np.array(part["load"]).T
        matrix(page, (x, y), (width, height), load, shades(load, 2), column_names=[""] * len(steps))
    return page


def _saturation_figure(report: Report) -> Page:
    saturation = report["saturation"]
    legend = "Share of the choices of the last checkpoint that an earlier checkpoint makes too."
    page, places = panel_page(
        "When routing settles", _subtitle(report, "probe_images"), legend, 1, (560, 300), 1, left=50
    )
    axes = plot(page, *next(places), (560, 300), "Router saturation")
    for index, (name, values) in enumerate(saturation["layers"].items()):
        axes.plot(saturation["epochs"], values, "o-", color=expert_hex(index), label=name, markersize=5)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(frameon=False, fontsize=9, ncols=2)
    label(axes, "epoch", "choices")
    return page


def _runs_figure(report: Report) -> Page:
    runs, features = report["runs"], list(report["layers"][0]["specialisation"])
    legend = (
        "The largest NMI (normalised mutual information, 0 to 1) of any layer, with 95 % intervals; dense models have "
        "no experts."
    )
    panels = []
    if report["accuracy"]:
        legend = f"Accuracy and {legend[0].lower()}{legend[1:]}"
        panels.append(("Accuracy", [run["accuracy"] for run in runs], "value"))
    count = len(panels) + len(features)
    page, places = panel_page("Runs beside each other", _subtitle(report), legend, count, _PLOT, 3, left=50)
    for feature in features:
        best = [
            max((layer["nmi"][feature] for layer in run["layers"]), key=lambda part: part["nmi"], default=None)
            for run in runs
        ]
        panels.append((f"Expert and {feature}", best, "nmi"))
    for (title, parts, key), (x, y) in zip(panels, places, strict=True):
        axes = plot(page, x, y, _PLOT, title)
        for step, part in enumerate(parts):
            if part is not None:
                interval(axes, step, part, expert_hex(step), filled=part.get("beats_null", True), key=key)
        axes.set_xticks(range(len(runs)))
        axes.set_xticklabels([page.fit(run["name"], SMALL, _PLOT[0] / len(runs)) for run in runs])
        axes.set_xlim(-0.5, len(runs) - 0.5)
        label(axes, "", "NMI" if key == "nmi" else "accuracy")
    return page
