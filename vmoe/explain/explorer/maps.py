"""One layer's routing of a batch as maps: patches row by row on the layer's grid, for any router and backbone.

B images of P prefix tokens and N = rows * columns positions; E experts; K choices per token.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vmoe.routing.recording import LayerRouting


class LayerMaps(NamedTuple):
    """The routing of B images. Prefix tokens come first, then the grid's positions row by row.

    With expert choice and Soft MoE a token's choice is the expert with the largest combine weight, and its gates are
    its combine weights by expert.
    """

    gates: Tensor  # (B, P + N, E) float
    # (B, P + N, K) int64, the experts, best first and before drops; -1 for padding and for tokens that no expert took
    choices: Tensor
    # (B, P + N, E) float, each expert's load from a token: 1 for a choice, 1 for a token in an expert's slots (expert
    # choice), the combine weight (Soft MoE)
    taken: Tensor
    # (B, P + N, K) bool, dropped choices, or tokens that no expert took; None for Soft MoE
    dropped: Tensor | None
    entropy: Tensor  # (B, P + N) of the gates, nats
    valid: Tensor  # (B, P + N) bool, False for padding
    dispatch: Tensor | None  # (B, P + N, E) weight of each token in the expert's slots; None for token choice
    grid: tuple[int, int]  # (rows, columns)
    prefix: int  # P
    prefix_names: tuple[str, ...]  # the names of the prefix tokens

    @property
    def patch_choices(self) -> Tensor:
        """The choices of the patches alone, (B, N, K)."""
        return self.choices[:, self.prefix :]


def layer_maps(routing: LayerRouting, router: str) -> LayerMaps:
    """The maps of a recorded layer; `router` is its `MoeConfig.router`."""
    real = torch.ones_like(routing.gates[..., 0], dtype=torch.bool) if routing.valid is None else routing.valid
    valid = routing.row_by_row(real)
    shares = routing.gates.float()
    shares = shares / shares.sum(-1, keepdim=True).clamp_min(torch.finfo(shares.dtype).tiny)
    common = {
        "entropy": routing.row_by_row(torch.special.entr(shares).sum(-1)),
        "valid": valid,
        "grid": routing.grid,
        "prefix": routing.num_prefix_tokens,
        "prefix_names": routing.prefix_names,
    }
    if routing.chosen is not None:
        chosen, gates = routing.row_by_row(routing.chosen), routing.row_by_row(routing.gates.float())
        taken = torch.zeros_like(gates).scatter(-1, chosen, 1.0) * valid[..., None]
        dropped = routing.row_by_row(routing.dropped) & valid[..., None]
        return LayerMaps(gates, chosen.masked_fill(~valid[..., None], -1), taken, dropped, dispatch=None, **common)
    weights = routing.row_by_row(routing.combine.float().sum(-1)) * valid[..., None]
    dispatch = routing.row_by_row(routing.dispatch.float().sum(-1)) * valid[..., None]
    best, choices = weights.max(-1, keepdim=True)
    choices = choices.masked_fill(best == 0, -1)
    if router == "soft":
        return LayerMaps(weights, choices, weights, None, dispatch=dispatch, **common)
    dropped = (choices == -1) & valid[..., None]
    return LayerMaps(weights, choices, (dispatch > 0).float(), dropped, dispatch=dispatch, **common)
