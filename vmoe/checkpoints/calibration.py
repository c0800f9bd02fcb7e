"""The calibration of a trained model, as its file stores it, and sets of classes with a given coverage."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vmoe.errors import UserError

_STEPS = 1000  # the most steps of coverage that a file stores


def calibration_of(temperature: float, images: int, true_probabilities: np.ndarray) -> dict[str, Any]:
    """The calibration in plain types, for a file.

    Args:
        temperature: The number by which the classifier's logits were divided.
        images: The number of images from which it was fitted.
        true_probabilities: (n,) the probability of the right class of n images outside the fit.
    """
    ordered = np.sort(true_probabilities)
    steps = min(len(ordered) + 1, _STEPS)
    places = [(len(ordered) + 1) * step // steps - 1 for step in range(1, steps)]
    return {"temperature": temperature, "images": images, "least_probabilities": ordered[places].tolist()}


def least_probability(calibration: dict[str, Any], coverage: float) -> float:
    """The least probability of classes in a set, such that sets hold the right class with probability `coverage`.

    This is split conformal prediction (Angelopoulos & Bates 2021, arXiv 2107.07511, section 1). A score is 1 minus the
    probability of the right class. The ceil((n + 1) coverage)-th smallest score of n images is the bound.

    Raises:
        UserError: The coverage is no probability, or higher than the number of images allows.
    """
    kept = calibration["least_probabilities"]
    if not 0 < coverage < 1:
        raise UserError(f"coverage={coverage:g}: must be between 0 and 1, such as 0.9")
    steps = len(kept) + 1
    step = math.floor(steps * (1 - coverage) + 1e-9)
    if step < 1:
        raise UserError(f"coverage={coverage:g}: must be at most {1 - 1 / steps:.4g} with so few images of calibration")
    return kept[min(step, len(kept)) - 1]


def class_sets(probabilities: np.ndarray, least: float) -> np.ndarray:
    """(N, classes) bool: the classes of at least this probability, and always the most probable one."""
    chosen = probabilities >= least
    chosen[np.arange(len(chosen)), probabilities.argmax(-1)] = True
    return chosen


def is_calibration(value: Any) -> bool:
    """Whether a file's entry has the form that `calibration_of` writes, or is None."""
    if value is None:
        return True
    if not isinstance(value, dict) or not {"temperature", "images", "least_probabilities"} <= value.keys():
        return False
    kept = value["least_probabilities"]
    numbers = [value["temperature"], value["images"], *(kept if isinstance(kept, list) else [None])]
    return all(type(each) in (int, float) and math.isfinite(each) for each in numbers) and _is_rising(kept)


def _is_rising(values: Sequence[float]) -> bool:
    ordered = zip([0, *values], [*values, 1], strict=True)
    return len(values) > 0 and all(first <= second for first, second in ordered)
