"""The figures of a classifier and their sums on the device, batch by batch, in training and evaluation.

Axis letters: B images, C classes.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vmoe.errors import UserError
from vmoe.evaluation.curves import Ranking, Scores, mean_of_known
from vmoe.evaluation.ensemble import MemberFigures
from vmoe.evaluation.guidance import RouterFigures

CALIBRATION_BINS = 15
MOST_CONFUSED = 1000  # the most classes with a confusion matrix: with 10,000 it would take a gigabyte


@dataclass(frozen=True)
class LayerUse:
    """An MoE layer's drops and load over all images."""

    dropped: float  # share of the choices that were dropped
    load: list[float]  # (E,) share of the choices routed to each expert, before drops, relative to the fair 1/E


@dataclass(frozen=True)
class Evaluation:
    """The figures of one evaluation on a set. Shares and accuracies are fractions."""

    images: int
    capacity_factor: float | None  # of the MoE layers at evaluation; None without drops or MoE layers
    top_k: int | None  # K of the MoE layers; None if tokens do not choose
    top1: float
    top5: float  # top-C where there are fewer than 5 classes
    nll: float  # mean negative log-likelihood, nats
    ece: float  # expected calibration error, 15 bins
    brier: float  # mean over the images of the squared distance of the probabilities from the right class, 0 to 2
    class_accuracy: list[float | None]  # (C,) top-1 of each class, its recall; None for a class without images
    class_precision: list[float | None]  # (C,) share of right predictions; None for a class never predicted
    class_f1: list[float | None]  # (C,) harmonic mean of the two; None for a class without images
    balanced_accuracy: float  # mean of class_accuracy, over the classes with images
    f1: float  # mean of class_f1 (macro F1), over the classes with images
    confusion: list[list[int]] | None  # (C, C) images by true class (row) and predicted one; None over 1,000 classes
    images_per_second: float | None  # without the first batch, loading included; None when there was one batch only
    dropped: float | None  # share of the choices of all MoE layers; None for a dense model
    layers: dict[str, LayerUse]
    # ranking figures, one class against all others (see `vmoe.evaluation.curves.Ranking`); None if not measured
    class_auroc: list[float | None] | None = None  # (C,) area under the ROC curve
    class_average_precision: list[float | None] | None = None  # (C,) area under the curve of precision over recall
    class_precision_at_recall: list[list[float] | None] | None = None  # (C, 21) at a recall of 0, 0.05, ..., 1
    auroc: float | None = None  # mean of class_auroc
    average_precision: float | None = None  # mean of class_average_precision, mAP
    members: MemberFigures | None = None  # of an ensemble; None for a single model, or with only some of its classes
    router: RouterFigures | None = None  # of routers that were guided towards super-classes; None for other models

    def as_dict(self) -> dict:
        """The same as plain types, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class MultiLabelEvaluation:
    """The figures of one evaluation with several classes per image, or none. Shares are fractions.

    The thresholds decide whether an image has a class. The ranking figures are as in `Evaluation`.
    """

    images: int
    capacity_factor: float | None
    top_k: int | None
    average_precision: float | None  # mAP, mean of class_average_precision
    f1_micro: float  # of all labels of all images together
    f1_macro: float  # mean of class_f1, over the classes with images
    exact_match: float  # share of images with all labels right
    auroc: float | None  # mean of class_auroc
    bce: float  # mean binary cross-entropy, nats
    thresholds: list[float]  # (C,) of the probability of a class
    class_images: list[int]  # (C,)
    class_precision: list[float | None]  # (C,) None for a class that is never predicted
    class_recall: list[float | None]  # (C,) None for a class without images
    class_f1: list[float | None]  # (C,) None for a class without images
    class_auroc: list[float | None] | None
    class_average_precision: list[float | None] | None
    class_precision_at_recall: list[list[float] | None] | None
    images_per_second: float | None
    dropped: float | None
    layers: dict[str, LayerUse]

    def as_dict(self) -> dict:
        """The same as plain types, for JSON."""
        return asdict(self)


class Means(NamedTuple):
    """Means over images, for training's logs per epoch and for evaluation."""

    loss: float  # cross-entropy, nats
    top1: float
    top5: float  # top-C where there are fewer than 5 classes


def sums_on(device: torch.device | str) -> Tensor:
    """(4,) zeros on a device, to which `batch_sums` are added."""
    # Doubles keep sums over a million images exact to the digits shown. Apple's GPUs have no doubles.
    dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
    return torch.zeros(4, dtype=dtype, device=device)


