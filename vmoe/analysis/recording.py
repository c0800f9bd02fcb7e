"""Recording of routing decisions, so that anyone can draw who goes where.

B images of N tokens, of which the first `num_prefix_tokens` are no patches; E experts; K choices a token; C slots an
expert has for an image.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vmoe.analysis.grids import Picture, TokenGrid, locate, prefix_names
from vmoe.moe import MoeMlp, Routing, SlotRouting, moe_layers


@dataclass(frozen=True)
class LayerRouting:
    """How one MoE layer routed the tokens of B images; detached tensors on the layer's device.

    Where tokens choose experts, `chosen`, `combine_weights` and `dropped` say what became of each choice. Where experts
    have slots (expert choice, Soft MoE) these are None, and `dispatch` and `combine` hold the whole mapping.

    Attributes:
        gates: (B, N, E) softmax of the router's scores, float32 or wider; for Soft MoE each expert's share of a token's
            result.
        chosen: (B, N, K) the experts, best first.
        combine_weights: (B, N, K), zero where dropped.
        dropped: (B, N, K) bool, whether the expert was full.
        grid: (rows, columns) of the patches; N = num_prefix_tokens + rows * columns but for padding.
        num_prefix_tokens: Class and register tokens, which come first.
        order: Place of each patch token on the grid, counted row by row: (rows * columns,) int64, or one row an image,
            -1 for padding; None where they come row by row. `on_grid` takes it into account.
        dispatch: (B, N, E, C) weight of each token in each slot.
        combine: (B, N, E, C) weight of each slot in each token's result.
        valid: (B, N) bool, False for padding; None where all tokens are real.
        prefix_names: What each of the first `num_prefix_tokens` is: "class token", "register 1", ...
    """

    gates: Tensor
    chosen: Tensor | None
    combine_weights: Tensor | None
    dropped: Tensor | None
    grid: tuple[int, int]
    num_prefix_tokens: int
    order: Tensor | None = None
    dispatch: Tensor | None = None
    combine: Tensor | None = None
    valid: Tensor | None = None
    prefix_names: tuple[str, ...] = ()

    def on_grid(self, values: Tensor) -> Tensor:
        """Values of the layer's tokens as a map: (B, N, ...) -> (B, rows, columns, ...).

        Zero where an image has no patch.
        """
        patches = values[:, self.num_prefix_tokens :]
        if self.order is None:
            return patches.unflatten(1, self.grid)
        images, places = values.shape[0], self.grid[0] * self.grid[1]
        order = self.order.to(values.device).expand(images, -1)
        padded = values.new_zeros(images, places + 1, *values.shape[2:])
        padded[torch.arange(images, device=values.device)[:, None], order.where(order >= 0, places)] = patches
        return padded[:, :places].unflatten(1, self.grid)


class _Pass(NamedTuple):
    """What one forward pass of a layer left: its record, how many images, where their tokens lie and what they are."""

    record: Routing | SlotRouting
    images: int
    tokens: TokenGrid
    prefix_names: tuple[str, ...]


@dataclass(frozen=True)
class RoutingTrace:
    """The routing of all MoE layers, by the layer's name; filled when the `record_routing` block ends or is read."""

    _pending: dict[str, list[_Pass]] = field(default_factory=dict)

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
        ValueError: The model has no MoE layer; or, in a forward pass, a layer's tokens make no grid.
    """
    layers = moe_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MoE layer to record; it is a dense model")
    model = getattr(model, "_orig_mod", model)
    trace = RoutingTrace({name: [] for name, _ in layers})
    pictures = [Picture()]
    handles = [
        model.register_forward_pre_hook(
            lambda _, inputs, named: pictures.append(Picture.of(inputs, named)), with_kwargs=True
        ),
        model.register_forward_hook(lambda *_: pictures.append(Picture())),
    ]
    for name, layer in layers:
        handles.append(layer.register_forward_hook(_keeper(trace._pending[name], pictures, model, name)))
        layer.records = []
    try:
        with torch.compiler.set_stance("force_eager"):
            yield trace
    finally:
        for handle in handles:
            handle.remove()
        for _, layer in layers:
            layer.records = None


def _keeper(pending: list[_Pass], pictures: list[Picture], model: nn.Module, name: str) -> Callable:
    def keep(layer: MoeMlp, inputs: tuple, output: Tensor) -> None:
        record = layer.records.pop()
        record = type(record)(*(part.detach() if isinstance(part, Tensor) else part for part in record))
        shape = inputs[0].shape
        tokens = locate(model, name, shape, layer.use_conv, pictures[-1])
        pending.append(_Pass(record, shape[0], tokens, prefix_names(model, name, tokens.num_prefix_tokens)))

    return keep


def _joined(name: str, passes: list[_Pass]) -> LayerRouting:
    grids = {each.tokens.size for each in passes}
    if len(grids) > 1:
        raise ValueError(f"{name}: the recorded passes had patch grids {sorted(grids)}; record one size at a time")
    tokens = passes[0].tokens
    order = tokens.order
    if order is not None and order.dim() == 2:
        order = torch.cat([each.tokens.order for each in passes])

    def joined(part: Callable[[Routing | SlotRouting], Tensor]) -> Tensor:
        return torch.cat([_by_image(record, part(record), images) for record, images, *_ in passes])

    valid = joined(_valid_GS1)[..., 0]
    common = {
        "grid": tokens.size,
        "num_prefix_tokens": tokens.num_prefix_tokens,
        "order": order,
        "valid": None if valid.all() else valid,
        "prefix_names": passes[0].prefix_names,
    }
    gates = joined(lambda record: record.gates_GSE)
    if isinstance(passes[0].record, Routing):
        weights = joined(lambda record: record.combine_weights_GSK())
        return LayerRouting(gates, joined(lambda record: record.chosen_GSK), weights, joined(_dropped_GSK), **common)
    dispatch, combine = joined(lambda record: record.dispatch_GSEC()), joined(lambda record: record.combine_GSEC())
    return LayerRouting(gates, None, None, None, dispatch=dispatch, combine=combine, **common)


def _by_image(record: Routing | SlotRouting, values: Tensor, images: int) -> Tensor:
    """(G, S, ...) -> (B, N, ...)."""
    flat = record.groups.merge(values)
    return flat.reshape(images, -1, *flat.shape[1:])


def _dropped_GSK(routing: Routing) -> Tensor:
    if routing.kept_GSK is None:
        return torch.zeros_like(routing.chosen_GSK, dtype=torch.bool)
    return ~routing.kept_GSK


def _valid_GS1(record: Routing | SlotRouting) -> Tensor:
    gates = record.gates_GSE[..., :1]
    return torch.ones_like(gates, dtype=torch.bool) if record.valid_GS is None else record.valid_GS[..., None]
