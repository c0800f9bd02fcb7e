"""Several models that answer together: what an MoE is not, and what it is compared with."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Ensemble(nn.Module):
    """The mean of the class probabilities of its members (Lakshminarayanan et al. 2017, arXiv 1612.01474, section 2.4).

    It runs every member on every image, so it costs the FLOPs of all of them.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        """The logarithm of the mean probability of each class: (B, 3, height, width) -> (B, classes)."""
        log_probabilities = torch.stack([member(images).float().log_softmax(-1) for member in self.members])
        return log_probabilities.logsumexp(0) - math.log(len(self.members))
