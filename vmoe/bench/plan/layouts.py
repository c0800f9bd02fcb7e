"""Ways to spread a model over processes: what each keeps of it, and what they send one another.

n processes; P of them share a layer's experts (`expert_size`).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from vmoe.bench.plan.hardware import GATHERING_CALLS, LATENCY, Machine
from vmoe.bench.plan.trace import Trace
from vmoe.moe import moe_layers
from vmoe.training.averaging import buckets

FLOAT = 4  # bytes: weights, gradients and the optimiser's state are float32, and travel so
_BUFFERED = 2  # blocks whose gathered weights are there at a time: one is computed, the next is fetched
_AVERAGING_CALLS = 3  # operators a bucket of gradients: put together, summed, divided
_AVERAGING_PASSES = 2  # of these, those that read and write it on the GPU; summing is the network's


class MeshLayout(NamedTuple):
    """How to spread.

    Attributes:
        strategy: none, ddp, fsdp or expert, as in `parallel.strategy`.
        processes: n.
        expert_size: P; 1 unless the strategy is expert.
        dense: "cut" or "whole", as in `parallel.dense`.
    """

    strategy: str
    processes: int
    expert_size: int = 1
    dense: str = "cut"

    def __str__(self) -> str:
        if self.strategy != "expert":
            return self.strategy
        return f"expert {self.expert_size}" + (", dense whole" if self.dense == "whole" else "")

    @property
    def is_cut(self) -> bool:
        """Whether each process keeps only a part of the weights."""
        return self.strategy in ("fsdp", "expert")

    @property
    def keeps_dense(self) -> bool:
        """Whether each process of a cut model keeps all but the experts."""
        return self.dense == "whole"

    @property
    def parts(self) -> int:
        """Processes over which an expert is cut."""
        return self.processes // self.expert_size


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters.

    Attributes:
        shapes: Of every parameter, and whether it is of an expert.
        whole: All.
        experts: Those of experts.
        unit: The most of a block, its experts included.
        unit_without_experts: The most of a block otherwise.
        expert_layer: The most of one layer's experts.
        unit_count: Blocks that are gathered one by one, and the rest as one more.
        moe_count: MoE layers.
    """

    shapes: tuple[tuple[torch.Size, bool], ...]
    whole: int
    experts: int
    unit: int
    unit_without_experts: int
    expert_layer: int
    unit_count: int
    moe_count: int

    @classmethod
    def of(cls, model: nn.Module) -> "ParameterCounts":
        layers = [[(id(p), p.numel()) for p in layer.experts.stacked_parameters()] for _, layer in moe_layers(model)]
        experts = dict(pair for layer in layers for pair in layer)
        units, without = {}, {}
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            unit = ".".join(parts[: parts.index("blocks") + 2]) if "blocks" in parts else ""
            units[unit] = units.get(unit, 0) + parameter.numel()
            without.setdefault(unit, 0)
            if id(parameter) not in experts:
                without[unit] += parameter.numel()
        return cls(
            tuple((parameter.shape, id(parameter) in experts) for parameter in model.parameters()),
            sum(units.values()),
            sum(experts.values()),
            max(units.values()),
            max(without.values()),
            max((sum(size for _, size in layer) for layer in layers), default=0),
            len(units),
            len(layers),
        )


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a process at the moment when it needs most.

    Attributes:
        parameters: Its weights.
        gradients: Of them.
        optimizer: AdamW's two moments, or Muon's one.
        average: Of the weights, where the run keeps one.
        activations: What the forward pass keeps, and what the backward pass works with.
        buffers: Gathered weights, gradients on their way, tokens on their way.
    """

    parameters: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    buffers: int

    @property
    def peak(self) -> int:
        """All together."""
        return sum(vars(self).values())


def kept_parameters(sizes: ParameterCounts, layout: MeshLayout) -> int:
    """Parameters that the first process keeps, which has the largest part of what does not divide evenly."""
    return sum(_kept(shape, of_expert, layout) for shape, of_expert in sizes.shapes)


def _kept(shape: torch.Size, of_expert: bool, layout: MeshLayout) -> int:
    """Numbers of a parameter: FSDP2 cuts the first axis, of experts that are dealt out the second."""
    if not shape or not layout.is_cut or (layout.keeps_dense and not of_expert):
        return math.prod(shape)
    if of_expert and layout.expert_size > 1:
        return shape[0] // layout.expert_size * -(-shape[1] // layout.parts) * math.prod(shape[2:])
    return -(-shape[0] // layout.processes) * math.prod(shape[1:])


def memory_of(
    sizes: ParameterCounts,
    layout: MeshLayout,
    trace: Trace,
    moments: int,
    has_average: bool,
    workspace: int,
    accumulates: bool,
) -> StepMemory:
    """What a process needs.

    Args:
        sizes: Of the whole model.
        layout: How it is spread.
        trace: Of one process's step.
        moments: Numbers that the optimiser keeps a parameter.
        has_average: Whether an average of the weights is kept.
        workspace: Bytes that libraries take for themselves.
        accumulates: Whether several batches make an update.
    """
    kept = FLOAT * kept_parameters(sizes, layout)
    # Gradients of the step before are there until the forward pass is done, as Lightning orders a step
    forward = max(moment.live for moment in trace.moments if not moment.is_backward) + kept
    grow_in_place = not accumulates and (layout.strategy == "none" or layout.keeps_dense)
    backward = _backward_bytes(sizes, layout, trace, grow_in_place)
    averaging = 2 * kept if has_average else 0  # beside the gradients, the average's difference from the weights
    activations = max(forward, backward, averaging) - kept
    buffers = _gathered(sizes, layout) if layout.is_cut else 0
    if layout.keeps_dense:  # gradients are put together when activations and gathered weights are mostly gone
        buffers = max(buffers, FLOAT * max(_bucket_sizes(sizes)) - activations)
    return StepMemory(kept, kept, moments * kept, kept if has_average else 0, activations, workspace + buffers)


def _backward_bytes(sizes: ParameterCounts, layout: MeshLayout, trace: Trace, grow_in_place: bool) -> int:
    """Bytes of the backward pass at most.

    Gradients that are reduced as soon as they are there, or lie in ddp's buckets, or are added to those of the batches
    before, have room of their own all the time; the others come one by one.
    """
    passing = [moment for moment in trace.moments if moment.is_backward]
    if not grow_in_place:
        return max(moment.live - moment.gradients for moment in passing) + FLOAT * kept_parameters(sizes, layout)
    if layout.parts == 1:
        return max(moment.live for moment in passing)
    experts = sum(_kept(shape, True, layout) for shape, of_expert in sizes.shapes if of_expert)
    return max(moment.live - moment.of_experts for moment in passing) + FLOAT * experts


def _gathered(sizes: ParameterCounts, layout: MeshLayout) -> int:
    """Bytes of whole weights at a time, as they arrive and in place, and of a block's gradients before they leave."""
    if layout.expert_size == 1:
        block = sizes.unit
    else:
        of_experts = sizes.expert_layer // layout.expert_size if layout.parts > 1 else 0
        block = of_experts + (0 if layout.keeps_dense else sizes.unit_without_experts)
    return FLOAT * block * (2 * _BUFFERED + 1)


