"""Ranking figures of each class's scores: the area under the ROC curve, and precision over recall.

N images, C classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MOST_SCORES = 100_000_000  # the most scores (N * C) to keep, 400 MB: 100,000 images of 1,000 classes
RECALLS = [step / 20 for step in range(21)]  # the recalls of `class_precision_at_recall`


@dataclass(frozen=True)
class Ranking:
    """The figures of each class, (C,), against all others; None for a class that all images have, or no image."""

    class_auroc: list[float | None]
    class_average_precision: list[float | None]
    class_precision_at_recall: list[list[float] | None]  # at `RECALLS`, the best precision at this recall or a higher


class Scores:
    """All scores of classes for images, on the device; none if there are more than `MOST_SCORES`."""

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, Tensor]] | None = []
        self._count = 0

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Adds a batch: scores (B, C) in [0, 1], and labels (B,) int64 or (B, C) of 0 and 1."""
        self._count += scores.numel()
        if self._count > MOST_SCORES:
            self._batches = None
        if self._batches is not None:
            self._batches.append((scores, labels))

    def on_host(self) -> tuple[Tensor, Tensor]:
        """All scores and labels on the CPU, without images that another rank counts; empty if there are too many."""
        if not self._batches:
            return torch.empty(0, 0), torch.empty(0, 0)
        scores, labels = (torch.cat(each).cpu() for each in zip(*self._batches, strict=True))
        is_counted = (labels if labels.dim() == 1 else labels[:, 0]) >= 0
        return scores[is_counted], labels[is_counted]

    def labelled(self) -> tuple[Tensor, Tensor] | None:
        """All scores (N, C) and labels; None if there are too many."""
        if not self._batches:
            return None
        first, second = zip(*((scores, labels) for scores, labels in self._batches if scores.numel()), strict=True)
        return torch.cat(first), torch.cat(second)

    def ranking(self) -> Ranking | None:
        """The figures over all batches; None if there are too many scores."""
        found = self.labelled()
        if found is None:
            return None
        scores, labels = found
        figures = [_of_class(scores[:, index], _is_positive(labels, index)) for index in range(scores.shape[1])]
        return Ranking(*([list(each) for each in zip(*figures, strict=True)]))


def best_thresholds(scores: Tensor, labels: Tensor) -> list[float]:
    """The threshold per class with the best F1; 0.5 for a class without images.

    It is half-way between the lowest score above it and the highest score below it.

    Args:
        scores: (N, C) in [0, 1].
        labels: (N, C) of 0 and 1.
    """
    from torchmetrics.functional.classification import binary_precision_recall_curve

    found = []
    for index in range(scores.shape[1]):
        is_class = _is_positive(labels, index)
        if is_class.sum() == 0:
            found.append(0.5)
            continue
        precision, recall, thresholds = binary_precision_recall_curve(scores[:, index], is_class, validate_args=False)
        f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
        best = int(f1[:-1].argmax())  # thresholds ascend
        found.append(float(thresholds[max(best - 1, 0) : best + 1].mean()))
    return found


def mean_of_known(values: list[float | None]) -> float | None:
    """The mean over the classes with a value, or None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _is_positive(labels: Tensor, index: int) -> Tensor:
    return (labels == index if labels.dim() == 1 else labels[:, index] > 0).long()


def _of_class(scores: Tensor, is_class: Tensor) -> tuple[float, float, list[float]] | tuple[None, None, None]:
    """The area under the ROC curve, the average precision, and the precision at `RECALLS`, from (N,) scores."""
    # Imported here: it takes seconds
    from torchmetrics.functional.classification import binary_auroc, binary_precision_recall_curve

    if is_class.sum() in (0, len(is_class)):
        return None, None, None
    precision, recall, _ = binary_precision_recall_curve(scores, is_class, validate_args=False)  # recall descends
    average = ((recall[:-1] - recall[1:]) * precision[:-1]).sum()
    best = precision.cummax(0).values  # the best of this and of all higher recalls, which come first
    at = torch.tensor(RECALLS, device=recall.device, dtype=recall.dtype)
    last = (recall[None] >= at[:, None] - 1e-6).sum(1) - 1  # the point with the lowest recall that is high enough
    area = binary_auroc(scores, is_class, validate_args=False)
    return float(area), float(average), [round(value, 6) for value in best[last].tolist()]
