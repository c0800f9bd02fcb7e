"""Plans as table rows and as pictures."""

from dataclasses import asdict
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy import linspace

from vmoe.bench.figure import dress, new_figure
from vmoe.bench.plan.planner import LayoutPlan
from vmoe.bench.report import Column, Row
from vmoe.figures.style import INK, MUTED

GIB, MIB = 2**30, 2**20
_PARTS = {
    "parameters": "#1879c1",
    "gradients": "#6fb1e0",
    "optimizer": "#e07b00",
    "average": "#f3b562",
    "activations": "#3a8f5c",
    "buffers": "#9aa3aa",
}
_SHARES = {"compute": "#3a8f5c", "memory": "#6fb1e0", "network": "#e07b00", "host": "#9aa3aa"}
_LAYOUTS_DRAWN = 14  # the most layouts in a picture
_NEAR_USABLE = 0.1  # share of the usable memory; below it the memory's line would make the bars too short

PLAN_COLUMNS = (
    Column("layout", "layout"),
    Column("step ms", "step_ms", ",.1f"),
    Column("images/s", "images_per_second", ",.0f"),
    *(Column(share, share, ".0%") for share in _SHARES),
    Column("GB sent", "sent_gb", ",.2f"),
    *(Column({"optimizer": "optimiser"}.get(part, part), f"{part}_gib", ",.2f") for part in _PARTS),
    Column("peak GiB", "peak_gib", ",.1f"),
    Column("not feasible", "missing"),
)


def plan_row(plan: LayoutPlan, images: int) -> Row:
    """A plan as an entry of a table and of JSON. `images` is the number per update of all processes."""
    row: dict[str, Any] = {"layout": str(plan.layout), **plan.layout._asdict(), "missing": plan.missing}
    if plan.times is not None:
        step = plan.times.step
        row |= {"step_ms": step * 1e3, "images_per_second": images / step, "sent_gb": plan.sent / 1e9}
        row |= {share: seconds / step for share, seconds in asdict(plan.times).items()}
    if plan.memory is not None:
        row |= {f"{part}_gib": size / GIB for part, size in asdict(plan.memory).items()}
        row["peak_gib"] = plan.memory.peak / GIB
    return row


def draw_plans(plans: list[LayoutPlan], usable: float, title: str) -> Figure:
    """Draws two stacked bars per plan: the memory of a process beside the usable memory, and the time of an update."""
    plans = plans[:_LAYOUTS_DRAWN]
    figure = new_figure(10, 1.8 + 0.34 * len(plans), title)
    memory, time = figure.subplots(1, 2, sharey=True)
    names = [str(plan.layout) for plan in plans]
    largest = max(plan.memory.peak for plan in plans)
    unit, size_of = ("GiB", GIB) if largest >= GIB else ("MiB", MIB)
    is_near = largest > _NEAR_USABLE * usable  # else the bars of a small model would be too short to see
    dress(memory, "memory per process" + ("" if is_near else f" (usable: {usable / GIB:,.1f} GiB)"), unit, "")
    dress(time, "time per update", "ms", "")
    _stack(memory, [{part: size / size_of for part, size in asdict(plan.memory).items()} for plan in plans], _PARTS)
    _stack(time, [{share: s * 1e3 for share, s in asdict(plan.times).items()} for plan in plans], _SHARES)
    if is_near:
        memory.axvline(usable / size_of, color=INK, linewidth=1, linestyle="--")
        memory.text(usable / size_of, -0.95, " usable", fontsize=7, color=INK, va="top")
    memory.set_yticks(range(len(plans)), names)
    memory.set_ylim(len(plans) - 0.4, -1.0)
    for place, plan in enumerate(plans):
        if plan.missing is not None:
            memory.get_yticklabels()[place].set_color(MUTED)
            time.text(plan.times.step * 1e3, place, "  does not fit", fontsize=7, color=MUTED, va="center")
    time.margins(x=0.2)
    for axes, side in ((memory, "left"), (time, "right")):
        axes.grid(axis="y", visible=False)
        labelled = axes.get_legend_handles_labels()
        figure.legend(*labelled, fontsize=7, frameon=False, ncols=3, loc=f"outside lower {side}")
    return figure


def draw_network_curves(rows: list[Row], title: str) -> Figure:
    """Draws the seconds of an update over the network's bandwidth, and the part that is spent waiting.

    Each layout has a line. The colour is by `expert_size`; the line is dashed if the dense part is whole.
    """
    figure = new_figure(10, 4.2, title)
    axes = figure.subplots(1, 2)
    layouts = {row["layout"]: row for row in rows}
    hues = list(dict.fromkeys((row["strategy"], row["expert_size"]) for row in rows))
    colours = dict(zip(hues, colormaps["viridis"](linspace(0, 0.9, len(hues))), strict=True))
    for place, key, name in zip(axes, ("step_ms", "network"), ("time per update", "waiting for it"), strict=True):
        dress(place, name, "network, GB/s per GPU in one direction", "ms" if key == "step_ms" else "share of the time")
        for layout, any_row in layouts.items():
            points = [(row["network_bandwidth"] / 1e9, row[key]) for row in rows if row["layout"] == layout]
            style = ":" if any_row["missing"] else "--" if any_row["dense"] == "whole" else "-"
            label = f"{layout}, does not fit" if any_row["missing"] else layout
            colour = colours[any_row["strategy"], any_row["expert_size"]]
            place.plot(*zip(*points, strict=True), color=colour, label=label, lw=1.6, linestyle=style)
        place.set_xscale("log")
        place.xaxis.set_major_formatter("{x:g}")
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_formatter("{x:,g}")
    axes[1].set_ylim(bottom=0)
    axes[1].yaxis.set_major_formatter(PercentFormatter(1, 0))
    axes[0].legend(fontsize=7, frameon=False)
    return figure


def _stack(axes: Any, bars: list[dict[str, float]], colours: dict[str, str]) -> None:
    for part, colour in colours.items():
        values = [bar[part] for bar in bars]
        if any(values):
            lefts = [sum(bar[other] for other in list(colours)[: list(colours).index(part)]) for bar in bars]
            label = {"optimizer": "optimiser"}.get(part, part)
            axes.barh(range(len(bars)), values, 0.66, lefts, color=colour, label=label)
