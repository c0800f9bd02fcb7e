"""Records of a model's routing, and the grid of patches that its tokens form."""

from vmoe.routing.recording import LayerRouting, RoutingTrace, record_routing

__all__ = ["LayerRouting", "RoutingTrace", "record_routing"]
