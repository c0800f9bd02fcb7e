"""Triton's kernels of routing: scores, gates and choices, ranks and order, balance losses and statistics.

Each computes what a formula in `vmoe.moe` does: `scores`, `routers`, `assignment` or `losses`. Everything here imports
Triton.
"""

from vmoe.moe.kernels.counting import ranks
from vmoe.moe.kernels.routing.balance import Weights, add_loss_gradient, balance, weighted_balance
from vmoe.moe.kernels.routing.gates import gates, gates_backward, takes_logits
from vmoe.moe.kernels.routing.order import descending_order
from vmoe.moe.kernels.routing.scores import scores, scores_and_tokens, scores_backward

__all__ = [
    "Weights",
    "add_loss_gradient",
    "balance",
    "descending_order",
    "gates",
    "gates_backward",
    "ranks",
    "scores",
    "scores_and_tokens",
    "scores_backward",
    "takes_logits",
    "weighted_balance",
]
