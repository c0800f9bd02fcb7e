"""Records routing decisions.

B images of N tokens, of which the first `num_prefix_tokens` are no patches; E experts; K choices per token; C slots of
an expert for an image.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from vmoe.moe import MoeMlp, Routing, SlotRouting, moe_layers
from vmoe.moe.passes import is_backward
from vmoe.routing.grids import ModelInput, TokenGrid, locate, prefix_names


@dataclass(frozen=True)
class LayerRouting:
    """The routing of B images in one MoE layer, as detached tensors on the layer's device.

    In an ensemble of M members, K counts the choices of all members, best first. The gates are the mean of the members'
    gates.

    With token choice, `chosen`, `combine_weights` and `dropped` describe each choice. With expert choice and Soft MoE
    these are None, and `dispatch` and `combine` hold the whole mapping.

    Where images are routed as a whole (`MoeConfig.route="image"`), there is no axis of tokens: gates (B, E), the others
    (B, K), a grid of one row and one column. `as_tokens` gives such a routing the axis, with one token per image.

    Attributes:
        gates: (B, N, E) softmax of the router's scores, float32 or wider; for Soft MoE each expert's share of a token's
            result.
        chosen: (B, N, K) the experts, best first.
        combine_weights: (B, N, K), zero where dropped.
        dropped: (B, N, K) bool, whether the expert was full; False for padding.
        grid: (rows, columns) of the patches; N = num_prefix_tokens + rows * columns, and padding beyond.
        num_prefix_tokens: Class and register tokens, which come first.
        order: Position of each patch token on the grid, row by row: (rows * columns,) int64, or one row per image with
            -1 for padding; None if the tokens are in that order. `on_grid` applies it.
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

    @property
    def of_images(self) -> bool:
        """Whether images were routed as a whole."""
        return self.gates.dim() == 2

    def as_tokens(self) -> "LayerRouting":
        """The same with an axis of tokens: where images were routed, each is one token."""
        if not self.of_images:
            return self
        parts = {name: getattr(self, name)[:, None] for name in ("gates", "chosen", "combine_weights", "dropped")}
        return replace(self, **parts, valid=None if self.valid is None else self.valid[:, None])

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

    def row_by_row(self, values: Tensor) -> Tensor:
        """Reorders values of the layer's tokens, (B, N, ...): first prefix tokens, then patches row by row."""
        return torch.cat([values[:, : self.num_prefix_tokens], self.on_grid(values).flatten(1, 2)], 1)


class _Passes(NamedTuple):
    """The records of one or several forward passes of a layer. They hold neither tokens nor scores.

    Attributes:
        gates: (B, N, E).
        valid: (B, N); None where all tokens are real.
        choices: `chosen`, `combine_weights` and `dropped` as in `LayerRouting`; None where experts have slots.
        slots: The decisions of routers that fill slots, one per pass; else empty.
        tokens: The positions of the tokens.
        prefix_names: The names of the tokens before the patches.
    """

    gates: Tensor
    valid: Tensor | None
    choices: tuple[Tensor, Tensor, Tensor] | None
    slots: tuple[SlotRouting, ...]
    tokens: TokenGrid
    prefix_names: tuple[str, ...]


