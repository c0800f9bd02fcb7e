"""Recording of routing decisions, so that anyone can draw who goes where.

B images of N tokens, of which the first `num_prefix_tokens` are no patches; E experts; K choices a token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vmoe.moe import Routing, moe_layers


@dataclass(frozen=True)
class LayerRouting:
    """How one MoE layer routed the tokens of B images; detached tensors on the layer's device.

    Attributes:
        gates: (B, N, E) softmax of the router's scores, float32 or wider.
        chosen: (B, N, K) the experts, best first.
        combine_weights: (B, N, K), zero where dropped.
        dropped: (B, N, K) bool, whether the expert was full.
        grid: (rows, columns) of the patches: N = num_prefix_tokens + rows * columns, row by row.
        num_prefix_tokens: Class and register tokens, which come first.
    """

    gates: Tensor
    chosen: Tensor
    combine_weights: Tensor
    dropped: Tensor
    grid: tuple[int, int]
    num_prefix_tokens: int


@dataclass(frozen=True)
class RoutingTrace:
    """The routing of all MoE layers, by the layer's name; filled when the `record_routing` block ends or is read."""

    _pending: dict[str, list[tuple[Routing, int, tuple[int, int], int]]] = field(default_factory=dict)

    @property
    def layers(self) -> dict[str, LayerRouting]:
        """Each layer's routing; several forward passes stand one behind the other along B.

        Raises:
            ValueError: The passes recorded had images of different sizes.
        """
        return {name: _joined(name, passes) for name, passes in self._pending.items() if passes}


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingTrace]:
    """Records every routing decision of the forward passes inside the block. Results stay the same.

    A compiled model runs uncompiled inside the block.

    Example:
        with record_routing(model) as trace:
            model(images)
        trace.layers["blocks.1.mlp"].chosen

    Raises:
        ValueError: The model has no MoE layer.
    """
    layers = moe_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MoE layer to record; it is a dense model")
    model = getattr(model, "_orig_mod", model)
    trace = RoutingTrace({name: [] for name, _ in layers})
    grids: list[tuple[int, int]] = []
    # At the embedding, which `forward_features` passes too.
    embed = model.patch_embed
    handles = [embed.register_forward_pre_hook(lambda _, inputs: grids.append(patch_grid(model, inputs[0].shape[-2:])))]
    for name, layer in layers:
        handles.append(layer.register_forward_hook(_keeper(trace._pending[name], grids, model)))
        layer._records = []
    try:
        with torch.compiler.set_stance("force_eager"):
            yield trace
    finally:
        for handle in handles:
            handle.remove()
        for _, layer in layers:
            layer._records = None


def patch_grid(model: nn.Module, image_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches into which a timm vision transformer cuts an image of this size."""
    embed = model.patch_embed
    if getattr(model, "dynamic_img_size", False):
        return tuple(embed.dynamic_feat_size(tuple(image_size)))
    return tuple(embed.grid_size)


def _keeper(pending: list, grids: list[tuple[int, int]], model: nn.Module):
    def keep(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        routing = Routing(*(part.detach() if isinstance(part, Tensor) else part for part in layer._records.pop()))
        pending.append((routing, inputs[0].shape[0], grids[-1], model.num_prefix_tokens))

    return keep


def _joined(name: str, passes: list) -> LayerRouting:
    grids = {grid for _, _, grid, _ in passes}
    if len(grids) > 1:
        raise ValueError(f"{name}: the recorded passes had patch grids {sorted(grids)}; record one size at a time")
    _, _, grid, num_prefix_tokens = passes[0]

    def images(part: str) -> Tensor:
        return torch.cat([_by_image(routing, part, count) for routing, count, _, _ in passes])

    return LayerRouting(
        images("gates_GSE"), images("chosen_GSK"), images("combine"), images("dropped"), grid, num_prefix_tokens
    )


def _by_image(routing: Routing, part: str, images: int) -> Tensor:
    if part == "combine":
        values = routing.combine_weights_GSK()
    elif part == "dropped":
        chosen = routing.chosen_GSK
        values = torch.zeros_like(chosen, dtype=torch.bool) if routing.kept_GSK is None else ~routing.kept_GSK
    else:
        values = getattr(routing, part)
    flat = routing.groups.merge(values)
    return flat.reshape(images, -1, flat.shape[-1])
