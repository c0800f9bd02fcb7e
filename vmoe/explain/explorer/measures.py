"""The explorer's measures as functions of small tables, so that each can be checked by hand.

E experts; F values of a feature (classes, positions, colours, ...); R replicates.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.optimize import linear_sum_assignment
from scipy.stats import binomtest
from torch import Tensor

Z95 = 1.959963984540054


class Interval(NamedTuple):
    """An estimate with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def as_dict(self, name: str = "value") -> dict[str, float]:
        """The interval in plain types, with the estimate under `name`."""
        return {name: self.value, "low": self.low, "high": self.high}


def normalised_mutual_information(table: Tensor) -> Tensor:
    """The normalised mutual information of two variables: 0 for independent ones, 1 if each determines the other.

    I(X; Y) / ((H(X) + H(Y)) / 2) of the joint distribution in a table of counts (Strehl & Ghosh 2002, with the
    arithmetic mean as in Vinh et al. 2010, https://jmlr.org/papers/v11/vinh10a.html, table 2). It is 0 if a variable is
    constant.

    Args:
        table: (..., F, E) counts.

    Returns:
        (...,) in [0, 1], float64.
    """
    joint = table.double()
    joint = joint / joint.sum((-2, -1), keepdim=True).clamp_min(1e-300)
    both, rows, columns = (_entropy(part) for part in (joint.flatten(-2), joint.sum(-1), joint.sum(-2)))
    mean = (rows + columns) / 2
    return ((rows + columns - both) / mean.clamp_min(1e-12)).clamp(0, 1) * (mean > 1e-12)


def _entropy(shares: Tensor) -> Tensor:
    return torch.special.entr(shares).sum(-1)


def relative_load(counts: np.ndarray) -> np.ndarray:
    """Each expert's share of the choices relative to the fair 1/E: 1 is fair, 0 is dead. (E,) -> (E,)."""
    return counts * len(counts) / max(counts.sum(), 1e-300)


def coefficient_of_variation(load: np.ndarray) -> float:
    """Standard deviation of the experts' loads over their mean (as in the importance loss of Shazeer et al. 2017,
    https://arxiv.org/abs/1701.06538, equation 6); 0 is perfectly balanced.
    """
    return float(load.std() / max(load.mean(), 1e-300))


def class_log_ratio(counts: np.ndarray, prior_patches: float) -> np.ndarray:
    """ln(P(class | expert) / P(class)) from a table of choices (E, C), shrunk towards 0 for experts with few choices.

    It adds s = `prior_patches` choices with the overall distribution to each expert: ln((n_ec + s p_c) / ((n_e + s)
    p_c)). This is about the weight of one image, since patches of one image are not independent. 0 for classes without
    images.
    """
    of_class = counts.sum(0) / max(counts.sum(), 1e-300)
    seen = of_class > 0
    share = (counts + prior_patches * of_class) / (counts.sum(1, keepdims=True) + prior_patches)
    ratio = np.ones_like(share)
    np.divide(share, of_class, out=ratio, where=seen[None])
    return np.log(ratio)


def clustered_order(columns: np.ndarray) -> list[int]:
    """An order of the columns of a matrix (E, C) that puts similar ones side by side.

    It uses average linkage with optimal leaf ordering (Bar-Joseph et al. 2001).
    """
    if columns.shape[1] < 3:
        return list(range(columns.shape[1]))
    return leaves_list(linkage(columns.T, "average", optimal_ordering=True)).tolist()


def coactivation(together: np.ndarray, tokens: float, top_k: int | None) -> np.ndarray:
    """The frequency of two experts taking the same token, relative to chance: 1 is chance.

    For expert choice and Soft MoE chance is P(e) P(e'). With token choice a token's K experts are distinct, so two
    experts meet less often: chance is P(e) P(e') (K - 1) E / (K (E - 1)), which is exact for fair loads.

    Args:
        together: (E, E) sum over tokens of both experts' joint load; the diagonal holds each expert's own load.
        tokens: Number of tokens.
        top_k: K; None for expert choice and Soft MoE.

    Returns:
        (E, E); NaN on the diagonal and for experts without tokens; else 0 if K = 1.
    """
    experts = len(together)
    share = np.diag(together) / max(tokens, 1)
    chance = np.outer(share, share)
    if top_k is not None:
        chance = chance * (top_k - 1) * experts / (top_k * max(experts - 1, 1))
    never = np.outer(share, share) == 0
    if top_k == 1:
        ratio = np.zeros_like(chance)
    else:
        ratio = np.divide(together / max(tokens, 1), chance, out=np.zeros_like(chance), where=chance > 0)
    return np.where(never | np.eye(experts, dtype=bool), math.nan, ratio)


def wilson(successes: int, trials: int) -> Interval:
    """A share with Wilson's interval (1927)."""
    low, high = binomtest(int(successes), trials).proportion_ci(method="wilson")
    return Interval(successes / trials, float(low), float(high))


def paired_change(gained: int, lost: int, trials: int) -> Interval:
    """The change of accuracy on the same images, of which `gained` became right and `lost` wrong.

    The interval is Agresti & Min's (2005, https://doi.org/10.1002/sim.1781): Wald's with half an image added to each of
    the four cells. So it has a width even if no prediction changed. SciPy has no interval for paired shares.
    """
    n = trials + 2
    up, down = (gained + 0.5) / n, (lost + 0.5) / n
    half = Z95 * math.sqrt(max(up + down - (up - down) ** 2, 0) / n)
    return Interval((gained - lost) / trials, max(-1.0, up - down - half), min(1.0, up - down + half))


def mean_interval(values: np.ndarray) -> Interval:
    """The mean of independent values (n,) with its normal interval."""
    half = Z95 * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Interval(float(values.mean()), float(values.mean() - half), float(values.mean() + half))


def matched_agreement(table: np.ndarray) -> float:
    """The share of patches on which two routers agree, with the best one-to-one pairing of experts.

    The Hungarian method (Kuhn 1955) finds the pairing.

    Args:
        table: (E, E') patches by first choice of one and of the other router.
    """
    pairs = linear_sum_assignment(table, maximize=True)
    return float(table[pairs].sum() / max(table.sum(), 1))