@dataclass(frozen=True)
class RoutingTrace:
    """The routing of all MoE layers, by the layer's name. The `record_routing` block fills it."""

    _passes: dict[str, list[_Passes]] = field(default_factory=dict)
    _read: dict[str, tuple[_Passes, LayerRouting]] = field(default_factory=dict, repr=False)

    @property
    def layers(self) -> dict[str, LayerRouting]:
        """Each layer's routing. Several forward passes are concatenated along B.

        Raises:
            ValueError: The passes had images of different sizes.
        """
        return {name: self._layer(name, passes) for name, passes in self._passes.items() if passes}

    def _layer(self, name: str, passes: list[_Passes]) -> LayerRouting:
        if len(passes) > 1:
            passes[:] = [_joined(name, passes)]  # replaces its parts, so that memory holds them only once
        joined, layer = self._read.get(name, (None, None))
        if layer is None or joined is not passes[0]:
            layer = _layer_routing(passes[0])
            self._read[name] = passes[0], layer
        return layer


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingTrace]:
    """Records every routing decision of the forward passes inside the block. Results stay the same.

    A compiled model runs uncompiled inside the block. Blocks may be nested: each trace holds the passes of its own
    block. Recomputation by activation checkpointing is not recorded, nor are passes of meta or fake tensors, which hold
    no decisions.

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
    recorder = _Recorder(getattr(model, "_orig_mod", model), dict(layers))
    recorders = {name: partial(recorder.keep, name) for name, _ in layers}
    handles = [
        recorder.model.register_forward_pre_hook(recorder.begin, with_kwargs=True),
        recorder.model.register_forward_hook(recorder.succeed),
        recorder.model.register_forward_hook(recorder.end, always_call=True),
    ]
    for name, layer in layers:
        layer.recorders = (*layer.recorders, recorders[name])
    try:
        with torch.compiler.set_stance("force_eager"):
            yield recorder.trace
    finally:
        for handle in handles:
            handle.remove()
        for name, layer in layers:
            layer.recorders = tuple(each for each in layer.recorders if each is not recorders[name])


class _Recorder:
    """Fills a trace, pass by pass."""

    def __init__(self, model: nn.Module, layers: dict[str, MoeMlp]) -> None:
        self.model = model
        self.trace = RoutingTrace({name: [] for name in layers})
        self._layers = layers
        self._picture = ModelInput()
        self._before: dict[str, list[_Passes]] | None = None  # records before the current pass

    def begin(self, model: nn.Module, inputs: tuple, named: dict) -> None:
        """Runs as a hook before the model's forward pass."""
        self._picture = ModelInput.of(inputs, named)
        self._before = {name: list(passes) for name, passes in self.trace._passes.items()}

    def succeed(self, model: nn.Module, inputs: tuple, output: object) -> None:
        """Runs as a hook after a forward pass that succeeded."""
        self._before = None

    def end(self, model: nn.Module, inputs: tuple, output: object) -> None:
        """Runs as a hook after every forward pass. Drops the records of a pass that failed."""
        self._picture = ModelInput()
        if self._before is not None:
            for name, passes in self._before.items():
                self.trace._passes[name][:] = passes
            self._before = None

    def keep(self, name: str, record: Routing | SlotRouting, shape: torch.Size) -> None:
        """Runs in a layer: keeps its decision on an input of this shape."""
        if is_backward() or record.gates_GSE.is_meta or isinstance(record.gates_GSE, FakeTensor):
            return
        layer = self._layers[name]
        record = type(record)(*(part.detach() if isinstance(part, Tensor) else part for part in record))
        if layer.images is not None:
            self.trace._passes[name].append(_pass_of_images(record, shape[0]))
            return
        tokens = locate(self.model, name, shape, layer.use_conv, self._picture)
        names = prefix_names(self.model, name, tokens.num_prefix_tokens)
        ensemble = layer.config.ensemble
        self.trace._passes[name].append(_one_pass(record, shape[0] // ensemble, ensemble, tokens, names))


def _one_pass(
    record: Routing | SlotRouting, images: int, ensemble: int, tokens: TokenGrid, names: tuple[str, ...]
) -> _Passes:
    def by_member(values: Tensor) -> Tensor:  # (G, S, ...) -> (B, M, N, ...)
        flat = record.groups.merge(values)
        return flat.reshape(images, ensemble, -1, *flat.shape[1:])

    def by_image(values: Tensor) -> Tensor:  # (G, S, K) -> (B, N, M * K)
        return by_member(values).transpose(1, 2).flatten(2)

    valid = None if record.valid_GS is None else by_member(record.valid_GS)[:, 0]
    gates = by_member(record.gates_GSE)
    gates = gates[:, 0] if ensemble == 1 else gates.mean(1)
    if not isinstance(record, Routing):
        return _Passes(gates, valid, None, (record,), tokens, names)
    chosen, weights = by_image(record.chosen_GSK), by_image(record.combine_weights_GSK())
    dropped = torch.zeros_like(chosen, dtype=torch.bool) if record.kept_GSK is None else ~by_image(record.kept_GSK)
    if valid is not None:  # padding takes no slot, so it is never dropped
        dropped &= valid[..., None]
    if ensemble > 1:
        order = by_image(record.weights_GSK).argsort(dim=-1, descending=True, stable=True)
        chosen, weights, dropped = (each.gather(-1, order) for each in (chosen, weights, dropped))
    return _Passes(gates, valid, (chosen, weights, dropped), (), tokens, names)


def _pass_of_images(record: Routing | SlotRouting, images: int) -> _Passes:
    of_tokens = _one_pass(record, images, 1, TokenGrid((1, 1)), ())
    assert of_tokens.choices is not None  # only token choice routes whole images
    gates, chosen, weights, dropped = (part[:, 0] for part in (of_tokens.gates, *of_tokens.choices))
    valid = None if of_tokens.valid is None else of_tokens.valid[:, 0]
    return of_tokens._replace(gates=gates, valid=valid, choices=(chosen, weights, dropped))


def _joined(name: str, passes: list[_Passes]) -> _Passes:
    """Concatenates several passes along B."""
    grids = {each.tokens.size for each in passes}
    if len(grids) > 1:
        raise ValueError(f"{name}: the recorded passes had patch grids {sorted(grids)}; record one size at a time")
    first = passes[0]
    tokens, valid, choices = first.tokens, None, None
    if tokens.order is not None and tokens.order.dim() == 2:
        tokens = tokens._replace(order=torch.cat([each.tokens.order for each in passes]))
    if any(each.valid is not None for each in passes):
        valid = torch.cat([_valid(each) for each in passes])
    if first.choices is not None:
        choices = tuple(map(torch.cat, zip(*(each.choices for each in passes), strict=True)))
    slots = tuple(slot for each in passes for slot in each.slots)
    return _Passes(torch.cat([each.gates for each in passes]), valid, choices, slots, tokens, first.prefix_names)


def _layer_routing(passes: _Passes) -> LayerRouting:
    tokens, valid = passes.tokens, passes.valid
    common = {
        "grid": tokens.size,
        "num_prefix_tokens": tokens.num_prefix_tokens,
        "order": tokens.order,
        "valid": None if valid is None or valid.all() else valid,
        "prefix_names": passes.prefix_names,
    }
    if passes.choices is not None:
        return LayerRouting(passes.gates, *passes.choices, **common)
    # one group per image, so G = B
    dispatch = torch.cat([slots.dispatch_GSEC() for slots in passes.slots])
    combine = torch.cat([slots.combine_GSEC() for slots in passes.slots])
    return LayerRouting(passes.gates, None, None, None, dispatch=dispatch, combine=combine, **common)


def _valid(each: _Passes) -> Tensor:
    return torch.ones_like(each.gates[..., 0], dtype=torch.bool) if each.valid is None else each.valid
