"""Each V-MoE's gain over its dense twin, over the ratio of the twin's test errors to its training errors."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from matplotlib.axes import Axes

from vmoe.errors import UserError
from vmoe.evaluation.compare.intervals import EQUAL_COMPUTE, Difference, difference
from vmoe.evaluation.compare.runs import Arm, Run
from vmoe.figures.style import BODY, MARGIN, MUTED, PAPER, SMALL, Page, label, plain_axes
from vmoe.moe import MoeConfig
from vmoe.palette import expert_hex

_WIDTH, _HEIGHT, _TOP, _ROW = 820, 420, 110, 24
_KINDS = {  # kind -> colour, dark enough on white
    "K=1": expert_hex(0),
    "K=2 or more": expert_hex(9),
    "Soft MoE": expert_hex(14),
    "whole images": expert_hex(7),
    "another learned router": expert_hex(12),
    "not learned (random, hash)": MUTED,
}
_CONTROLS = ("random", "hash")
_OF_EXPERTS = ("moe", "model.moe_drop_path", "loss.super_classes", "loss.guidance_weight")  # what the twin cannot have
_MOE_FIELDS = [field.name for field in fields(MoeConfig)]
_FEW_EPOCHS = 10  # in so few epochs an expert sees few tokens
_LEAST_RATIO = 0.5  # the smallest drawn ratio; a twin without test errors has 0
_MOST_RATIO = 100  # the largest drawn ratio; a twin without training errors has an infinite one
_FEW_MORE_ERRORS = 2  # up to this ratio of test to training errors experts may pay off
_GAIN = "gain (points of test top-1)"
_BETWEEN_TWINS = 1.012  # factor along the axis between pairs of one twin, so that none hides another


@dataclass(frozen=True)
class Gain:
    """A V-MoE and its dense twin: two arms of one recipe that differ only in the MoE layers.

    Attributes:
        difference: Test accuracy of the V-MoE minus that of the twin, paired by seed.
        fit: The twin's top-1 accuracy on its own training images, without augmentation.
        flops_ratio: FLOPs per image of the V-MoE over those of the twin.
    """

    difference: Difference
    fit: float
    flops_ratio: float

    @property
    def kind(self) -> str:
        """One of `_KINDS`, by what is routed, the router and the choices of a token."""
        moe = asdict(MoeConfig()) | self.difference.arm.first.moe
        if moe["route"] == "image":
            return "whole images"
        if moe["router"] == "token_choice":
            return "K=1" if moe["top_k"] == 1 else "K=2 or more"
        if moe["router"] == "soft":
            return "Soft MoE"
        return "not learned (random, hash)" if moe["router"] in _CONTROLS else "another learned router"

    @property
    def is_learned(self) -> bool:
        """Whether its router learns. Other routers are controls."""
        return self.difference.arm.first.moe.get("router") not in _CONTROLS

    @property
    def is_certain(self) -> bool:
        """Whether the gain has an interval that excludes zero."""
        low, high = self.difference.low, self.difference.high
        return low is not None and (low > 0 or high < 0)

    @property
    def error_ratio(self) -> float:
        """The twin's error rate on test images over that on its training images; may be infinite."""
        errors, learnt = 1 - self.difference.baseline.mean("score"), 1 - self.fit
        if learnt > 0:
            return errors / learnt
        return math.inf if errors > 0 else 1.0

    @property
    def tokens_per_expert(self) -> float | None:
        """The number of training tokens per expert, mean over experts and MoE layers; None if no summary has it."""
        run = self.difference.arm.first
        images, per_image = (run.summary.get(key) for key in ("images_trained", "moe_tokens_per_image"))
        if not images or not per_image:
            return None
        moe = MoeConfig(**{key: value for key, value in run.moe.items() if key in _MOE_FIELDS})
        return images * statistics.mean(per_image.values()) * moe.experts_per_token / moe.num_experts

    @property
    def epochs(self) -> float | None:
        """How many times both models saw each training image; None if no image came twice."""
        run = self.difference.arm.first
        if run.data["name"] == "fractals":
            images = run.config["data"].get("images")
            return None if images is None else run.summary["images_trained"] / images
        return run.config["trainer"]["epochs"] * run.config["data"].get("repeat", 1)


def gains(runs: Sequence[Run]) -> list[Gain]:
    """Pairs each V-MoE with the dense runs of the same recipe, over all studies of the runs.

    V-MoEs without such a twin are left out, and so are twins without a measured accuracy on training images.

    Raises:
        UserError: A run has several classes per image.
    """
    if several := next((run.name for run in runs if run.metric != "top1"), None):
        raise UserError(f"--gains: counts wrong answers, and {several} has several classes per image; leave it out")
    once = {json.dumps([run.config, run.summary], sort_keys=True): run for run in runs}
    recipes: dict[str, dict[str, list[Run]]] = {}
    for run in once.values():
        of_both, of_experts = _parts_of_recipe(run)
        recipes.setdefault(of_both, {}).setdefault("dense" if run.is_dense else of_experts, []).append(run)
    found = []
    for arms in recipes.values():
        twin = Arm("dense", arms.pop("dense")) if "dense" in arms else None
        fit = twin and twin.mean("train_score")
        if twin is None or fit is None:
            continue
        for members in arms.values():
            arm = Arm(members[0].name.removesuffix(f"_s{members[0].seed}"), members)
            found.append(Gain(difference(arm, twin), fit, arm.first.flops / twin.first.flops))
    return sorted(found, key=lambda gain: gain.error_ratio)


