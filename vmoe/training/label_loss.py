"""The loss by the labels: cross-entropy (optionally with class weights or logit adjustment), and losses per class:
binary cross-entropy, asymmetric and focal.

B images, C classes.
"""

from collections.abc import Callable, Sequence

import torch
from timm.loss import AsymmetricLossMultiLabel, BinaryCrossEntropy
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from vmoe.errors import UserError
from vmoe.training.config import LossConfig


class LabelLoss:
    """A training loss by the labels. It is no nn.Module, so a checkpoint's weights are the model's alone.

    Args:
        config: The loss and its options.
        label_smoothing: Share of the target that is spread over all classes.
        class_counts: Returns the number of training images of each class, (C,). Called only if the config needs them.
        multi_label: Whether an image may have several classes, or none.

    Raises:
        UserError: The numbers of weights and classes differ, or the loss is not for such images.
    """

    def __init__(
        self,
        config: LossConfig,
        label_smoothing: float,
        class_counts: Callable[[], Sequence[int]] | None = None,
        multi_label: bool = False,
    ) -> None:
        check_loss(config, multi_label)
        self._config, self._is_multi_label = config, multi_label
        self._is_binary = config.name == "bce"
        self._smoothing = label_smoothing
        self._binary = BinaryCrossEntropy(label_smoothing, reduction="none")
        self._asymmetric = AsymmetricLossMultiLabel(config.gamma_neg, config.gamma_pos, config.clip)
        self._weights: Tensor | None = None  # (C,), weight of an image by its class
        self._shift: Tensor | None = None  # (C,), added to the logits
        if class_counts is None or not config.counts_classes:
            return
        counts = class_counts()
        if config.class_weights is not None:
            self._weights = class_weights(config, counts).float()
        if config.logit_adjustment:
            # a class without training images counts as one with one image: log(0) is not finite
            shares = torch.tensor(counts, dtype=torch.float64).clamp(min=1) / sum(counts)
            self._shift = (config.logit_adjustment * shares.log()).float()

    def to(self, device: torch.device) -> None:
        """Moves the weights to the device of the logits."""
        if self._weights is not None:
            self._weights = self._weights.to(device)
        if self._shift is not None:
            self._shift = self._shift.to(device)

    def __call__(self, logits: Tensor, labels: Tensor, shares: Tensor | None = None) -> Tensor:
        """The mean loss of a batch, ().

        Args:
            logits: (B, C).
            labels: (B,) int64, or (B, C) of 0 and 1 for several classes.
            shares: (B, C) shares of the classes, of mixed images; None takes the labels.
        """
        if self._is_multi_label:
            return self._multi_label_loss(logits.float(), (labels if shares is None else shares).float())
        if self._is_binary:
            return self._binary_loss(logits.float(), labels, shares)
        if self._shift is not None:
            logits = logits + self._shift
        if self._weights is None:
            targets = labels if shares is None else shares
            return F.cross_entropy(logits, targets, label_smoothing=self._smoothing)
        # with label shares: for plain labels torch divides by the batch's weights, which differ between ranks
        shares = one_hot(labels, logits.shape[1]) if shares is None else shares
        return F.cross_entropy(logits, shares, weight=self._weights, label_smoothing=self._smoothing)

    def _binary_loss(self, logits: Tensor, labels: Tensor, shares: Tensor | None) -> Tensor:
        if shares is None:
            losses = self._binary(logits, labels)  # (B, C)
        else:  # timm's loss treats shares as smoothed already
            losses = self._binary(logits, shares * (1 - self._smoothing) + self._smoothing / logits.shape[1])
        if self._weights is None:
            return losses.mean()
        weights = self._weights[labels] if shares is None else shares @ self._weights
        return (losses.mean(1) * weights).mean()

    def _multi_label_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        config = self._config
        targets = targets * (1 - self._smoothing) + 0.5 * self._smoothing  # per class, towards 0.5
        if config.name == "asymmetric":
            # The sum over the classes. Older timms, without a choice of the reduction, also sum over the images
            return self._asymmetric(logits, targets) / (1 if hasattr(self._asymmetric, "reduction") else len(logits))
        if config.name == "focal":
            return sigmoid_focal_loss(logits, targets, alpha=-1, gamma=config.gamma, reduction="mean")
        return F.binary_cross_entropy_with_logits(logits, targets)


def check_loss(config: LossConfig, multi_label: bool) -> None:
    """Refuses a loss that is not for these images.

    Raises:
        UserError: It is not.
    """
    several, one = "images that may have several classes", "images of one class each"
    if multi_label and config.name == "cross_entropy":
        raise UserError(
            f"loss.name=cross_entropy: is for {one}, and these are {several}; take bce, asymmetric or focal"
        )
    if multi_label and config.super_classes is not None:
        raise UserError(f"loss.super_classes: is for {one}, and these are {several}; leave it out")
    if not multi_label and config.name in ("asymmetric", "focal"):
        raise UserError(f"loss.name={config.name}: is for {several}, and these are {one}; take cross_entropy or bce")
    if multi_label and config.counts_classes:
        option = "class_weights" if config.class_weights is not None else "logit_adjustment"
        raise UserError(f"loss.{option}: is for {one}, and these are {several}; take loss.name=asymmetric instead")


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """(B,) labels as (B, C) float32. Unlike torch's `one_hot` it does not synchronise with the device."""
    return (labels[:, None] == torch.arange(classes, device=labels.device)).float()


def class_weights(config: LossConfig, class_counts: Sequence[int]) -> Tensor:
    """The weight of each class, (C,) float64, scaled to a mean of 1 over the training images.

    Args:
        config: How: by the inverse of the counts, by that of the effective numbers, or as given.
        class_counts: (C,), training images of each class; a class without any has the weight 0 unless it is given.

    Raises:
        UserError: The numbers of weights and classes differ, or no training image has a weight above 0.
    """
    wanted, counts = config.class_weights, torch.tensor(class_counts, dtype=torch.float64)
    if isinstance(wanted, list):
        if len(wanted) != len(counts):
            raise UserError(
                f"loss.class_weights: has {len(wanted)} weights, and the data have {len(counts)} classes; give one "
                "per class, in the order of the classes",
                everywhere=True,
            )
        weights = torch.tensor(wanted, dtype=torch.float64)
    else:
        beta = config.effective_beta
        effective = counts if wanted == "balanced" else (1 - beta**counts) / (1 - beta)
        weights = torch.where(counts > 0, 1 / effective.clamp(min=1), 0.0)
    mean = (weights * counts).sum() / counts.sum()
    if not mean > 0:
        raise UserError(
            "loss.class_weights: gives every training image the weight 0; give a weight above 0", everywhere=True
        )
    return weights / mean
