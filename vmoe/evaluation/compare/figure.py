"""The picture of a comparison: accuracy over cost, differences, and validation over time."""

import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox

from vmoe.evaluation.compare.intervals import Difference
from vmoe.evaluation.compare.runs import Arm
from vmoe.figures.style import BODY, INK, MARGIN, MUTED, SMALL, Page, label, plain_axes, points_of, text_width
from vmoe.palette import expert_hex

_PANELS = (
    ("flops", "active FLOPs per image (a multiply-add is 2)"),
    ("images_per_second", "images/s in training"),
    ("total_parameters", "parameters in all"),
)
_MORE_IS_BETTER = ("images_per_second",)
_WIDTH, _HEIGHT, _GAP = 400, 300, 100
_ROW = 30  # pixels per row of the legend
_NEAR = 14  # points closer than this many pixels share a line of numbers
_CROWD = 6  # the most numbers in a line
_MOST_NAMED_POINTS = 6  # with up to so many arms points have names, else numbers
_NAMES = 160  # width of the names beside the differences, in pixels
_SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))  # sides of a point for its name
_ROOM = 1.35  # between the outer points and the ends of a logarithmic axis
_LABEL = 0.14  # share of the axis that a tick's label takes

_FRONT = {"color": MUTED, "linewidth": 1, "linestyle": ":", "zorder": 2}


def draw_comparison(arms: Sequence[Arm], found: Sequence[Difference], notes: Sequence[str]) -> Page:
    """Draws scores on the test set over FLOPs, speed and parameters with the Pareto front; differences; validation.

    An arm has one colour everywhere, and a number where its name has no room. V-MoEs are round, dense models square.
    Bars are one standard deviation over seeds. `notes` are below.
    """
    legend = _ROW * len(arms) + 60
    lines = [line for note in notes for line in textwrap.wrap(note, 185)]
    below = _panel_corner(5)[1] + max(_HEIGHT + 60, legend)
    page = Page(3 * _WIDTH + 2 * _GAP + 2 * MARGIN + 50, below + 24 * len(lines) + MARGIN)
    counts = f"runs: {sum(arm.n for arm in arms)}, arms: {len(arms)}"
    metric = arms[0].first.metric_title
    word, heading = ("accuracy", "Accuracy") if metric == "top-1" else (metric, metric)
    page.heading(f"{heading} and what it costs", f"{counts} · test {word} of the checkpoint {_chosen(arms)}")
    for index, (field, title) in enumerate(_PANELS):
        axes = _panel(page, index, f"Test {metric} against {title.split(' (')[0]}")
        _draw_points(axes, arms, field)
        label(axes, title, f"test {metric} (%)")
    _draw_differences(page, arms, found)
    if any(run.curve for arm in arms for run in arm.runs):
        _draw_curves(_panel(page, 4, f"Validation {metric} while training"), arms)
    _list_arms(page, arms, *_panel_corner(5), legend)
    for index, line in enumerate(lines):
        page.text(MARGIN, below + 24 * (index + 1), line, BODY, color=MUTED)
    return page


def _chosen(arms: Sequence[Arm]) -> str:
    is_validated = [run.is_validated for arm in arms for run in arm.runs]
    if not any(is_validated):
        return "of the last epoch"
    return "best in validation" + ("" if all(is_validated) else ", or of the last epoch where there was no validation")


def _draw_curves(axes: Axes, arms: Sequence[Arm]) -> None:
    for index, arm in enumerate(arms):
        for run in arm.runs:
            if run.curve:
                axes.plot(
                    *_in_percent(run.curve), color=expert_hex(index), linewidth=1.6, linestyle=_dash_of(arm), alpha=0.85
                )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    label(axes, "epoch", f"val {arms[0].first.metric_title} (%)")


def _panel_corner(index: int) -> tuple[int, int]:
    return MARGIN + 50 + index % 3 * (_WIDTH + _GAP), MARGIN + 116 + index // 3 * (_HEIGHT + 110)


