"""Mesh layouts, the ways to shard a model over n processes: memory per process, and traffic between them.

The experts of a layer are sharded over P of the n processes (`expert_size`).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from vmoe.bench.plan.hardware import GATHERING_CALLS, LATENCY, Machine
from vmoe.bench.plan.trace import Trace
from vmoe.bench.plan.workload import Workload
from vmoe.moe import moe_layers
from vmoe.training.parallel.gradient_means import buckets

FLOAT = 4  # bytes: weights, gradients and the optimiser's state are float32, and travel so
_BUFFERED = 2  # blocks with gathered weights at a time: one is computed, the next is fetched
_AVERAGING_CALLS = 3  # operators per bucket of gradients: concatenate, sum, divide
_AVERAGING_PASSES = 2  # those of them that read and write GPU memory; the network computes the sum


class MeshLayout(NamedTuple):
    """The way in which a model is sharded over processes."""

    strategy: str  # none, ddp, fsdp or expert, as in `parallel.strategy`
    processes: int  # n
    expert_size: int = 1  # P; 1 unless the strategy is expert
    # "shard" or "whole", as in `parallel.dense`: all except the experts is sharded, or whole in each process
    dense: str = "shard"

    def __str__(self) -> str:
        if self.strategy != "expert":
            return self.strategy
        return f"expert {self.expert_size}" + (", dense whole" if self.dense == "whole" else "")

    @property
    def is_sharded(self) -> bool:
        """Whether each process keeps only a shard of the weights."""
        return self.strategy in ("fsdp", "expert")

    @property
    def keeps_dense(self) -> bool:
        """Whether each process of a sharded model keeps all except the experts."""
        return self.dense == "whole"

    @property
    def expert_shards(self) -> int:
        """Processes over which one expert is sharded."""
        return self.processes // self.expert_size


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters."""

    shapes: tuple[tuple[torch.Size, bool], ...]  # the shape of every parameter, and whether it is an expert's
    whole: int  # count of all
    experts: int  # count of those of experts
    unit: int  # count in the largest block, with its experts
    unit_without_experts: int  # count in the largest block without experts
    expert_layer: int  # count in the largest layer's experts
    unit_count: int  # number of blocks that are gathered one by one, and of the rest as one more
    moe_count: int  # number of MoE layers

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
    """Bytes of a process at its peak."""

    parameters: int  # its weights
    gradients: int  # their gradients
    optimizer: int  # AdamW's two moments, or Muon's one
    average: int  # the average of the weights, where the run keeps one
    activations: int  # tensors that the forward pass keeps, and those of the backward pass
    buffers: int  # gathered weights, gradients on their way, tokens on their way

    @property
    def peak(self) -> int:
        """The sum."""
        return sum(vars(self).values())


def kept_parameters(counts: ParameterCounts, layout: MeshLayout) -> int:
    """Parameters that the first process keeps. It has the largest shard of what does not divide evenly."""
    return sum(_kept(shape, of_expert, layout) for shape, of_expert in counts.shapes)


