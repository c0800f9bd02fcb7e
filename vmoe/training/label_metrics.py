"""The metrics of training and evaluation, for images of one class each and for images of several.

B images, C classes.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from vmoe.data.sharing import NOT_COUNTED
from vmoe.evaluation.curves import Ranking, Scores, best_thresholds, mean_of_known
from vmoe.evaluation.guidance import Guidance
from vmoe.evaluation.metrics import batch_sums, likeliest_classes, means_of, multi_label_sums
from vmoe.training.parallel.collectives import gather


class LabelMetrics(ABC):
    """Sums over batches, (4,), and their means by name. The last sum counts the images. The host reads sums only to log
    them.

    Attributes:
        train_names: The names of the means in training.
        names: The names of the means in evaluation.
        monitored: The mean by which the best checkpoint is chosen.
    """

    train_names: tuple[str, ...]
    names: tuple[str, ...]
    monitored: str

    @abstractmethod
    def begin(self) -> None:
        """Starts an evaluation."""

    @abstractmethod
    def train_sums(self, logits: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
        """The sums of a training batch, from logits (B, C), labels and the mean loss ()."""

    @abstractmethod
    def evaluation_sums(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The sums of a batch in evaluation."""

    @abstractmethod
    def train_means(self, sums: Tensor) -> dict[str, float]:
        """The means by `train_names`, from the sums of all ranks."""

    @abstractmethod
    def means(self, sums: Tensor) -> dict[str, float]:
        """The means by `names`, from the sums of all ranks. All ranks must call it."""


class SingleLabelMetrics(LabelMetrics):
    """Cross-entropy, top-1 and top-5 accuracy; labels are (B,) int64."""

    train_names = ("loss", "top1")
    names = ("loss", "top1", "top5")
    monitored = "top1"

    def begin(self) -> None:
        pass

    def train_sums(self, logits: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
        return batch_sums(likeliest_classes(logits), labels, loss)

    def evaluation_sums(self, logits: Tensor, labels: Tensor) -> Tensor:
        is_counted = labels != NOT_COUNTED
        labels = labels.clamp(min=0)
        sums = batch_sums(likeliest_classes(logits), labels, F.cross_entropy(logits, labels))
        return sums * is_counted[0]  # either all images of a batch count, or none

    def train_means(self, sums: Tensor) -> dict[str, float]:
        means = means_of(sums)
        return {"loss": means.loss, "top1": means.top1}

    def means(self, sums: Tensor) -> dict[str, float]:
        return means_of(sums)._asdict()


class GuidedMetrics(SingleLabelMetrics):
    """Also the loss of the guided routers, and how often they find the super-class of an image. Sums are (6,)."""

    train_names = (*SingleLabelMetrics.train_names, "router_loss", "router_top1")
    names = (*SingleLabelMetrics.names, "router_loss", "router_top1")

    def __init__(self, guidance: Guidance) -> None:
        self._guidance = guidance

    def train_sums(self, logits: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
        return self._beside(super().train_sums(logits, labels, loss))

    def evaluation_sums(self, logits: Tensor, labels: Tensor) -> Tensor:
        self._guidance.loss(labels.clamp(min=0))
        return self._beside(super().evaluation_sums(logits, labels), labels[0] != NOT_COUNTED)

    def train_means(self, sums: Tensor) -> dict[str, float]:
        return super().train_means(sums[2:]) | self._of_routers(sums)

    def means(self, sums: Tensor) -> dict[str, float]:
        return super().means(sums[2:]) | self._of_routers(sums)

    def _beside(self, sums: Tensor, is_counted: Tensor | int = 1) -> Tensor:
        return torch.cat([self._guidance.sums.to(sums) * is_counted, sums])  # the images stay last

    def _of_routers(self, sums: Tensor) -> dict[str, float]:
        loss, right, *_, images = sums.tolist()
        means = [each / images if images else math.nan for each in (loss, right)]
        return dict(zip(("router_loss", "router_top1"), means, strict=True))


class MultiLabelMetrics(LabelMetrics):
    """Binary cross-entropy, mean average precision and micro F1 at a probability of 0.5; labels are (B, C) of 0 and 1.

    The mean average precision needs all scores of an evaluation, so they are kept until the next one starts.
    """

    train_names = ("loss", "f1")
    names = ("loss", "mAP", "f1")
    monitored = "mAP"

    def __init__(self) -> None:
        self._scores = Scores()
        self._ranking: Ranking | None = None
        self._labelled: tuple[Tensor, Tensor] | None = None

    def train_sums(self, logits: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
        return multi_label_sums(logits, labels, loss)

    def evaluation_sums(self, logits: Tensor, labels: Tensor) -> Tensor:
        self._scores.update(logits.detach().float().sigmoid(), labels)
        is_counted = labels[0, 0] != NOT_COUNTED
        labels = labels.clamp(min=0)
        loss = F.binary_cross_entropy_with_logits(logits.float(), labels.float())
        return multi_label_sums(logits, labels, loss) * is_counted

    def train_means(self, sums: Tensor) -> dict[str, float]:
        loss, hits, marks, images = sums.tolist()
        return {"loss": loss / images if images else math.nan, "f1": hits / marks if marks else 0.0}

    def means(self, sums: Tensor) -> dict[str, float]:
        ranking = self._of_all_ranks()
        found = self.train_means(sums)
        return {"loss": found["loss"], "mAP": mean_of_known(ranking.class_average_precision) or 0.0, "f1": found["f1"]}

    def begin(self) -> None:
        self._scores, self._ranking, self._labelled = Scores(), None, None

    def thresholds(self) -> list[float]:
        """The threshold per class with the best F1 in the last evaluation. All ranks must call it after `means`."""
        self._of_all_ranks()
        assert self._labelled is not None
        return best_thresholds(*self._labelled)

    def _of_all_ranks(self) -> Ranking:
        if self._ranking is None:
            everybody = Scores()
            for scores, labels in gather(self._scores.on_host()):
                everybody.update(scores, labels)
            self._labelled = everybody.labelled()
            self._ranking = everybody.ranking()
            assert self._ranking is not None  # a run with more scores is refused at its start
        return self._ranking