def _panel(page: Page, index: int, title: str, names: float = 0) -> Axes:
    """The axes of a panel on the page. `names` pixels on their left are free for wide labels."""
    x, y = _panel_corner(index)
    page.text(x, y - 16, title, BODY, weight="bold")
    return plain_axes(page.axes(x + names, y, _WIDTH - names, _HEIGHT))


def _draw_points(axes: Axes, arms: Sequence[Arm], field: str) -> None:
    for index, arm in enumerate(arms):
        sd = arm.sd("score")
        axes.errorbar(
            arm.mean(field),
            100 * arm.mean("score"),
            yerr=None if sd is None else 100 * sd,
            fmt="s" if arm.first.is_dense else "o",
            markersize=9,
            color=expert_hex(index),
            capsize=4,
            zorder=3,
        )
    axes.set_xscale("log")
    values = [arm.mean(field) for arm in arms]
    front = pareto_front([(arm.mean(field), arm.mean("score")) for arm in arms], field in _MORE_IS_BETTER)
    axes.plot([values[index] for index in front], [100 * arms[index].mean("score") for index in front], **_FRONT)
    axes.set_xlim(min(values) / _ROOM, max(values) * _ROOM)
    axes.margins(y=0.25)
    points = [(arm.mean(field), 100 * arm.mean("score")) for arm in arms]
    unnamed = _name(axes, arms, points) if len(arms) <= _MOST_NAMED_POINTS else range(len(arms))
    _number(axes, points, unnamed)
    ticks = FuncFormatter(lambda value, _: short(value))
    axes.xaxis.set_major_formatter(ticks)
    axes.xaxis.set_minor_formatter(NullFormatter())
    if max(values) / min(values) < 100:  # the range may contain fewer than two powers of ten
        axes.minorticks_off()
        axes.set_xticks(apart(values))


def _name(axes: Axes, arms: Sequence[Arm], points: Sequence[tuple[float, float]]) -> list[int]:
    """Writes the arms' names beside their points, if they hide neither a point nor another name.

    Returns:
        The arms without room for a name.
    """
    axes.autoscale_view()
    inside = axes.get_window_extent()
    markers = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in axes.transData.transform(points)]
    taken, left = list(markers), []
    for index, arm in enumerate(arms):
        width = text_width(arm.name, SMALL)
        boxes = [_name_box(markers[index], width, *side) for side in _SIDES]
        free = [
            box
            for box in boxes
            if inside.x0 < box.x0 and box.x1 < inside.x1 + _GAP / 2 and not box.count_overlaps(taken)
        ]
        if not free:
            left.append(index)
            continue
        taken.append(free[0])
        place = axes.transAxes.inverted().transform(free[0].min)
        axes.text(*place, arm.name, transform=axes.transAxes, fontsize=points_of(SMALL), color=INK, zorder=4)
    return left


def _name_box(marker: Bbox, width: float, right: int, up: int) -> Bbox:
    """The box of a line of text at the side of a point. `right` and `up` are -1, 0 or 1."""
    x = {-1: marker.x0 - width - 2, 0: (marker.x0 + marker.x1 - width) / 2, 1: marker.x1 + 2}[right]
    y = {-1: marker.y0 - SMALL - 2, 0: (marker.y0 + marker.y1 - SMALL) / 2 + 2, 1: marker.y1 + 2}[up]
    return Bbox.from_bounds(x, y, width, SMALL)


def _number(axes: Axes, points: Sequence[tuple[float, float]], arms: Sequence[int]) -> None:
    """Writes these arms' numbers, from 1, beside their points. Points that are too close share one line.

    A line of more than `_CROWD` numbers would cover other points, so it gives their count instead.
    """
    axes.autoscale_view()
    places = axes.transData.transform(points)
    groups: list[list[int]] = []
    for index in sorted(arms, key=lambda index: -places[index][1]):
        near = [group for group in groups if max(abs(places[index] - places[group[-1]])) < _NEAR]
        if near:
            near[0].append(index)
        else:
            groups.append([index])
    for group in groups:
        numbers = " ".join(str(index + 1) for index in sorted(group))
        text = numbers if len(group) <= _CROWD else f"{len(group)} arms"
        place = points[group[0]]
        axes.annotate(text, place, (7, 5), textcoords="offset points", fontsize=9, color=MUTED, zorder=4)


