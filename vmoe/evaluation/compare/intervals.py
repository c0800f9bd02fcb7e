"""Differences between a study's arms, paired by seed, with intervals and costs."""

import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import ttest_rel

from vmoe.data.config import nearest
from vmoe.errors import UserError
from vmoe.evaluation.compare.runs import Arm, Run

EQUAL_COMPUTE = 0.05  # FLOPs per image count as equal up to this relative difference
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """The score of an arm on the test set minus that of its baseline, as fractions."""

    arm: Arm
    baseline: Arm
    mean: float  # over the common seeds; without any, the difference of the arms' means
    low: float | None  # 95 % confidence interval of the mean; None with fewer than two common seeds
    high: float | None
    pairs: int  # number of common seeds


def difference(arm: Arm, baseline: Arm) -> Difference:
    """Pairs runs of the same seed: they share initial weights and data order as far as their models allow.

    The interval is Student's t for paired samples.
    """
    ours, theirs = arm.score_by_seed(), baseline.score_by_seed()
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return Difference(arm, baseline, arm.mean("score") - baseline.mean("score"), None, None, 0)
    mean = statistics.fmean(ours[seed] - theirs[seed] for seed in seeds)
    if len(seeds) == 1:
        return Difference(arm, baseline, mean, None, None, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # equal differences give a warning: their interval is a point
        test = ttest_rel([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
        low, high = test.confidence_interval(CONFIDENCE)
    return Difference(arm, baseline, mean, float(low), float(high), len(seeds))


def differences(arms: Sequence[Arm], baseline: Arm | None = None) -> list[Difference]:
    """The difference of each arm to the baseline; without a baseline, to its dense twin.

    A twin has the same backbone and data; of several the nearest recipe counts. Arms that neither have a twin nor are
    one are compared with the first dense arm, or else the first arm.
    """
    if baseline is not None:
        return [difference(arm, baseline) for arm in arms if arm is not baseline]
    twins = [_twin(arm, arms) for arm in arms]
    first = next((arm for arm in arms if arm.first.is_dense), arms[0])
    others = [twin or first for twin in twins]
    return [
        difference(arm, other)
        for arm, other in zip(arms, others, strict=True)
        if arm is not first and not any(arm is twin for twin in twins)
    ]


def find_arm(arms: Sequence[Arm], name: str) -> Arm:
    """The arm that `--baseline` names by its label or by the folder of one of its runs.

    Raises:
        UserError: There is none.
    """
    for arm in arms:
        if name == arm.name or name in (run.name for run in arm.runs):
            return arm
    names = [arm.name for arm in arms]
    hint = nearest(name, names) or f"they are {', '.join(map(repr, names))}"
    raise UserError(f"--baseline {name}: no arm and no run is called so; {hint}")


def sentence(found: Difference) -> str:
    """A sentence on a difference: its interval or why it has none, whether compute is equal, and what else differs."""
    arm, base = found.arm, found.baseline
    flops = arm.first.flops / base.first.flops
    equal = abs(math.log(flops)) <= math.log1p(EQUAL_COMPUTE)
    parameters = arm.first.total_parameters / base.first.total_parameters
    score = f"{100 * found.mean:+.2f} points of test {arm.first.metric_title}"
    return (
        f"{arm.name} against {base.name}: {score}, {_evidence(found)}, at "
        f"{'equal' if equal else 'unequal'} compute "
        f"({flops:.2f}x the FLOPs per image, {parameters:.2f}x the parameters)"
        f"{_other_differences(arm.first, base.first)}"
    )


def table_rows(arms: Sequence[Arm], found: Sequence[Difference]) -> list[dict[str, Any]]:
    """The comparison with one plain row per arm. Scores and differences are fractions."""
    against = {part.arm.name: part for part in found}
    return [
        {
            "name": arm.name,
            "kind": "dense" if arm.first.is_dense else "V-MoE",
            "n": arm.n,
            "seeds": " ".join(str(run.seed) for run in arm.runs),
            "runs": " ".join(run.name for run in arm.runs),
            **score_cells(arm),
            **_difference_cells(against.get(arm.name)),
            "flops_per_image": arm.first.flops,
            "active_parameters": arm.first.active_parameters,
            "total_parameters": arm.first.total_parameters,
            "train_images_per_second_mean": arm.mean("images_per_second"),
            "data": arm.first.data["name"],
            "device": "; ".join(sorted({run.device for run in arm.runs})),
        }
        for arm in arms
    ]


def score_cells(arm: Arm) -> dict[str, float | None]:
    """The scores of an arm's row, by metric: mean and sd on the test set and on training images."""
    metric = arm.first.metric
    return {
        f"test_{metric}_mean": arm.mean("score"),
        f"test_{metric}_sd": arm.sd("score"),
        f"train_clean_{metric}_mean": arm.mean("train_score"),
        f"train_clean_{metric}_sd": arm.sd("train_score"),
    }


def _difference_cells(found: Difference | None) -> dict[str, Any]:
    if found is None:
        return dict.fromkeys(("baseline", "difference", "difference_low", "difference_high", "paired_seeds"))
    return {
        "baseline": found.baseline.name,
        "difference": found.mean,
        "difference_low": found.low,
        "difference_high": found.high,
        "paired_seeds": found.pairs,
    }


def _twin(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The dense arm of the same backbone and data with the nearest recipe; None for a dense arm."""
    if arm.first.is_dense:
        return None
    twins = [other for other in arms if arm.first.is_twin_of(other.first)]
    return min(twins, key=lambda twin: len(_unequal(arm.first.recipe, twin.first.recipe)), default=None)


def _evidence(found: Difference) -> str:
    if found.pairs >= 2:
        return f"95 % interval {100 * found.low:+.2f} to {100 * found.high:+.2f} (paired, n={found.pairs})"
    if found.pairs == 1:
        return "n=1: one seed says nothing of the spread, no significance is claimed"
    return f"no seed in common (n={found.arm.n} and n={found.baseline.n}): no interval, no significance is claimed"


def _other_differences(ours: Run, theirs: Run) -> str:
    """Other possible causes of the difference than the MoE layers, as text; "" if there are none."""
    names = _unequal(ours.recipe, theirs.recipe)
    if not names:
        return ""
    but = "they differ in" if ours.moe == theirs.moe else "not the MoE layers alone, they also differ in"
    return f"; {but} {', '.join(names)}"


def _unequal(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    names = [key for key in sorted(ours | theirs) if ours.get(key) != theirs.get(key)]
    return [name for name in names if name != "moe" and not name.startswith("moe.")]