def likeliest_classes(logits: Tensor) -> Tensor:
    """(B, 5) the most probable classes for logits (B, C), best first; (B, C) with fewer than 5 classes."""
    return logits.detach().topk(min(5, logits.shape[1]), dim=1).indices


def batch_sums(likeliest: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
    """Sums over a batch: loss, right predictions, right classes among the top 5, images.

    It does not synchronise with the device, so a CUDA graph may hold it.

    Args:
        likeliest: (B, 5), by `likeliest_classes`.
        labels: (B,) int64.
        loss: () mean over the batch.

    Returns:
        (4,) float32.
    """
    hits = likeliest == labels[:, None]
    loss = loss.detach().float()
    images = torch.full_like(loss, len(labels))
    return torch.stack([loss * images, hits[:, 0].sum().to(loss), hits.sum().to(loss), images])


def multi_label_sums(logits: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
    """Sums over a batch with several classes per image, of which the second over the third is the micro F1.

    They are: loss, twice the number of right positive labels (logit above 0), number of predicted plus number of true
    labels, images.

    Args:
        logits: (B, C).
        labels: (B, C) of 0 and 1.
        loss: () mean over the batch.

    Returns:
        (4,) float32.
    """
    found, there = logits.detach() > 0, labels > 0
    loss = loss.detach().float()
    images = torch.full_like(loss, len(labels))
    both = (found & there).sum().to(loss)
    return torch.stack([loss * images, 2 * both, found.sum().to(loss) + there.sum().to(loss), images])


def means_of(sums: Tensor) -> Means:
    """The means from (4,) sums of `batch_sums`; NaN without images."""
    *totals, images = sums.tolist()
    return Means(*(total / images if images else math.nan for total in totals))


class RunningMultiLabelMetrics:
    """The figures with several classes per image, accumulated on the device batch by batch.

    Memory grows with the set, since all scores are kept, up to `MOST_SCORES`.

    Args:
        num_classes: C.
        device: The device of the logits.
        thresholds: (C,) thresholds of the probabilities; None means 0.5 for all.
    """

    record = MultiLabelEvaluation

    def __init__(
        self, num_classes: int, device: torch.device | str = "cpu", thresholds: Sequence[float] | None = None
    ) -> None:
        from torchmetrics.classification import MultilabelExactMatch, MultilabelStatScores  # as in `RunningMetrics`

        self.thresholds = torch.tensor(thresholds or [0.5] * num_classes, device=device)
        self.counts = MultilabelStatScores(num_classes, average=None, validate_args=False).to(device)
        self.exact = MultilabelExactMatch(num_classes, validate_args=False).to(device)
        self.sums = sums_on(device)
        self.scores = Scores()

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds one batch: logits (B, C), labels (B, C) of 0 and 1."""
        logits, there = logits.float(), labels.long()
        probabilities = logits.sigmoid()
        found = (probabilities >= self.thresholds).long()
        self.sums += multi_label_sums(logits, there, F.binary_cross_entropy_with_logits(logits, there.float()))
        self.counts.update(found, there)
        self.exact.update(found, there)
        self.scores.update(probabilities, labels)

    def compute(self) -> dict:
        """The figures so far, under the names of `MultiLabelEvaluation`'s fields.

        Raises:
            UserError: No image was seen, or a logit was not finite.
        """
        loss, images = means_of(self.sums).loss, int(self.sums[-1])
        _require_finite(images, loss)
        right, wrong, _, missed, there = self.counts.compute().reshape(-1, 5).T.tolist()
        f1 = [2 * r / (2 * r + w + m) if n else None for r, w, m, n in zip(right, wrong, missed, there, strict=True)]
        all_marks = 2 * sum(right) + sum(wrong) + sum(missed)
        return {
            "images": images,
            "f1_micro": 2 * sum(right) / all_marks if all_marks else 0.0,
            "f1_macro": mean_of_known(f1) or 0.0,
            "exact_match": float(self.exact.compute()),
            "bce": loss,
            "thresholds": [round(value, 6) for value in self.thresholds.tolist()],
            "class_images": there,
            "class_precision": _class_shares(right, [r + w for r, w in zip(right, wrong, strict=True)]),
            "class_recall": _class_shares(right, there),
            "class_f1": f1,
            **_ranking_figures(self.scores),
        }


class RunningMetrics:
    """Classification figures, accumulated on the device batch by batch.

    Memory depends only on the number of classes. With `ranks_images` it grows with the set: all scores are kept, up to
    `MOST_SCORES`.

    The expected calibration error is Guo et al. 2017's (https://arxiv.org/abs/1706.04599, equation 5): bins of equal
    width over the largest probability, (m - 1) / M < p <= m / M.
    """

    record = Evaluation

    def __init__(self, num_classes: int, device: torch.device | str = "cpu", ranks_images: bool = False) -> None:
        # imported here: it takes seconds, and drawing and exploring do not need it
        from torchmetrics.classification import MulticlassConfusionMatrix

        self.num_classes = num_classes
        self.confusion = None
        if num_classes <= MOST_CONFUSED:
            self.confusion = MulticlassConfusionMatrix(num_classes, validate_args=False).to(device)
        self.of_class = torch.zeros(3, num_classes, dtype=torch.int64, device=device)  # images, correct, predicted
        self.sums = sums_on(device)
        self.scores = Scores() if ranks_images else None
        self.bins = torch.zeros(2, CALIBRATION_BINS, dtype=self.sums.dtype, device=device)  # confidence, correct
        self.brier = self.sums.new_zeros(())

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds one batch: logits (B, C), labels (B,) int64."""
        logits = logits.float()
        likeliest = likeliest_classes(logits)
        probabilities = logits.softmax(-1)
        predicted, confidence = likeliest[:, 0], probabilities.amax(-1)
        if self.scores is not None:
            self.scores.update(probabilities, labels)
        self.sums += batch_sums(likeliest, labels, F.cross_entropy(logits, labels))
        # |p|^2 - 2 p_label + 1 is the squared distance from the one-hot label
        right = probabilities.gather(1, labels[:, None])
        self.brier += (probabilities.square().sum(1, keepdim=True) - 2 * right + 1).sum().to(self.sums)
        if self.confusion is not None:
            self.confusion.update(predicted, labels)
        self.of_class[0].index_add_(0, labels, torch.ones_like(labels))
        self.of_class[1].index_add_(0, labels, (predicted == labels).to(labels))
        self.of_class[2].index_add_(0, predicted, torch.ones_like(predicted))
        # clamped above for NaN, which gives an invalid bin; compute() then refuses the whole set
        bin_index = (confidence * CALIBRATION_BINS).ceil().nan_to_num().long().sub(1).clamp(0, CALIBRATION_BINS - 1)
        self.bins[0].index_add_(0, bin_index, confidence.to(self.bins))
        self.bins[1].index_add_(0, bin_index, (predicted == labels).to(self.bins))

    def compute(self) -> dict:
        """The figures so far, under the names of `Evaluation`'s fields.

        Raises:
            UserError: No image was seen, or a logit was not finite.
        """
        there, correct, predicted = self.of_class.tolist()
        images, means = sum(there), means_of(self.sums)
        _require_finite(images, means.loss)
        recalls = [right / of for right, of in zip(correct, there, strict=True) if of]
        f1 = [2 * c / (n + p) if n else None for c, n, p in zip(correct, there, predicted, strict=True)]
        return {
            "images": images,
            "top1": means.top1,
            "top5": means.top5,
            "nll": means.loss,
            "ece": float((self.bins[0] - self.bins[1]).abs().sum()) / images,
            "brier": float(self.brier) / images,
            "class_accuracy": _class_shares(correct, there),
            "class_precision": _class_shares(correct, predicted),
            "class_f1": f1,
            "balanced_accuracy": sum(recalls) / len(recalls),
            "f1": sum(each for each in f1 if each is not None) / len(recalls),
            "confusion": self._matrix(),
            **({} if self.scores is None else _ranking_figures(self.scores)),
        }

    def _matrix(self) -> list[list[int]] | None:
        if self.confusion is None:
            return None
        size = (self.num_classes, self.num_classes)
        return self.confusion.compute().reshape(size).tolist()  # for a single class torchmetrics returns a scalar


def _require_finite(images: int, loss: float) -> None:
    if images == 0:
        raise UserError("data: this split holds no images; choose another split or another data set")
    if not math.isfinite(loss):
        raise UserError("CKPT: the model gives logits that are not finite; its training probably diverged")


def _ranking_figures(scores: Scores) -> dict:
    """The ranking figures and their means, by name; all None if there are too many scores."""
    ranking = scores.ranking()
    if ranking is None:
        names = [*(field.name for field in fields(Ranking)), "auroc", "average_precision"]
        return dict.fromkeys(names)
    means = {
        "auroc": mean_of_known(ranking.class_auroc),
        "average_precision": mean_of_known(ranking.class_average_precision),
    }
    return asdict(ranking) | means


def _class_shares(parts: Sequence[int], wholes: Sequence[int]) -> list[float | None]:
    return [part / whole if whole else None for part, whole in zip(parts, wholes, strict=True)]
