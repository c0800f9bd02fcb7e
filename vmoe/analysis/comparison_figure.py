"""The picture of a comparison: accuracy against what it costs, and how it was reached."""

import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from vmoe.analysis.comparison import Group
from vmoe.analysis.palette import expert_hex
from vmoe.analysis.style import BODY, MARGIN, MUTED, SMALL, Page, label, plain_axes

_PANELS = (
    ("flops", "FLOPs an image (a multiply-add is 2)"),
    ("active_parameters", "active parameters"),
    ("total_parameters", "parameters in all"),
    ("images_per_second", "images/s in training"),
)
_WIDTH, _HEIGHT, _GAP = 400, 300, 100


def draw_comparison(groups: Sequence[Group], notes: Sequence[str]) -> Page:
    """Test accuracy against FLOPs, parameters and speed, and validation accuracy by epoch.

    A group keeps its colour; V-MoEs are round, dense models square; bars are one standard deviation over seeds; `notes`
    stand below.
    """
    legend = 30 * len(groups) + 30
    lines = [line for note in notes for line in textwrap.wrap(note, 160)]
    page = Page(3 * _WIDTH + 2 * _GAP + 2 * MARGIN + 50, 2 * (_HEIGHT + 110) + 110 + 24 * len(lines) + MARGIN)
    runs = sum(group.n for group in groups)
    counts = f"runs: {runs}, configs: {len(groups)}"
    page.heading("Accuracy and what it costs", f"{counts} · test accuracy of the checkpoint best in validation")
    for index, (field, title) in enumerate(_PANELS):
        axes = _axes(page, index, f"Test top-1 against {title.split(' (')[0]}")
        _scatter(axes, groups, field)
        label(axes, title, "test top-1 (%)")
    axes = _axes(page, 4, "Validation top-1 while training")
    for index, group in enumerate(groups):
        for run in group.runs:
            if run.curve:
                axes.plot(
                    *_percent(run.curve), color=expert_hex(index), linewidth=1.6, linestyle=_line(group), alpha=0.85
                )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    label(axes, "epoch", "val top-1 (%)")
    _legend(page, groups, *_place(5), legend)
    for index, line in enumerate(lines):
        y = page.height - MARGIN - 24 * (len(lines) - 1 - index)
        page.text(MARGIN, y, line, BODY, color=MUTED)
    return page


def _place(index: int) -> tuple[int, int]:
    return MARGIN + 50 + index % 3 * (_WIDTH + _GAP), MARGIN + 116 + index // 3 * (_HEIGHT + 110)


def _axes(page: Page, index: int, title: str) -> Axes:
    x, y = _place(index)
    page.text(x, y - 16, title, BODY, weight="bold")
    return plain_axes(page.axes(x, y, _WIDTH, _HEIGHT))


def _scatter(axes: Axes, groups: Sequence[Group], field: str) -> None:
    for index, group in enumerate(groups):
        sd = group.sd("top1")
        axes.errorbar(
            group.mean(field),
            100 * group.mean("top1"),
            yerr=None if sd is None else 100 * sd,
            fmt="s" if group.first.is_dense else "o",
            markersize=9,
            color=expert_hex(index),
            capsize=4,
            zorder=3,
        )
    axes.set_xscale("log")
    values = [group.mean(field) for group in groups]
    axes.set_xlim(min(values) / 1.35, max(values) * 1.35)
    axes.margins(y=0.25)
    ticks = FuncFormatter(lambda value, _: short(value))
    axes.xaxis.set_major_formatter(ticks)
    axes.xaxis.set_minor_formatter(NullFormatter())
    if max(values) / min(values) < 8:  # less than a decade: no power of ten need be inside
        axes.minorticks_off()
        axes.set_xticks(apart(values))


def _legend(page: Page, groups: Sequence[Group], x: int, y: int, height: int) -> None:
    page.text(x, y - 16, "Runs", BODY, weight="bold")
    key = page.axes(x, y, 30, height)
    key.set_axis_off()
    key.set_xlim(0, 1)
    key.set_ylim(height, 0)
    for index, group in enumerate(groups):
        marker = "s" if group.first.is_dense else "o"
        key.plot([0, 1], [14 + 30 * index] * 2, color=expert_hex(index), linewidth=1.6, linestyle=_line(group))
        key.plot([0.5], [14 + 30 * index], marker, color=expert_hex(index), markersize=8)
        name = page.fit(group.name, BODY, _WIDTH - 150)
        page.text(x + 40, y + 19 + 30 * index, f"{name}  n={group.n}", BODY)
    text = "round: V-MoE, square: dense; bars: sd over seeds"
    page.text(x, y + 24 + 30 * len(groups), text, SMALL, color=MUTED)


def apart(values: Sequence[float]) -> list[float]:
    """At most three of the values, smallest first, none so near another that their labels would overlap."""
    ticks = [min(values)]
    for value in sorted(values):
        if value > 1.15 * ticks[-1]:
            ticks.append(value)
    return ticks if len(ticks) <= 3 else [ticks[0], ticks[-1]]


def _line(group: Group) -> str:
    return "--" if group.first.is_dense else "-"


def _percent(curve: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [epoch for epoch, _ in curve], [100 * value for _, value in curve]


def short(number: float) -> str:
    """A number with three digits and its unit: 5.72 M."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