def _draw_differences(page: Page, arms: Sequence[Arm], found: Sequence[Difference]) -> None:
    """Draws the difference of each arm to its baseline, with its interval if there is one; the first arm on top."""
    names = [page.fit(arm.name, SMALL, _NAMES) for arm in arms]
    if len(arms) > _HEIGHT / _ROW:  # no room for all names
        names = [str(index + 1) for index in range(len(arms))]
    axes = _panel(page, 3, "Difference to the baseline", max(0, max(text_width(name, SMALL) for name in names) - 40))
    number = {arm.name: index for index, arm in enumerate(arms)}
    for part in found:
        index = number[part.arm.name]
        reach = None if part.low is None else 100 * (part.high - part.mean)
        style = {"fmt": "s" if part.arm.first.is_dense else "o", "color": expert_hex(index), "capsize": 3}
        axes.errorbar(100 * part.mean, index, xerr=reach, markersize=7, zorder=3, **style)
    axes.axvline(0, color=MUTED, linewidth=1)
    axes.xaxis.set_major_locator(MaxNLocator(5))  # numbers such as -0.125 are wide
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.set_yticks(range(len(arms)), names)
    label(axes, f"points of test {arms[0].first.metric_title}, with paired 95 % interval")


def pareto_front(points: Sequence[tuple[float, float]], more_is_better: bool = False) -> list[int]:
    """The indices of the (cost, accuracy) pairs that no other pair beats in both, cheapest first.

    Args:
        points: The pairs.
        more_is_better: Whether a larger first value is better, such as a speed.
    """
    sign = -1 if more_is_better else 1
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: (sign * points[index][0], -points[index][1])):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def _list_arms(page: Page, arms: Sequence[Arm], x: int, y: int, height: int) -> None:
    page.text(x, y - 16, "Arms", BODY, weight="bold")
    key = page.axes(x, y, 30, height)
    key.set_axis_off()
    key.set_xlim(0, 1)
    key.set_ylim(height, 0)
    for index, arm in enumerate(arms):
        marker = "s" if arm.first.is_dense else "o"
        key.plot([0, 1], [14 + _ROW * index] * 2, color=expert_hex(index), linewidth=1.6, linestyle=_dash_of(arm))
        key.plot([0.5], [14 + _ROW * index], marker, color=expert_hex(index), markersize=8)
        name = page.fit(f"{index + 1}  {arm.name}", BODY, _WIDTH - 90)
        page.text(x + 40, y + 19 + _ROW * index, f"{name}  n={arm.n}", BODY)
    text = "round: V-MoE, square: dense; bars: sd; dots: Pareto front"
    page.text(x, y + 24 + _ROW * len(arms), text, SMALL, color=MUTED)


def apart(values: Sequence[float]) -> list[float]:
    """At most three of the values, smallest first, far enough apart that their labels do not overlap."""
    ticks = [min(values)]
    width = (max(values) / min(values) * _ROOM**2) ** _LABEL  # width of a label, as a factor on the logarithmic axis
    for value in sorted(values):
        if value > width * ticks[-1]:
            ticks.append(value)
    return ticks if len(ticks) <= 3 else [ticks[0], ticks[-1]]


def _dash_of(arm: Arm) -> str:
    return "--" if arm.first.is_dense else "-"


def _in_percent(curve: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [epoch for epoch, _ in curve], [100 * value for _, value in curve]


def short(number: float) -> str:
    """A number with three digits and its unit: 5.72 M."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
