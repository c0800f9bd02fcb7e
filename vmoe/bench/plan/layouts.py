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

FLOAT = 4  # bytes: weights, gradients and the optimiser's state are float32, and travel so
_BUFFERED = 2  # blocks whose gathered weights are there at a time: one is computed, the next is fetched


class Layout(NamedTuple):
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


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters.

    Attributes:
        shapes: Of every parameter, and whether it is of an expert.
        whole: All.
        experts: Those of experts.
        unit: The most of a block, its experts included.
        unit_without_experts: The most of a block otherwise.
        expert_layer: The most of one layer's experts.
        unit_count: Blocks that are gathered one by one, and the rest as one more.
    """

    shapes: tuple[tuple[torch.Size, bool], ...]
    whole: int
    experts: int
    unit: int
    unit_without_experts: int
    expert_layer: int
    unit_count: int

    @classmethod
    def of(cls, model: nn.Module) -> "Sizes":
        experts = {id(p): p.numel() for _, layer in moe_layers(model) for p in layer.experts.parameters()}
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
            max((sum(p.numel() for p in layer.experts.parameters()) for _, layer in moe_layers(model)), default=0),
            len(units),
        )


@dataclass(frozen=True)
class Memory:
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


def kept_parameters(sizes: Sizes, layout: Layout) -> int:
    """Parameters that the first process keeps, which has the largest part of what does not divide evenly."""
    if not layout.is_cut:
        return sizes.whole
    return sum(_kept(shape, of_expert and layout.expert_size > 1, layout) for shape, of_expert in sizes.shapes)


def _kept(shape: torch.Size, is_dealt_out: bool, layout: Layout) -> int:
    """Numbers of a parameter: FSDP2 cuts the first axis, of experts that are dealt out the second."""
    if not shape:
        return 1
    if is_dealt_out:
        parts = layout.processes // layout.expert_size
        return shape[0] // layout.expert_size * -(-shape[1] // parts) * math.prod(shape[2:])
    return -(-shape[0] // layout.processes) * math.prod(shape[1:])


def memory_of(sizes: Sizes, layout: Layout, trace: Trace, moments: int, has_average: bool, workspace: int) -> Memory:
    """What a process needs.

    Args:
        sizes: Of the whole model.
        layout: How it is spread.
        trace: Of one process's step.
        moments: Numbers that the optimiser keeps a parameter.
        has_average: Whether an average of the weights is kept.
        workspace: Bytes that libraries take for themselves.
    """
    kept = FLOAT * kept_parameters(sizes, layout)
    buffers = workspace
    if layout.is_cut:
        buffers += _gathered(sizes, layout)
    # Gradients of the step before are there until the forward pass is done, as Lightning orders a step
    forward = max(moment.live for moment in trace.moments if not moment.is_backward) + kept
    if layout.strategy != "none":  # gradients move on as soon as they are there: reduced, or into ddp's buckets
        backward = max(m.live - m.gradients for m in trace.moments if m.is_backward) + kept
    else:
        backward = max(moment.live for moment in trace.moments if moment.is_backward)
    averaging = 2 * kept if has_average else 0  # beside the gradients, the average's difference from the weights
    activations = max(forward, backward, averaging) - kept
    return Memory(kept, kept, moments * kept, kept if has_average else 0, activations, buffers)


def _gathered(sizes: Sizes, layout: Layout) -> int:
    """Bytes of whole weights at a time, as they arrive and in place, and of a block's gradients before they leave."""
    if layout.expert_size == 1:
        block = sizes.unit
    else:
        is_whole = layout.processes == layout.expert_size  # experts need not be gathered
        block = sizes.unit_without_experts + (0 if is_whole else sizes.expert_layer // layout.expert_size)
    return FLOAT * block * (2 * _BUFFERED + 1)


@dataclass(frozen=True)
class Traffic:
    """What a process sends in a step, and how long that takes.

    Attributes:
        bytes: Sent.
        forward: Seconds beside the forward pass's work.
        backward: Seconds beside the backward pass's work.
        between: Seconds in which nothing else can be done: tokens on their way to experts and back.
        copied: Bytes read and written because weights and gradients travel in one piece.
        calls: Operators that the host issues for it in each pass.
    """

    bytes: float
    forward: float
    backward: float
    between: float
    copied: float = 0
    calls: int = 0


def traffic_of(sizes: Sizes, layout: Layout, trace: Trace, machine: Machine, network: float) -> Traffic:
    """The exchange of weights, gradients and tokens; `network` is bytes/s between machines, of a GPU."""
    n, share = layout.processes, layout.expert_size
    if n == 1:
        return Traffic(0, 0, 0, 0)
    everyone = _ring(n, 1, machine, network)
    if layout.strategy == "ddp":
        sent = 2 * FLOAT * sizes.whole * (n - 1) / n
        return Traffic(sent, 0, sent / everyone + LATENCY * sizes.unit_count, 0, 4 * FLOAT * sizes.whole)
    gathered = FLOAT * (sizes.whole - sizes.experts if share > 1 else sizes.whole)
    around = gathered * (n - 1) / n
    seconds = around / everyone
    if share > 1:
        parts = n // share
        of_experts = FLOAT * sizes.experts / share * (parts - 1) / parts
        gathered += FLOAT * sizes.experts / share if parts > 1 else 0
        around += of_experts
        seconds += of_experts / _ring(parts, share, machine, network)
    seconds += LATENCY * sizes.unit_count
    tokens = sum(trace.sent) * (share - 1) / share
    between = len(trace.sent) * LATENCY if share > 1 else 0
    if share > 1:
        inside = min(share, machine.count)
        beyond = sum(trace.sent) * (share - inside) / share
        between += max(beyond / network if beyond else 0, sum(trace.sent) * (inside - 1) / share / machine.link)
    return Traffic(
        3 * around + tokens, seconds, 2 * seconds, between, 3 * 2 * gathered, GATHERING_CALLS * sizes.unit_count
    )


def _ring(count: int, stride: int, machine: Machine, network: float) -> float:
    """Bytes/s of a ring through `count` processes, every `stride`-th: as many adapters as members a machine."""
    if (count - 1) * stride < machine.count:
        return machine.link
    return min(machine.link, network * max(1, min(count, machine.count // stride)))