def _bucket_sizes(sizes: ParameterCounts) -> list[int]:
    """Numbers in each bucket in which the gradients of all but the experts are averaged."""
    dense = [torch.empty(shape, device="meta") for shape, of_expert in sizes.shapes if not of_expert]
    return [sum(gradient.numel() for gradient in bucket) for bucket in buckets(dense[::-1])]


@dataclass(frozen=True)
class Traffic:
    """What a process sends, and how long that takes.

    Attributes:
        bytes: Sent.
        forward: Seconds beside the forward pass's work.
        backward: Seconds beside the backward pass's work.
        between: Seconds in which nothing else can be done: tokens on their way to experts and back, and gradients that
            are averaged after several passes.
        copied: Bytes read and written because weights and gradients travel in one piece.
        calls: Operators that the host issues for it, in each pass or after them.
    """

    bytes: float = 0
    forward: float = 0
    backward: float = 0
    between: float = 0
    copied: float = 0
    calls: int = 0


def traffic_of(sizes: ParameterCounts, layout: MeshLayout, trace: Trace, machine: Machine, network: float) -> Traffic:
    """Weights, gradients and tokens that travel in the passes; `network` is bytes/s between machines, of a GPU."""
    n, share = layout.processes, layout.expert_size
    if n == 1:
        return Traffic()
    everyone = _ring(n, 1, machine, network)
    if layout.strategy == "ddp":
        sent = 2 * FLOAT * sizes.whole * (n - 1) / n
        return Traffic(sent, 0, sent / everyone + LATENCY * sizes.unit_count, 0, 4 * FLOAT * sizes.whole)
    gathered = around = seconds = 0.0
    if not layout.keeps_dense:
        gathered = FLOAT * (sizes.whole - sizes.experts if share > 1 else sizes.whole)
        around = gathered * (n - 1) / n
        seconds = around / everyone
    if share > 1 and layout.parts > 1:
        of_experts = FLOAT * sizes.experts / share * (layout.parts - 1) / layout.parts
        gathered += FLOAT * sizes.experts / share
        around += of_experts
        seconds += of_experts / _ring(layout.parts, share, machine, network)
    units = _gathered_units(sizes, layout)
    seconds += LATENCY * units
    tokens = sum(trace.sent) * (share - 1) / share
    between = _exchange(trace.sent, share, machine, network) if share > 1 else 0
    return Traffic(3 * around + tokens, seconds, 2 * seconds, between, 3 * 2 * gathered, GATHERING_CALLS * units)


def averaging_of(
    sizes: ParameterCounts, layout: MeshLayout, machine: Machine, network: float, accumulates: bool
) -> Traffic:
    """Gradients of a whole dense part: beside the backward pass, or after the last where several make an update."""
    if not layout.keeps_dense:
        return Traffic()
    dense, count = FLOAT * (sizes.whole - sizes.experts), len(_bucket_sizes(sizes))
    sent = 2 * dense * (layout.processes - 1) / layout.processes
    seconds = sent / _ring(layout.processes, 1, machine, network) + LATENCY * count
    when = {"between" if accumulates else "backward": seconds}
    return Traffic(sent, **when, copied=_AVERAGING_PASSES * 2 * dense, calls=_AVERAGING_CALLS * count)


def _gathered_units(sizes: ParameterCounts, layout: MeshLayout) -> int:
    """Parts of the model that are gathered one by one."""
    if not layout.keeps_dense:
        return sizes.unit_count
    return sizes.moe_count if layout.parts > 1 else 0


def _exchange(sent: list[int], share: int, machine: Machine, network: float) -> float:
    """Seconds of the tokens' way to experts and back, within a machine and beyond it at once."""
    inside = min(share, machine.count)
    beyond = sum(sent) * (share - inside) / share
    within = sum(sent) * (inside - 1) / share / machine.link
    return len(sent) * LATENCY + max(beyond / network if beyond else 0, within)


def _ring(count: int, stride: int, machine: Machine, network: float) -> float:
    """Bytes/s of a ring through `count` processes, every `stride`-th: as many adapters as members a machine."""
    if (count - 1) * stride < machine.count:
        return machine.link
    return min(machine.link, network * max(1, min(count, machine.count // stride)))
