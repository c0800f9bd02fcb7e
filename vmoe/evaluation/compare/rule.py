"""A rule that predicts whether experts pay off, fitted on some dense twins and tested on others."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from vmoe.evaluation.compare.gains import Gain

_SPLITS = 2000
_NEVER = 0.0  # below every twin's ratio


@dataclass(frozen=True)
class Rule:
    """The rule: experts pay off if the dense twin's ratio of test to training errors is at most `most`.

    Attributes:
        most: The ratio, fitted on all pairs.
        right: Share of pairs with a correctly predicted sign, fitted on other twins; mean over all splits.
        majority: The same for always predicting the most frequent sign of the fitted twins.
        pairs: Number of pairs: those with a learned router and an interval that excludes zero.
        twins: Number of dense twins, each with its own recipe.
    """

    most: float
    right: float
    majority: float
    pairs: int
    twins: int

    def __str__(self) -> str:
        return (
            f"rule: experts gain where the dense twin errs at most {self.most:.1f} times as often on test images as on "
            f"its training images. Fitted on half of the {self.twins} dense twins and tested on the other half "
            f"({_SPLITS:,} random halves), it gets the sign of the gain right in {self.right:.0%} of the pairs; always "
            f"taking the more frequent sign in {self.majority:.0%}. Counted are the {self.pairs} pairs of learned "
            "routers with a 95 % interval that excludes zero"
        )


def fit_rule(found: Sequence[Gain]) -> Rule | None:
    """Fits the rule and tests it on held-out twins; None with fewer than four twins."""
    twins: dict[int, list[Gain]] = {}
    for gain in found:
        if gain.is_certain and gain.is_learned:
            twins.setdefault(id(gain.difference.baseline), []).append(gain)
    if len(twins) < 4:
        return None
    order = list(twins.values())
    draw = random.Random(0)
    right, majority = [], []
    for _ in range(_SPLITS):
        draw.shuffle(order)
        known, held_back = (
            [gain for pairs in part for gain in pairs] for part in (order[: len(order) // 2], order[len(order) // 2 :])
        )
        right.append(_share_right(held_back, _fitted(known)))
        wins = sum(_is_gain(gain) for gain in known)
        majority.append(statistics.fmean(_is_gain(gain) == (2 * wins > len(known)) for gain in held_back))
    pairs = [gain for members in twins.values() for gain in members]
    return Rule(_fitted(pairs), statistics.fmean(right), statistics.fmean(majority), len(pairs), len(twins))


def _fitted(pairs: Sequence[Gain]) -> float:
    """The ratio that predicts the most signs correctly: half-way between two pairs; on a tie the smallest."""
    ratios = sorted({gain.error_ratio for gain in pairs})
    candidates = [_NEVER, *((low + high) / 2 for low, high in pairwise(ratios)), 2 * ratios[-1]]
    return max(candidates, key=lambda most: (_share_right(pairs, most), -most))


def _share_right(pairs: Sequence[Gain], most: float) -> float:
    return statistics.fmean((gain.error_ratio <= most) == _is_gain(gain) for gain in pairs)


def _is_gain(gain: Gain) -> bool:
    return gain.difference.mean > 0
