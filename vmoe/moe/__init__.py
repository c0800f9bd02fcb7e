"""The MoE layer. Read it in the order route (routers) -> assign (assignment) -> experts -> combine (layer)."""

from typing import TYPE_CHECKING

from vmoe.imports import names_on_demand

if TYPE_CHECKING:
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
else:  # a config can be read without torch
    CONTROL_NAMES = (
        "auxiliary_loss", "moe_layers", "set_auxiliary_scale", "set_eval_capacity_factor", "set_top_k",
        "update_router_biases",
    )  # fmt: skip
    __getattr__ = names_on_demand(
        __name__,
        {
            "vmoe.moe.config": ["MoeConfig"],
            "vmoe.moe.control": CONTROL_NAMES,
            "vmoe.moe.layer": ["MoeMlp", "Statistics"],
            "vmoe.moe.routing": ["ExpertChoiceRouting", "Routing", "SlotRouting", "SoftRouting"],
        },
    )

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