def _kept(shape: torch.Size, of_expert: bool, layout: MeshLayout) -> int:
    """Numbers of a parameter per process. FSDP2 shards the first axis; for experts that are sharded, the second."""
    if not shape or not layout.is_sharded or (layout.keeps_dense and not of_expert):
        return math.prod(shape)
    if of_expert and layout.expert_size > 1:
        return shape[0] // layout.expert_size * -(-shape[1] // layout.expert_shards) * math.prod(shape[2:])
    return -(-shape[0] // layout.processes) * math.prod(shape[1:])


def memory_of(
    counts: ParameterCounts, layout: MeshLayout, trace: Trace, workload: Workload, workspace: int
) -> StepMemory:
    """The memory of a process, from a trace of its step. `counts` is of the whole model, `workspace` of libraries."""
    kept = FLOAT * kept_parameters(counts, layout)
    # Lightning frees the last step's gradients only after the forward pass
    forward = max(moment.live for moment in trace.moments if not moment.is_backward) + kept
    grow_in_place = workload.accumulate == 1 and (layout.strategy == "none" or layout.keeps_dense)
    backward = _backward_bytes(counts, layout, trace, grow_in_place)
    averaging = 2 * kept if workload.has_average else 0  # the gradients, and the average's difference from the weights
    activations = max(forward, backward, averaging) - kept
    buffers = _gathered(counts, layout) if layout.is_sharded else 0
    if layout.keeps_dense:  # gradients are concatenated when most activations and gathered weights are freed
        buffers = max(buffers, FLOAT * max(_bucket_sizes(counts)) - activations)
    average = kept if workload.has_average else 0
    return StepMemory(kept, kept, workload.moments * kept, average, activations, workspace + buffers)


def _backward_bytes(counts: ParameterCounts, layout: MeshLayout, trace: Trace, grow_in_place: bool) -> int:
    """The most bytes of the backward pass.

    Some gradients have memory all the time: those that are reduced at once, lie in ddp's buckets, or are added to those
    of earlier batches. The others appear one by one.
    """
    passing = [moment for moment in trace.moments if moment.is_backward]
    if not grow_in_place:
        return max(moment.live - moment.gradients for moment in passing) + FLOAT * kept_parameters(counts, layout)
    if layout.expert_shards == 1:
        return max(moment.live for moment in passing)
    experts = sum(_kept(shape, True, layout) for shape, of_expert in counts.shapes if of_expert)
    return max(moment.live - moment.of_experts for moment in passing) + FLOAT * experts


def _gathered(counts: ParameterCounts, layout: MeshLayout) -> int:
    """Bytes of gathered weights (as received and in place) and of a block's gradients before they are sent."""
    if layout.expert_size == 1:
        block = counts.unit
    else:
        of_experts = counts.expert_layer // layout.expert_size if layout.expert_shards > 1 else 0
        block = of_experts + (0 if layout.keeps_dense else counts.unit_without_experts)
    return FLOAT * block * (2 * _BUFFERED + 1)


def _bucket_sizes(counts: ParameterCounts) -> list[int]:
    """Count in each bucket in which the gradients of all except the experts are averaged."""
    dense = [torch.empty(shape, device="meta") for shape, of_expert in counts.shapes if not of_expert]
    return [sum(gradient.numel() for gradient in bucket) for bucket in buckets(dense[::-1])]


@dataclass(frozen=True)
class Traffic:
    """The bytes that a process sends, and the time for them."""

    bytes: float = 0  # bytes sent
    forward: float = 0  # seconds beside the forward pass's work
    backward: float = 0  # seconds beside the backward pass's work
    # seconds without overlap: tokens are sent to experts and back, or gradients are averaged after several passes
    between: float = 0
    copied: float = 0  # bytes read and written to concatenate weights and gradients for sending
    calls: int = 0  # operators that the host issues for it, in each pass or after them


def traffic_of(counts: ParameterCounts, layout: MeshLayout, trace: Trace, machine: Machine, network: float) -> Traffic:
    """Weights, gradients and tokens that travel in the passes; `network` is bytes/s between machines, per GPU."""
    n, share = layout.processes, layout.expert_size
    if n == 1:
        return Traffic()
    everyone = _ring(n, 1, machine, network)
    if layout.strategy == "ddp":
        sent = 2 * FLOAT * counts.whole * (n - 1) / n
        return Traffic(sent, 0, sent / everyone + LATENCY * counts.unit_count, 0, 4 * FLOAT * counts.whole)
    gathered = around = seconds = 0.0
    if not layout.keeps_dense:
        gathered = FLOAT * (counts.whole - counts.experts if share > 1 else counts.whole)
        around = gathered * (n - 1) / n
        seconds = around / everyone
    if share > 1 and layout.expert_shards > 1:
        of_experts = FLOAT * counts.experts / share * (layout.expert_shards - 1) / layout.expert_shards
        gathered += FLOAT * counts.experts / share
        around += of_experts
        seconds += of_experts / _ring(layout.expert_shards, share, machine, network)
    units = _gathered_units(counts, layout)
    seconds += LATENCY * units
    tokens = sum(trace.sent) * (share - 1) / share
    between = _exchange(trace.sent, share, machine, network) if share > 1 else 0
    return Traffic(3 * around + tokens, seconds, 2 * seconds, between, 3 * 2 * gathered, GATHERING_CALLS * units)


def averaging_of(
    counts: ParameterCounts, layout: MeshLayout, machine: Machine, network: float, accumulates: bool
) -> Traffic:
    """Traffic of a whole dense part's gradients: during the backward pass, or after the last of several."""
    if not layout.keeps_dense:
        return Traffic()
    dense, count = FLOAT * (counts.whole - counts.experts), len(_bucket_sizes(counts))
    sent = 2 * dense * (layout.processes - 1) / layout.processes
    seconds = sent / _ring(layout.processes, 1, machine, network) + LATENCY * count
    when = {"between" if accumulates else "backward": seconds}
    return Traffic(sent, **when, copied=_AVERAGING_PASSES * 2 * dense, calls=_AVERAGING_CALLS * count)


def _gathered_units(counts: ParameterCounts, layout: MeshLayout) -> int:
    """The number of the model's units that are gathered one by one."""
    if not layout.keeps_dense:
        return counts.unit_count
    return counts.moe_count if layout.expert_shards > 1 else 0


def _exchange(sent: list[int], share: int, machine: Machine, network: float) -> float:
    """Seconds to send tokens to experts and back, within a machine and between machines at once."""
    inside = min(share, machine.count)
    beyond = sum(sent) * (share - inside) / share
    within = sum(sent) * (inside - 1) / share / machine.link
    return len(sent) * LATENCY + max(beyond / network if beyond else 0, within)


def _ring(count: int, stride: int, machine: Machine, network: float) -> float:
    """Bytes/s of a ring through `count` processes, every `stride`-th one. Each process has its own adapter."""
    if (count - 1) * stride < machine.count:
        return machine.link
    return min(machine.link, network * max(1, min(count, machine.count // stride)))
