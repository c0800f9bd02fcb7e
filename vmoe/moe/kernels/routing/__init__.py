"""Triton's kernels of routing: scores, gates and choices, ranks and order, balance losses and statistics.

Each computes what a formula in `vmoe.moe` does: `scores`, `routers`, `assignment` or `losses`. Everything here imports
Triton.
"""

from vmoe.moe.kernels.counting import Rows, place_in_shares, ranks, rows_as_needed
from vmoe.moe.kernels.routing.balance import Counts, Weights, balance, balance_of_blocks
from vmoe.moe.kernels.routing.decision import OfLoss, OfResult, Options, TokenChoices, decide, decide_backward
from vmoe.moe.kernels.routing.gates import gates, takes_logits
from vmoe.moe.kernels.routing.order import descending_order, order_in_groups
from vmoe.moe.kernels.routing.scores import scores, scores_and_tokens

__all__ = [
    "Counts",
    "OfLoss",
    "OfResult",
    "Options",
    "Rows",
    "TokenChoices",
    "Weights",
    "balance",
    "balance_of_blocks",
    "decide",
    "decide_backward",
    "descending_order",
    "gates",
    "order_in_groups",
    "place_in_shares",
    "ranks",
    "rows_as_needed",
    "scores",
    "scores_and_tokens",
    "takes_logits",
]
