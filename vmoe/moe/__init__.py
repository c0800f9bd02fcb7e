"""The MoE layer, to be read in the order route (routers) -> assign (assignment) -> experts -> combine (layer)."""

from vmoe.moe.config import MoeConfig
from vmoe.moe.control import (
    auxiliary_loss,
    moe_layers,
    set_auxiliary_scale,
    set_eval_capacity_factor,
    set_top_k,
    update_router_biases,
)
from vmoe.moe.layer import MoeMlp, Statistics
from vmoe.moe.routing import ExpertChoiceRouting, Routing, SlotRouting, SoftRouting

__all__ = [
    "ExpertChoiceRouting",
    "MoeConfig",
    "MoeMlp",
    "Routing",
    "SlotRouting",
    "SoftRouting",
    "Statistics",
    "auxiliary_loss",
    "moe_layers",
    "set_auxiliary_scale",
    "set_eval_capacity_factor",
    "set_top_k",
    "update_router_biases",
]
