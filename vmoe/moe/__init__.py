"""The MoE layer, to be read in the order route (routers) -> assign (assignment) -> experts -> combine (layer)."""

from vmoe.moe.config import MoeConfig
from vmoe.moe.layer import (
    MoeMlp,
    Statistics,
    auxiliary_loss,
    moe_layers,
    set_auxiliary_scale,
    set_eval_capacity_factor,
)
from vmoe.moe.routers import Routing

__all__ = [
    "MoeConfig",
    "MoeMlp",
    "Routing",
    "Statistics",
    "auxiliary_loss",
    "moe_layers",
    "set_auxiliary_scale",
    "set_eval_capacity_factor",
]
