"""Calibrates a trained model: temperature scaling, and conformal sets of classes with a given coverage.

n images, C classes.
"""

from collections.abc import Iterable
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmoe.checkpoints import TrainedModel
from vmoe.checkpoints.calibration import calibration_of, class_sets, least_probability
from vmoe.checkpoints.trained import evaluating
from vmoe.data import DataConfig
from vmoe.errors import UserError
from vmoe.evaluation.evaluate import classes_differ, data_for, open_data, require_same_labels
from vmoe.evaluation.metrics import CALIBRATION_BINS, RunningMetrics
from vmoe.models.members import refuse_ensemble
from vmoe.progress import Progress, shown

COVERAGES = (0.8, 0.9, 0.95)  # coverages that are measured on the test set
_SMALLEST_TEMPERATURE, _LARGEST_TEMPERATURE = 0.05, 20.0
_LARGEST_THRESHOLD = 15.0  # as a logit: float32 sigmoids of more are 1


def calibrate(
    model: TrainedModel,
    data: str | PathLike[str] | DataConfig | None = None,
    *,
    root: str | PathLike[str] | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    progress: Progress = True,
) -> dict[str, Any]:
    """Calibrates a model, in place, on the validation images, and measures the effect on the test images.

    A random half of the validation images (by the run's seed) fits the temperature that minimises the negative
    log-likelihood (Guo et al. 2017, arXiv 1706.04599, section 4.2). The classifier's weights are divided by it, so all
    logits are calibrated, and the most probable class stays the same. The other half gives the least probability of
    classes in the sets of `Predictions.sets`. `vmoe.save` keeps both. Further training drops the calibration.

    Of several classes per image all images for validation fit the temperature, by binary cross-entropy. The thresholds
    move with the probabilities, so that every image keeps its classes. Such a model has no sets.

    Args:
        model: Made by `vmoe.load`.
        data: As for `vmoe.evaluate`. None takes the set that the model was trained on.
        root: The path of the data. None takes the run's.
        batch_size: Images per batch. None takes the run's.
        workers: Number of loading processes. None takes the run's.
        progress: As for `vmoe.evaluate`.

    Returns:
        Plain types: `temperature`; `images`, the number of images of its fit; `at_bound`, whether the temperature is
        the smallest or the largest one that is allowed, which these images do not tell from one beyond; and from the
        test set `before` and `after`, each with `nll` (of several classes `bce`) and `ece`, and `sets` with the wanted
        `coverage`, the measured one `found`, and `classes`, the mean size of the sets.

    Raises:
        UserError: There are no images for validation, their classes are not the model's, or its classifier cannot be
            scaled.
    """
    if not isinstance(model, TrainedModel):
        raise UserError(f"model: a {type(model).__name__} does not know its classes; vmoe.load opens one that does")
    refuse_ensemble(model, f"{model.path}: a temperature divides the logits of one member")
    opened, _ = open_data(model, data_for(model, data, root, eval_batch_size=batch_size, workers=workers))
    require_same_labels(model, opened)
    if list(opened.class_names) != model.class_names:
        raise UserError(f"{classes_differ(model, opened)}; calibration needs the same classes in the same order")
    if not opened.has_validation:
        raise UserError("data.val_fraction=0: there are no images for validation, by which a model is calibrated")
    with evaluating(model):
        logits, labels = _logits(model, shown(opened.val_dataloader(), "calibrating", progress))
        tested, of_test = _logits(model, shown(opened.test_dataloader(), "testing", progress))
    if len(labels) < 2:
        raise UserError(f"data: {len(labels)} image for validation is too few to calibrate by; two are the least")
    if model.multi_label:
        thresholds = torch.tensor(model.thresholds or [0.5] * len(model.class_names), dtype=torch.float64).logit()
        # a smaller temperature would move a threshold to where all larger probabilities are 1
        smallest = min(max(_SMALLEST_TEMPERATURE, float(thresholds.max()) / _LARGEST_THRESHOLD), 1.0)
        temperature = fit_temperature(logits, labels, smallest)
        divide_classifier(model, temperature)
        model.thresholds = (thresholds / temperature).sigmoid().tolist()
        return {
            "temperature": temperature,
            "images": len(labels),
            "at_bound": temperature in (smallest, _LARGEST_TEMPERATURE),
            **_before_and_after(tested, of_test, temperature),
        }
    order = torch.from_numpy(np.random.default_rng(model.config.get("seed", 0)).permutation(len(labels)))
    fit, others = order[: len(order) // 2], order[len(order) // 2 :]
    temperature = fit_temperature(logits[fit], labels[fit])
    divide_classifier(model, temperature)
    right = (logits[others] / temperature).softmax(-1).gather(1, labels[others, None])[:, 0]
    model.calibration = calibration_of(temperature, len(fit), right.numpy())
    return {
        "temperature": temperature,
        "images": len(fit),
        "at_bound": temperature in (_SMALLEST_TEMPERATURE, _LARGEST_TEMPERATURE),
        **_before_and_after(tested, of_test, temperature),
        "sets": _measured_sets(model.calibration, (tested / temperature).softmax(-1).numpy(), of_test.numpy()),
    }


def fit_temperature(logits: Tensor, labels: Tensor, smallest: float = _SMALLEST_TEMPERATURE) -> float:
    """The temperature with the smallest negative log-likelihood, from `smallest` to 20.

    Args:
        logits: (n, C) float64.
        labels: (n,) int64, or (n, C) of 0 and 1 of several classes.
        smallest: The smallest temperature.
    """
    from scipy.optimize import minimize_scalar

    def loss(temperature: float) -> float:
        return float(_cross_entropy(logits / temperature, labels))

    bounds = (float(np.log(smallest)), float(np.log(_LARGEST_TEMPERATURE)))
    # the loss is convex in 1/T, so it has one minimum
    found = minimize_scalar(lambda each: loss(np.exp(each)), bounds=bounds, method="bounded", options={"xatol": 1e-6})
    # a bound comes first: where all answers are right, many temperatures have a loss of 0
    return min(smallest, _LARGEST_TEMPERATURE, float(np.exp(found.x)), key=loss)


@torch.no_grad()
def divide_classifier(model: TrainedModel, temperature: float) -> None:
    """Divides a model's logits by a temperature, through the weights of its classifier.

    Raises:
        UserError: The logits do not come from the model's classifier (timm's `get_classifier`). Then nothing changes.
    """
    found = model.get_classifier() if hasattr(model, "get_classifier") else None
    heads = [head for head in (found if isinstance(found, tuple) else (found,)) if isinstance(head, nn.Module)]
    parameters = [each for head in heads for each in head.parameters()]
    height, width = model.image_size if isinstance(model.image_size, tuple) else (model.image_size,) * 2
    drawn = torch.randn(2, len(model.mean), height, width, generator=torch.Generator().manual_seed(0))
    images = drawn.to(model.device, next(model.parameters()).dtype)
    was_training, before = model.training, [each.clone() for each in parameters]
    nn.Module.train(model, False)
    expected = model(images).float() / temperature
    for each in parameters:
        each.div_(temperature)
    found_logits = model(images).float()
    nn.Module.train(model, was_training)
    if not torch.allclose(found_logits, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        for each, old in zip(parameters, before, strict=True):
            each.copy_(old)
        raise UserError(f"{model.path}: the logits of {type(model).__name__} cannot be scaled by its classifier")


@torch.inference_mode()
def _logits(model: nn.Module, batches: Iterable) -> tuple[Tensor, Tensor]:
    """The logits (n, C), float64, and the labels (n,) of batches of (images, labels, ...), on the CPU."""
    device = next(model.parameters()).device
    found = [(model(images.to(device)).float().cpu(), labels.cpu()) for images, labels, *_ in batches]
    if not found:
        raise UserError("data: a split holds no images; choose another set")
    logits, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    return logits.double(), labels


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean, (); of several classes the binary one."""
    if labels.dim() == 2:
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return F.cross_entropy(logits, labels)


def _before_and_after(logits: Tensor, labels: Tensor, temperature: float) -> dict[str, dict[str, float]]:
    return {"before": _errors(logits, labels), "after": _errors(logits / temperature, labels)}


def _errors(logits: Tensor, labels: Tensor) -> dict[str, float]:
    if labels.dim() == 2:
        from torchmetrics.functional.classification import binary_calibration_error  # as in `RunningMetrics`

        error = binary_calibration_error(logits.sigmoid().flatten(), labels.flatten().long(), CALIBRATION_BINS)
        return {"bce": float(_cross_entropy(logits, labels)), "ece": float(error)}
    metrics = RunningMetrics(logits.shape[1])
    metrics.update(logits, labels)
    measured = metrics.compute()
    return {name: measured[name] for name in ("nll", "ece")}


def _measured_sets(
    calibration: dict[str, Any], probabilities: np.ndarray, labels: np.ndarray
) -> list[dict[str, float]]:
    """The share of sets that hold the right class, and their mean size, for each of `COVERAGES` that is possible."""
    measured = []
    for coverage in COVERAGES:
        try:
            sets = class_sets(probabilities, least_probability(calibration, coverage))
        except UserError:  # too few images for this coverage
            continue
        found = float(sets[np.arange(len(labels)), labels].mean())
        measured.append({"coverage": coverage, "found": found, "classes": float(sets.sum(-1).mean())})
    return measured
