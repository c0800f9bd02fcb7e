"""The planner: memory and time of a step in every mesh layout, sorted with the best first."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vmoe.bench.plan.hardware import UNHIDDEN, WORKSPACE, Machine
from vmoe.bench.plan.layouts import (
    FLOAT,
    MeshLayout,
    ParameterCounts,
    StepMemory,
    Traffic,
    averaging_of,
    kept_parameters,
    memory_of,
    traffic_of,
)
from vmoe.bench.plan.trace import OperatorWork, Trace, trace_step
from vmoe.bench.plan.workload import Workload
from vmoe.moe import MoeConfig

Traces = dict[tuple[int, int | None], Trace]  # by images per process and expert_size
STRATEGIES = ("none", "ddp", "fsdp", "expert")  # from simple to complicated
_UPDATE_FLOATS = 7  # per parameter: weight, gradient and moments are read, weight and moments are written
_CLIP_FLOATS = 3  # the gradient is read for the norm, then scaled
_EQUALLY_FAST = (
    0.1  # steps that differ by less count as equal, since plans are not more exact: the simpler layout comes first
)


@dataclass(frozen=True)
class Times:
    """Seconds of an update on the GPU; they add up to the step."""

    compute: float  # time of products and attention
    memory: float  # time of all other operators and of the optimiser's update, which move data through memory
    network: float  # time in which the GPU waits for the network
    host: float  # time by which the host needs longer to issue the work than the GPU needs to do it

    @property
    def step(self) -> float:
        """The sum."""
        return self.compute + self.memory + self.network + self.host


@dataclass(frozen=True)
class LayoutPlan:
    """A mesh layout with its memory and time per process."""

    layout: MeshLayout
    memory: StepMemory | None  # bytes; None where the layout does not fit the model or batch
    times: Times | None  # seconds; None there too
    sent: float  # bytes that a process sends in an update
    missing: str | None  # why it is not feasible; None where it is


def layouts_for(processes: int, moe: MoeConfig | None) -> list[MeshLayout]:
    """Every mesh layout of this many processes. `expert_size` divides their number and that of the experts."""
    if processes == 1:
        return [MeshLayout("none", 1)]
    layouts = [MeshLayout("ddp", processes), MeshLayout("fsdp", processes)]
    if moe is not None:
        for size in range(2, processes + 1):
            if processes % size == 0 and moe.num_experts % size == 0:
                layouts += [MeshLayout("expert", processes, size, dense) for dense in ("shard", "whole")]
    return layouts


def make_plans(
    workload: Workload,
    layouts: list[MeshLayout],
    machine: Machine,
    network: float,
    refusal: Callable[[MeshLayout], str | None] = lambda layout: None,
    traces: Traces | None = None,
) -> list[LayoutPlan]:
    """Plans of all layouts: feasible ones by descending speed (on a tie the simplest first), then the others.

    Args:
        workload: The model and its training.
        layouts: The layouts to compare.
        machine: The rates of each process.
        network: Bytes/s between machines, per GPU.
        refusal: Returns the reason why a layout cannot share the batches or experts, or None.
        traces: Traces of this workload from an earlier call. Missing ones are added.
    """
    plans, traces = [], {} if traces is None else traces
    counts = ParameterCounts.of(workload.meta_model())
    for layout in layouts:
        reason = refusal(layout) or _misfit(counts, layout)
        if reason is not None:
            plans.append(LayoutPlan(layout, None, None, 0, reason))
            continue
        key = workload.batch // layout.processes, layout.expert_size if layout.expert_size > 1 else None
        if key not in traces:
            traces[key] = trace_step(
                workload.meta_model(), key[0], workload.image_size, workload.dtype, expert_size=key[1],
                targets=workload.classes if workload.mixes else None, like_gpu=machine.name != "cpu",
            )  # fmt: skip
        plans.append(_plan_layout(workload, layout, counts, traces[key], machine, network))
    feasible = [plan for plan in plans if plan.missing is None]
    best = min((plan.times.step for plan in feasible), default=0)
    feasible.sort(key=lambda plan: _order(plan, best))
    others = [plan for plan in plans if plan.missing is not None]
    others.sort(key=lambda plan: (plan.memory is None, plan.memory.peak if plan.memory else 0))
    return feasible + others


def _order(plan: LayoutPlan, best: float) -> tuple[int, bool, float]:
    """The sort key. Among the best, simpler strategies come first, then those that keep less of the model."""
    if plan.times.step > best * (1 + _EQUALLY_FAST):
        return len(STRATEGIES), False, plan.times.step
    return STRATEGIES.index(plan.layout.strategy), plan.layout.keeps_dense, plan.times.step


def _misfit(counts: ParameterCounts, layout: MeshLayout) -> str | None:
    """The reason why sharded experts cannot be sharded further, or None."""
    if layout.strategy != "expert":
        return None
    odd = next((shape[1] for shape, of_expert in counts.shapes if of_expert and shape[1] % layout.expert_shards), None)
    return None if odd is None else f"experts of width {odd} cannot be sharded over {layout.expert_shards} ranks"


def _plan_layout(
    workload: Workload, layout: MeshLayout, counts: ParameterCounts, trace: Trace, machine: Machine, network: float
) -> LayoutPlan:
    memory = memory_of(counts, layout, trace, workload, 0 if machine.name == "cpu" else WORKSPACE)
    traffic = traffic_of(counts, layout, trace, machine, network)
    averaging = averaging_of(counts, layout, machine, network, workload.accumulate > 1)
    sent = traffic.bytes * (workload.accumulate if layout.is_sharded else 1) + averaging.bytes
    times = times_of(workload, layout, counts, trace, machine, traffic, averaging)
    missing = None
    if memory.peak > machine.memory:
        gib = 2**30
        missing = (
            f"memory: needs {memory.peak / gib:.1f} of {machine.memory / gib:.1f} GiB, "
            f"{(memory.peak - machine.memory) / gib:.1f} too few"
        )
    return LayoutPlan(layout, memory, times, sent, missing)


def times_of(
    workload: Workload, layout: MeshLayout, counts: ParameterCounts, trace: Trace, machine: Machine, traffic: Traffic,
    averaging: Traffic,
) -> Times:  # fmt: skip
    """Seconds of an update.

    Weights and gradients are sent while a pass is computed, so only the time beyond the pass counts. Tokens always
    count, and so do gradients that are averaged after several passes.
    """
    parts = [_pass_times([work for work in trace.work if work.is_backward is back], machine) for back in (False, True)]
    beside = (traffic.forward, traffic.backward + averaging.backward)
    compute = sum(part[0] for part in parts)
    moving = sum(part[1] for part in parts) + traffic.copied / machine.bandwidth
    hidden = [part[0] + part[1] if machine.overlaps else 0.0 for part in parts]
    waiting = [max(0.0, net - hides) for net, hides in zip(beside, hidden, strict=True)]
    issuing = traffic.calls * machine.host_call
    # a GPU computes while the host issues more; a CPU does both in turn
    beside_host = [
        part[0] + part[1] + wait if machine.overlaps else 0.0 for part, wait in zip(parts, waiting, strict=True)
    ]
    slow_host = sum(max(0.0, part[2] + issuing - done) for part, done in zip(parts, beside_host, strict=True))
    copying = averaging.copied / machine.bandwidth
    beside_averaging = copying + averaging.between if machine.overlaps else 0.0
    slow_averaging = max(0.0, averaging.calls * machine.host_call - beside_averaging)
    kept = kept_parameters(counts, layout)
    floats = _UPDATE_FLOATS - 2 * (2 - workload.moments) + _CLIP_FLOATS + (5 if workload.has_average else 0)
    update = FLOAT * kept * floats / machine.update
    times = workload.accumulate
    exchanges = 1 if layout.strategy == "ddp" else times  # ddp sends gradients once per update
    network = exchanges * (sum(waiting) + traffic.between) + averaging.between
    host = 0.0 if workload.graphed else times * slow_host + slow_averaging
    return Times(times * compute, times * moving + copying + update, network, host)


def _pass_times(works: list[OperatorWork], machine: Machine) -> tuple[float, float, float]:
    """Seconds of computing, of moving data, and of the host."""
    compute = moving = calls = 0.0
    for work in works:
        calls += work.calls
        if work.kind == "products":
            rate = machine.products if work.dtype != torch.float32 else machine.products32
            compute += work.flops / rate
            moving += UNHIDDEN * work.bytes / machine.bandwidth
        elif work.kind == "attention":
            compute += work.flops / (machine.attention if work.dtype != torch.float32 else machine.attention / 2)
        else:
            moving += work.bytes / machine.elementwise
    return compute, moving, calls * machine.host_call
