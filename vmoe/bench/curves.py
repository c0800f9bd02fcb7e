"""Measures the cost of an MoE layer over experts, tokens, choices, capacity and images, relative to its dense twin.

At every point the dense `Mlp` runs on K times as many tokens: equal active FLOPs, whatever the capacity drops. Along
the images it is the forward pass alone, without a capacity, as a served model runs.
"""

import dataclasses
from collections.abc import Iterator

import torch
from matplotlib.figure import Figure

from vmoe.bench.cases import LayerCase
from vmoe.bench.figure import SERIES, dress, new_figure
from vmoe.bench.layer import calls_at_once, layer_jobs
from vmoe.bench.report import Column, Row
from vmoe.bench.timing import Log, Measurement, silent, time_made_jobs
from vmoe.figures.style import INK

CURVE_JOBS = ("dense", "experts", "layer")
AXES = {
    "experts": ("experts (K=1)", (1, 2, 4, 8, 16, 32, 64, 128, 256)),
    "tokens": ("tokens", (1_000, 3_000, 10_000, 30_000, 100_000, 200_000)),
    "top-k": ("choices per token", (1, 2, 4, 8)),
    "capacity": ("capacity factor", (0.5, 0.75, 1.0, 1.05, 1.25, 1.5, 2.0, None)),
    "images": ("images, forward only", (1, 2, 4, 8, 16, 32, 64, 256)),
}
CURVE_COLUMNS = (
    Column("axis", "axis"),
    Column("value", "value"),
    Column("tokens", "tokens", ","),
    Column("dense ms", "dense_ms", "#.4g"),
    Column("experts ms", "experts_ms", "#.4g"),
    Column("ratio", "experts_ratio", ".2f"),
    Column("layer ms", "layer_ms", "#.4g"),
    Column("ratio ", "layer_ratio", ".2f"),
)


def points(axis: str, base: LayerCase) -> Iterator[tuple[float | None, LayerCase]]:
    """The values of an axis and the sizes there, without the values that `base` does not allow."""
    for value in AXES[axis][1]:
        if axis == "experts":  # K=1, so that a single expert is possible
            yield value, dataclasses.replace(base, num_experts=value, top_k=1)
        elif axis == "tokens":
            yield value, dataclasses.replace(base, images=max(1, round(value / base.tokens)))
        elif axis == "capacity":
            yield value, dataclasses.replace(base, capacity_factor=value)
        elif axis == "images":
            yield value, dataclasses.replace(base, images=value, capacity_factor=None)
        elif value <= base.num_experts:
            yield value, dataclasses.replace(base, top_k=value)


def benchmark_curves(
    base: LayerCase, axes: list[str], device: torch.device, dtype: torch.dtype, rounds: int, log: Log = silent
) -> list[Row]:
    """Times dense, experts and layer along axes of `AXES` from the sizes `base`.

    Both passes are timed under autocast to `dtype` (float32: none), and along "images" the forward pass alone, with the
    weights in `dtype`. Each job is timed `rounds` times per point. `log` gets a line per point.

    Returns:
        A row per point. A job that could not run has no time, and the row's `error` has the reason.

    Raises:
        DeviceLost: A job left the device unusable.
    """
    rows = []
    for axis in axes:
        for value, case in points(axis, base):
            log(f"{axis} {'unbounded' if value is None else value}")
            rows.append({"axis": axis, "value": "none" if value is None else value, "tokens": case.num_tokens})
            makers = layer_jobs(case, device, dtype)
            kind = " inference" if axis == "images" else ""
            chosen = {job: makers[job + kind] for job in CURVE_JOBS}
            rows[-1] |= _point_row(time_made_jobs(chosen, device, rounds, calls_at_once(device)))
    return rows


def _point_row(results: dict[str, Measurement]) -> Row:
    row = {}
    for name in CURVE_JOBS:
        if results[name].error is not None:
            row.setdefault("error", f"{name}: {results[name].error}")
            continue
        row[f"{name}_ms"] = results[name].median
        row[f"{name}_spread"] = results[name].spread
        if results["dense"].error is None:
            row[f"{name}_ratio"] = results[name].median / results["dense"].median
    return row


def draw_cost_curves(rows: list[Row], title: str) -> Figure:
    """Draws a panel per axis: the time of experts and of the layer, divided by the dense layer's."""
    axes_shown = list(dict.fromkeys(row["axis"] for row in rows))
    figure = new_figure(3.1 * len(axes_shown) + 0.6, 3.1, title)
    panels = figure.subplots(1, len(axes_shown), squeeze=False, sharey=True)[0]
    for axis, panel in zip(axes_shown, panels, strict=True):
        of_axis = [row for row in rows if row["axis"] == axis]
        dress(panel, "", AXES[axis][0], "time / dense" if axis == axes_shown[0] else "")
        panel.axhline(1, color=SERIES["dense"], linewidth=1)
        labels = [f"{row['value']:,}" if axis == "tokens" else str(row["value"]) for row in of_axis]
        for name in ("experts", "layer"):
            found = [(at, row[f"{name}_ratio"]) for at, row in enumerate(of_axis) if f"{name}_ratio" in row]
            if found:
                panel.plot(*zip(*found, strict=True), color=SERIES[name], marker="o", markersize=3.5, label=name)
        panel.set_xticks(range(len(labels)), labels, rotation=45 if max(map(len, labels)) > 4 else 0)
    panels[0].set_ylim(bottom=0)
    handles, names = panels[0].get_legend_handles_labels()
    if handles:
        panels[0].legend(handles, names, fontsize=8, frameon=False, labelcolor=INK)
    return figure
