"""Compares arms over the values of one option, such as the part of the data: each V-MoE against the dense model.

A dense model has no options of MoE layers. For such an option it is compared with V-MoEs of any value, and counts as
one expert if the option is the number of experts.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, NullLocator
from scipy.stats import linregress, ttest_1samp

from vmoe.errors import UserError
from vmoe.evaluation.compare.figure import short
from vmoe.evaluation.compare.intervals import CONFIDENCE, Difference, difference
from vmoe.evaluation.compare.labels import arm_labels
from vmoe.evaluation.compare.runs import Arm, Run
from vmoe.figures.style import BODY, MARGIN, MUTED, SMALL, Page, label, plain_axes
from vmoe.palette import expert_hex

_WHEN_NULL = {"data.subset.fraction": 1.0}  # the value of an option that is left out
_EXPERTS = "moe.num_experts"
_TOP, _WIDTH, _HEIGHT, _GAP, _ROW = 150, 480, 340, 110, 28
_SHARE_APART = 0.012  # share of the axis between models at one value, so that none hides another


@dataclass(frozen=True)
class Point:
    """The runs of one model at one value of the option. `gain` is over the dense model there, or None."""

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

    Other options may change with it, such as the repeats of a smaller part of the data, but not at one value.

    Args:
        runs: Runs of one or several recipes.
        option: The option's dotted name. Its values must be numbers.

    Raises:
        UserError: A run lacks the option or has no number there, or two runs of one model, value and seed differ.
    """
    groups: dict[str, dict[float, list[Run]]] = {}
    of_layers = option.startswith("moe.")
    for run in runs:
        value = run.recipe.get(option)
        value = _WHEN_NULL.get(option) if value is None else value
        if of_layers and run.is_dense:
            value = 1
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"--against {option}: {run.name} has no number there ({value!r}); give another option")
        model = run.moe
        if of_layers and model is not None:
            model = {key: each for key, each in model.items() if f"moe.{key}" != option}
        runs_there = groups.setdefault(json.dumps(model, sort_keys=True), {}).setdefault(float(value), [])
        if any(other.recipe != run.recipe for other in runs_there):
            raise UserError(
                f"--against {option}: {runs_there[0].name} and {run.name} have the same layers and {option}={value}, "
                "but differ in more; leave one of them out"
            )
        runs_there.append(run)
    models = [next(iter(by_value.values()))[0] for by_value in groups.values()]
    names = arm_labels([({}, run.moe) for run in models])
    if option == _EXPERTS:
        names = [" ".join(word for word in name.split() if not word.startswith("E=")) for name in names]
    dense = next((by_value for run, by_value in zip(models, groups.values(), strict=True) if run.is_dense), {})
    if of_layers and dense:
        dense = dict.fromkeys([value for by_value in groups.values() for value in by_value], dense[1.0])
    return [
        Series(name, run.is_dense, [_point(name, value, by_value[value], dense) for value in sorted(by_value)])
        for name, run, by_value in zip(names, models, groups.values(), strict=True)
    ]


def _point(name: str, value: float, runs: list[Run], dense: dict[float, list[Run]]) -> Point:
    arm = Arm(name, runs)
    has_twin = value in dense and not runs[0].is_dense
    return Point(value, arm, difference(arm, Arm("dense", dense[value])) if has_twin else None)


@dataclass(frozen=True)
class PowerLaw:
    """The fall of the test loss with the number of experts E: loss = a E^-exponent, from the dense model (E=1) on.

    Each seed is fitted by least squares over the logarithms, up to the number of experts with the least mean loss. At a
    fixed model size it is the law of Clark et al., "Unified scaling laws for routed language models" (2022,
    https://arxiv.org/abs/2202.01169).

    Attributes:
        name: Name of the V-MoE.
        factor: a, the geometric mean over the seeds.
        exponent: The mean over the seeds.
        low: Lower end of its 95 % interval over the seeds (Student's t); None with one seed.
        high: Upper end of the interval.
        seeds: Number of seeds with a run at each number of experts.
        last: The number of experts with the least mean loss.
        most: The largest number of experts.
    """

    name: str
    factor: float
    exponent: float
    low: float | None
    high: float | None
    seeds: int
    last: float
    most: float

    def __str__(self) -> str:
        interval = "" if self.low is None else f" (95 % interval {self.low:.2f} to {self.high:.2f}, n={self.seeds})"
        after = f", and no more up to E={self.most:g}" if self.most > self.last else ""
        return (
            f"{self.name}: from the dense model to E={self.last:g} experts the test loss falls as "
            f"E^-{self.exponent:.2f}{interval}{after}"
        )


def power_laws(series: Sequence[Series]) -> list[PowerLaw]:
    """The law of each V-MoE that has a dense model and at least two numbers of experts; see `PowerLaw`."""
    dense = next((one.points[0].arm for one in series if one.is_dense), None)
    laws = []
    for one in series:
        arms = {point.value: point.arm for point in one.points}
        if dense is None or one.is_dense or None in [arm.mean("test_loss") for arm in (dense, *arms.values())]:
            continue
        last = min(arms, key=lambda value: arms[value].mean("test_loss"))
        losses = [_losses_by_seed(arm) for value, arm in ((1.0, dense), *sorted(arms.items())) if value <= last]
        experts = [1.0, *(value for value in sorted(arms) if value <= last)]
        seeds = sorted(set.intersection(*(set(each) for each in losses)))
        if len(experts) < 3 or not seeds:
            continue
        logarithms = [math.log(value) for value in experts]
        fits = [linregress(logarithms, [math.log(each[seed]) for each in losses]) for seed in seeds]
        exponents = [-fit.slope for fit in fits]
        low, high = ttest_1samp(exponents, 0).confidence_interval(CONFIDENCE) if len(seeds) > 1 else (None, None)
        factor = math.exp(statistics.fmean(fit.intercept for fit in fits))
        laws.append(PowerLaw(one.name, factor, statistics.fmean(exponents), low, high, len(seeds), last, max(arms)))
    return laws


