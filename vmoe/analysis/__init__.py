"""What the experts do: recording of routing, evaluation, heatmaps, comparison of runs."""

from vmoe.analysis.recording import LayerRouting, RoutingTrace, record_routing

__all__ = ["LayerRouting", "RoutingTrace", "record_routing"]