def _parts_of_recipe(run: Run) -> tuple[str, str]:
    """What a V-MoE and its dense twin have in common, and what concerns the experts alone."""
    inside = tuple(f"{name}." for name in _OF_EXPERTS)
    both, experts = {}, {}
    for key, value in run.recipe.items():
        part = experts if key in _OF_EXPERTS or key.startswith(inside) else both
        part[key] = value
    return json.dumps(both, sort_keys=True, default=str), json.dumps(experts, sort_keys=True, default=str)


def gain_rows(found: Sequence[Gain]) -> list[dict[str, Any]]:
    """A plain row per pair. Accuracies and gains are fractions."""
    return [
        {
            "arm": gain.difference.arm.name,
            "kind": gain.kind,
            "data": gain.difference.arm.first.data["name"],
            "twin_train_top1": gain.fit,
            "twin_test_top1": gain.difference.baseline.mean("score"),
            "twin_error_ratio": gain.error_ratio if gain.error_ratio < math.inf else None,
            "epochs": gain.epochs,
            "tokens_per_expert": gain.tokens_per_expert,
            "gain": gain.difference.mean,
            "gain_low": gain.difference.low,
            "gain_high": gain.difference.high,
            "paired_seeds": gain.difference.pairs,
            "flops_ratio": gain.flops_ratio,
        }
        for gain in found
    ]


def draw_gains(found: Sequence[Gain]) -> Page:
    """Draws every pair as a point: the gain over the dense twin's ratio of test to training errors.

    Below, it draws the pairs with a ratio of at most `_FEW_MORE_ERRORS` over the tokens per expert.
    """
    kinds = [kind for kind in _KINDS if any(gain.kind == kind for gain in found)]
    below = [gain for gain in found if gain.error_ratio <= _FEW_MORE_ERRORS and gain.tokens_per_expert is not None]
    legend = _TOP + _HEIGHT + 80 + (_HEIGHT + 120 if below else 0)
    page = Page(_WIDTH + 2 * MARGIN + 60, legend + _ROW * max(len(kinds), 4))
    page.heading(
        "Where experts pay", f"{len(found)} V-MoEs, each against its dense twin of the same recipe, data and seeds"
    )
    axes = _gain_axes(page, _TOP)
    _draw_gain_points(axes, [(min(max(gain.error_ratio, _LEAST_RATIO), _MOST_RATIO), gain) for gain in found])
    ticks = [1, 1.5, 2, 3, 5, 10, 20, 50, _MOST_RATIO]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks[:-1]] + [f"≥ {_MOST_RATIO}"])
    axes.set_xticks([], minor=True)
    label(axes, "dense twin: test error over error on its training images", _GAIN)
    if below:
        top = _TOP + _HEIGHT + 120
        times = (
            f"Of these the {len(below)} in which the twin errs at most {_FEW_MORE_ERRORS} times as often on new images"
        )
        page.text(MARGIN, top - 40, times, BODY)
        axes = _gain_axes(page, top)
        _draw_gain_points(axes, [(gain.tokens_per_expert, gain) for gain in below])
        label(axes, "tokens that an expert was trained on", _GAIN)
    for index, kind in enumerate(kinds):
        page.text(MARGIN + 50, legend + _ROW * index, "●", BODY, color=_KINDS[kind])
        page.text(MARGIN + 75, legend + _ROW * index, kind, BODY)
    for index, (mark, line) in enumerate(
        (
            ("●", "two seeds or more; the bar is the paired 95 % interval"),
            ("○", "one seed, so no interval"),
            ("■", f"uses more than {EQUAL_COMPUTE:.0%} more FLOPs per image than its twin"),
            ("▼", f"trained for {_FEW_EPOCHS} epochs or fewer"),
        )
    ):
        page.text(MARGIN + 380, legend + _ROW * index, mark, BODY, color=MUTED)
        page.text(MARGIN + 405, legend + _ROW * index, line, BODY)
    return page


def _gain_axes(page: Page, top: float) -> Axes:
    axes = plain_axes(page.axes(MARGIN + 50, top, _WIDTH, _HEIGHT), SMALL)
    axes.set_xscale("log")
    axes.axhline(0, color=MUTED, linewidth=1.5)
    return axes


def _draw_gain_points(axes: Axes, points: Sequence[tuple[float, Gain]]) -> None:
    """Draws each gain at its value on a logarithmic axis. Gains at one value are side by side."""
    places: dict[float, list[Gain]] = {}
    for place, gain in points:
        places.setdefault(place, []).append(gain)
    for place, pairs in places.items():
        pairs.sort(key=lambda gain: list(_KINDS).index(gain.kind))
        for index, gain in enumerate(pairs):
            beside = place * _BETWEEN_TWINS ** (index - (len(pairs) - 1) / 2)
            axes.errorbar(beside, 100 * gain.difference.mean, _reach(gain), **_style(gain))


def _reach(gain: Gain) -> float | None:
    """Half of the interval, in points; None without one."""
    return None if gain.difference.low is None else 100 * (gain.difference.high - gain.difference.mean)


def _style(gain: Gain) -> dict[str, Any]:
    marker = "s" if gain.flops_ratio > 1 + EQUAL_COMPUTE else "o"
    if gain.epochs is not None and gain.epochs <= _FEW_EPOCHS:
        marker = "v"
    colour = _KINDS[gain.kind]
    return {
        "fmt": marker,
        "color": colour,
        "markerfacecolor": PAPER if gain.difference.low is None else colour,
        "markersize": 6,
        "capsize": 2,
        "linewidth": 1,
        "zorder": 3,
    }
