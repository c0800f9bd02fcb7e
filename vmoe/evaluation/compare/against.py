"""How arms compare as one option grows, such as the part of the data: each V-MoE against the dense model there."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, NullLocator

from vmoe.errors import UserError
from vmoe.evaluation.compare.figure import short
from vmoe.evaluation.compare.intervals import Difference, difference
from vmoe.evaluation.compare.labels import arm_labels
from vmoe.evaluation.compare.runs import Arm, Run
from vmoe.figures.style import BODY, MARGIN, MUTED, SMALL, Page, label, plain_axes
from vmoe.palette import expert_hex

_WHEN_NULL = {"data.subset.fraction": 1.0}  # what an option left out means
_TOP, _WIDTH, _HEIGHT, _GAP, _ROW = 150, 480, 340, 110, 28
_SHARE_APART = 0.012  # of the axis's length between models at one value, so that none hides another


@dataclass(frozen=True)
class Point:
    """The runs of one model at one value of the option; `gain` is over the dense model there, None without one."""

    value: float
    arm: Arm
    gain: Difference | None


@dataclass(frozen=True)
class Series:
    """One model at all values of the option, the smallest first."""

    name: str
    is_dense: bool
    points: list[Point]


def against(runs: Sequence[Run], option: str) -> list[Series]:
    """Groups runs by model and by the value of an option of their recipes.

    Other options may change with it, such as the passes over a smaller part of the data, but not at one value.

    Args:
        runs: Of one or several recipes.
        option: Its dotted name; its values must be numbers.

    Raises:
        UserError: a run lacks the option or has no number there, or two runs of one model, value and seed differ.
    """
    groups: dict[str, dict[float, list[Run]]] = {}
    for run in runs:
        value = run.recipe.get(option)
        value = _WHEN_NULL.get(option) if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"--against {option}: {run.name} has no number there ({value!r}); give another option")
        runs_there = groups.setdefault(json.dumps(run.moe, sort_keys=True), {}).setdefault(float(value), [])
        if any(other.recipe != run.recipe for other in runs_there):
            raise UserError(
                f"--against {option}: {runs_there[0].name} and {run.name} have the same layers and {option}={value}, "
                "but differ in more; leave one of them out"
            )
        runs_there.append(run)
    models = [next(iter(by_value.values()))[0] for by_value in groups.values()]
    names = arm_labels([({}, run.moe) for run in models])
    dense = next((by_value for run, by_value in zip(models, groups.values(), strict=True) if run.is_dense), {})
    return [
        Series(name, run.is_dense, [_point(name, value, by_value[value], dense) for value in sorted(by_value)])
        for name, run, by_value in zip(names, models, groups.values(), strict=True)
    ]


def _point(name: str, value: float, runs: list[Run], dense: dict[float, list[Run]]) -> Point:
    arm = Arm(name, runs)
    has_twin = value in dense and not runs[0].is_dense
    return Point(value, arm, difference(arm, Arm("dense", dense[value])) if has_twin else None)


def against_rows(series: Sequence[Series], option: str) -> list[dict[str, Any]]:
    """A plain row a point; accuracies and differences are fractions."""
    return [
        {
            "arm": one.name,
            option: point.value,
            "n": point.arm.n,
            "test_top1_mean": point.arm.mean("top1"),
            "test_top1_sd": point.arm.sd("top1"),
            "train_clean_top1_mean": point.arm.mean("train_top1"),
            "difference": point.gain and point.gain.mean,
            "difference_low": point.gain and point.gain.low,
            "difference_high": point.gain and point.gain.high,
            "paired_seeds": point.gain and point.gain.pairs,
        }
        for one in series
        for point in one.points
    ]


def draw_against(series: Sequence[Series], option: str) -> Page:
    """Test and training accuracy by the option, and each V-MoE's gain over the dense model at the same value."""
    page = Page(3 * _WIDTH + 2 * _GAP + 2 * MARGIN + 40, _TOP + _HEIGHT + 80 + _ROW * len(series) + MARGIN)
    count = sum(point.arm.n for one in series for point in one.points)
    page.heading(
        f"Accuracy against {option}", f"runs: {count} · bars: sd over seeds, of gains the paired 95 % interval"
    )
    panels = [_titled_axes(page, 0, "Test top-1"), _titled_axes(page, 1, "Training images as they are, top-1")]
    gains = _titled_axes(page, 2, "Gain over the dense model")
    gains.axhline(0, color=MUTED, linewidth=1)
    values = sorted({point.value for one in series for point in one.points})
    for index, one in enumerate(series):
        style = {"color": expert_hex(index), "linestyle": "--" if one.is_dense else "-", "capsize": 3, "markersize": 7}
        style |= {"fmt": "s" if one.is_dense else "o", "zorder": 3}
        places = index - (len(series) - 1) / 2
        for axes, field in zip(panels, ("top1", "train_top1"), strict=True):
            told = [point for point in one.points if point.arm.mean(field) is not None]
            at = [_shifted(point.value, values, places) for point in told]
            means = [100 * point.arm.mean(field) for point in told]
            axes.errorbar(at, means, [100 * (point.arm.sd(field) or 0) for point in told], **style)
        paired = [point for point in one.points if point.gain is not None]
        reaches = [0 if p.gain.low is None else 100 * (p.gain.high - p.gain.mean) for p in paired]
        at = [_shifted(point.value, values, places) for point in paired]
        gains.errorbar(at, [100 * p.gain.mean for p in paired], reaches, **style)
        place = _TOP + _HEIGHT + 80 + _ROW * index
        page.text(MARGIN + 50, place, "■" if one.is_dense else "●", BODY, color=expert_hex(index))
        counts = sorted({point.arm.n for point in one.points})
        page.text(MARGIN + 75, place, f"{one.name}  n={'-'.join(map(str, counts[:: max(1, len(counts) - 1)]))}", BODY)
    for axes, unit in zip((*panels, gains), ("top-1 (%)", "top-1 (%)", "points of test top-1"), strict=True):
        _spread(axes, values)
        label(axes, option, unit)
    return page


def _titled_axes(page: Page, index: int, title: str) -> Axes:
    x = MARGIN + 50 + index * (_WIDTH + _GAP)
    page.text(x, _TOP - 16, title, BODY, weight="bold")
    return plain_axes(page.axes(x, _TOP, _WIDTH - 20, _HEIGHT), SMALL)


def _spread(axes: Axes, values: list[float]) -> None:
    """An axis with a tick at each value."""
    if _is_logarithmic(values):
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(values, [short(value) for value in values])
    axes.margins(x=0.1)


def _shifted(value: float, values: list[float], places: float) -> float:
    """Where on the axis a value is drawn that is shifted by so many places."""
    share = _SHARE_APART * places
    if _is_logarithmic(values):
        return value * (values[-1] / values[0]) ** share
    return value + share * (values[-1] - values[0])


def _is_logarithmic(values: list[float]) -> bool:
    return values[0] > 0
