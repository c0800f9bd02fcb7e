"""Members of an ensemble within one model (E3, Allingham et al. 2021, https://arxiv.org/abs/2110.03360).

B images; M members; N tokens per image; E experts, E / M per member; C classes. From the first MoE layer on, a tensor
has B*M rows. The rows of an image's members lie together.
"""

import math

import torch
from torch import Tensor


def tile(x: Tensor, ensemble: int) -> Tensor:
    """Repeats each row for each member: (B, ...) -> (B*M, ...)."""
    return x.unsqueeze(1).expand(-1, ensemble, *x.shape[1:]).flatten(0, 1)


def own_experts_only(logits_TE: Tensor, ensemble: int, tokens: int) -> Tensor:
    """The logits, with -inf for the experts of other members.

    Args:
        logits_TE: T = B*M*N rows.
        ensemble: M.
        tokens: N.
    """
    num_experts = logits_TE.shape[-1]
    member_M11 = torch.arange(ensemble, device=logits_TE.device)[:, None, None]
    member_E = torch.arange(num_experts, device=logits_TE.device) // (num_experts // ensemble)
    logits_BMNE = logits_TE.view(-1, ensemble, max(tokens, 1), num_experts)
    return logits_BMNE.masked_fill(member_E != member_M11, -math.inf).view_as(logits_TE)


def mean_prediction(logits: Tensor, ensemble: int) -> Tensor:
    """The logarithm of the members' mean probabilities: (B*M, C) logits -> (B, C) float32 or wider."""
    log_probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return log_probabilities.unflatten(0, (-1, ensemble)).logsumexp(1) - math.log(ensemble)
