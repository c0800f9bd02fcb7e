"""What the routers of a model chose: records of its routing, and the grid of patches that the tokens form."""

from vmoe.routing.recording import LayerRouting, RoutingTrace, record_routing

__all__ = ["LayerRouting", "RoutingTrace", "record_routing"]