def _losses_by_seed(arm: Arm) -> dict[int, float]:
    return {run.seed: run.test_loss for run in arm.runs}


def against_rows(series: Sequence[Series], option: str) -> list[dict[str, Any]]:
    """A plain row per point. Accuracies and differences are fractions."""
    return [
        {
            "arm": one.name,
            option: point.value,
            "n": point.arm.n,
            f"test_{point.arm.first.metric}_mean": point.arm.mean("score"),
            f"test_{point.arm.first.metric}_sd": point.arm.sd("score"),
            "test_loss_mean": point.arm.mean("test_loss"),
            "test_loss_sd": point.arm.sd("test_loss"),
            f"train_clean_{point.arm.first.metric}_mean": point.arm.mean("train_score"),
            "difference": point.gain and point.gain.mean,
            "difference_low": point.gain and point.gain.low,
            "difference_high": point.gain and point.gain.high,
            "paired_seeds": point.gain and point.gain.pairs,
        }
        for one in series
        for point in one.points
    ]


def draw_against(series: Sequence[Series], option: str, laws: Sequence[PowerLaw] = ()) -> Page:
    """Draws accuracy on test and training images over the option, and each V-MoE's gain over the dense model.

    With laws it draws the test loss instead of the accuracies.
    """
    metric = series[0].points[0].arm.first.metric_title
    fields = (
        [("Test loss", "test_loss", 1.0, "test loss (nats)")]
        if laws
        else [
            (f"Test {metric}", "score", 100.0, f"{metric} (%)"),
            (f"Training images as they are, {metric}", "train_score", 100.0, f"{metric} (%)"),
        ]
    )
    columns = len(fields) + 1
    page = Page(
        columns * _WIDTH + (columns - 1) * _GAP + 2 * MARGIN + 40, _TOP + _HEIGHT + 80 + _ROW * len(series) + MARGIN
    )
    count = sum(point.arm.n for one in series for point in one.points)
    page.heading(
        f"{'Loss' if laws else 'Accuracy' if metric == 'top-1' else metric} against {option}",
        f"runs: {count} · bars: sd over seeds, of gains the paired 95 % interval",
    )
    panels = [_titled_axes(page, index, title) for index, (title, *_) in enumerate(fields)]
    gains = _titled_axes(page, len(fields), "Gain over the dense model")
    gains.axhline(0, color=MUTED, linewidth=1)
    values = sorted({point.value for one in series for point in one.points})
    for index, one in enumerate(series):
        style = {"color": expert_hex(index), "linestyle": "none" if laws else "--" if one.is_dense else "-"}
        style |= {"fmt": "s" if one.is_dense else "o", "zorder": 3, "capsize": 3, "markersize": 7}
        places = index - (len(series) - 1) / 2
        for axes, (_, field, scale, _) in zip(panels, fields, strict=True):
            measured = [point for point in one.points if point.arm.mean(field) is not None]
            at = [_shifted(point.value, values, places) for point in measured]
            means = [scale * point.arm.mean(field) for point in measured]
            axes.errorbar(at, means, [scale * (point.arm.sd(field) or 0) for point in measured], **style)
        for law in (law for law in laws if law.name == one.name):
            reach = [1.0, law.last]
            panels[0].plot(reach, [law.factor * value**-law.exponent for value in reach], color=style["color"])
        paired = [point for point in one.points if point.gain is not None]
        reaches = [0 if p.gain.low is None else 100 * (p.gain.high - p.gain.mean) for p in paired]
        at = [_shifted(point.value, values, places) for point in paired]
        gains.errorbar(at, [100 * p.gain.mean for p in paired], reaches, **style)
        place = _TOP + _HEIGHT + 80 + _ROW * index
        page.text(MARGIN + 50, place, "■" if one.is_dense else "●", BODY, color=expert_hex(index))
        counts = sorted({point.arm.n for point in one.points})
        law = next((f"  line: E^-{law.exponent:.2f}" for law in laws if law.name == one.name), "")
        page.text(
            MARGIN + 75, place, f"{one.name}  n={'-'.join(map(str, counts[:: max(1, len(counts) - 1)]))}{law}", BODY
        )
    for axes, unit in zip((*panels, gains), (*(unit for *_, unit in fields), f"points of test {metric}"), strict=True):
        _spread(axes, values)
        label(axes, option, unit)
    if laws:
        panels[0].set_yscale("log")
        ticks = _ticks_of_loss([point.arm.mean("test_loss") for one in series for point in one.points])
        panels[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        panels[0].yaxis.set_minor_locator(NullLocator())
    return page


def _ticks_of_loss(losses: list[float]) -> list[float]:
    """About five round numbers in equal steps on a logarithmic axis."""
    first, last = math.log(min(losses)), math.log(max(losses))
    return sorted({float(f"{math.exp(first + (last - first) * step / 4):.2g}") for step in range(5)})


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
    """The position on the axis of a value that is shifted by `places`."""
    share = _SHARE_APART * places
    if _is_logarithmic(values):
        return value * (values[-1] / values[0]) ** share
    return value + share * (values[-1] - values[0])


def _is_logarithmic(values: list[float]) -> bool:
    return values[0] > 0
