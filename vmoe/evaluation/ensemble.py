"""Ensembles of several models or of one model's members, and the disagreement of their predictions.

B images; M members; C classes.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmoe.models.members import MeanPrediction


class Ensemble(nn.Module):
    """The mean of the class probabilities of its members (Lakshminarayanan et al. 2017, arXiv 1612.01474, section 2.4).

    It runs every member on every image, so it costs the FLOPs of all members.

    Args:
        members: The models.
        multi_label: Whether an image may have several classes, each with its own probability.
    """

    def __init__(self, members: Sequence[nn.Module], multi_label: bool = False) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self._is_multi_label = multi_label
        self.keeps = False  # as of `MeanPrediction`
        self.kept: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) -> (B, classes): the logarithm of each class's mean probability.

        With several classes per image: the logit of the mean probability.
        """
        if self._is_multi_label:
            logits = torch.stack([member(images).float() for member in self.members])
            return F.logsigmoid(logits).logsumexp(0) - F.logsigmoid(-logits).logsumexp(0)
        log_probabilities = torch.stack([member(images).float().log_softmax(-1) for member in self.members])
        if self.keeps:
            self.kept = log_probabilities
        return log_probabilities.logsumexp(0) - math.log(len(self.members))


@dataclass(frozen=True)
class MemberFigures:
    """The members' own figures and their disagreement. Shares are fractions."""

    members: int  # M
    top1: float  # mean over the members
    nll: float  # mean over the members, nats
    disagreement: float  # share of images with different predictions of two members, mean over the pairs
    kl: float  # Kullback-Leibler divergence of a member's probabilities from another's, mean over the pairs, nats


class RunningMemberFigures:
    """`MemberFigures`, accumulated on the device batch by batch.

    Args:
        device: The device of the predictions.
        dtype: The type of the sums.
    """

    def __init__(self, device: torch.device | str, dtype: torch.dtype) -> None:
        self.sums = torch.zeros(5, device=device, dtype=dtype)  # number of images, and sums of the four figures
        self.members = 1

    def update(self, log_probabilities_MBC: Tensor, labels: Tensor) -> None:
        """Adds one batch: the members' log probabilities, and labels (B,) int64."""
        self.members = members = len(log_probabilities_MBC)
        predicted_MB = log_probabilities_MBC.argmax(-1)
        hits = (predicted_MB == labels).sum() / members
        nll = -log_probabilities_MBC.gather(-1, labels.expand(members, -1)[..., None]).sum() / members
        pairs = max(members * (members - 1), 1)
        differ = (predicted_MB[:, None] != predicted_MB).sum() / pairs
        cross_MM = torch.einsum("mbc,nbc->mn", log_probabilities_MBC.exp(), log_probabilities_MBC)
        kl = (cross_MM.diagonal()[:, None] - cross_MM).sum() / pairs
        batch = torch.stack([each.to(self.sums) for each in (torch.tensor(len(labels)), hits, nll, differ, kl)])
        self.sums += batch

    def compute(self) -> MemberFigures:
        """The figures so far."""
        images, *totals = self.sums.tolist()
        return MemberFigures(self.members, *(total / images for total in totals))


@contextmanager
def members_kept(model: nn.Module) -> Iterator[Ensemble | MeanPrediction | None]:
    """Yields an object that holds the members' predictions for the last batch as `kept`, within the block.

    It is None for a single model, and for a view of an ensemble with only some of its classes.
    """
    hooks = list(model._forward_hooks.values())
    keeper: Any = model if isinstance(model, Ensemble) and not hooks else None
    if hooks and isinstance(hooks[-1], MeanPrediction):
        keeper = hooks[-1]
    if keeper is None:
        yield None
        return
    keeper.keeps = True
    try:
        yield keeper
    finally:
        keeper.keeps, keeper.kept = False, None
