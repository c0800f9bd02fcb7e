"""The planner: a step's memory and time in every layout, the best first."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

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
from vmoe.checkpoints import build_model
from vmoe.moe import MoeConfig

Traces = dict[tuple[int, int | None], Trace]  # by images of a process and expert_size
STRATEGIES = ("none", "ddp", "fsdp", "expert")  # from simple to complicated
_UPDATE_FLOATS = 7  # of a parameter: weight, gradient and moments read, weight and moments written
_CLIP_FLOATS = 3  # the gradient read for the norm, then scaled
_EQUALLY_FAST = 0.1  # steps that differ by less are equal, as exactly as this plans: then the simpler layout is better


class Workload(NamedTuple):
    """What is trained.

    Attributes:
        name: Of the timm model.
        kwargs: Its arguments.
        moe: Its MoE layers; None for none.
        classes: Number of classes.
        image_size: Side in pixels.
        batch: Images of a batch, of all processes.
        accumulate: Batches an update.
        dtype: Of autocast; float32 for none.
        mixes: Whether targets are shares of all classes.
        moments: Numbers that the optimiser keeps a parameter.
        has_average: Whether an average of the weights is kept.
        graphed: Whether the step is captured as a CUDA graph, which the host launches as one.
    """

    name: str
    kwargs: dict
    moe: MoeConfig | None
    classes: int
    image_size: int
    batch: int
    accumulate: int = 1
    dtype: torch.dtype = torch.bfloat16
    mixes: bool = False
    moments: int = 2
    has_average: bool = False
    graphed: bool = False

    def model(self) -> torch.nn.Module:
        """It, on the meta device.

        Raises:
            UserError: timm has no such model, or it cannot be built so.
        """
        with torch.device("meta"):
            kwargs = {**self.kwargs, "pretrained": False}
            return build_model(self.name, kwargs, self.moe, self.classes, self.image_size)


@dataclass(frozen=True)
class Times:
    """Seconds of an update, on the GPU; they add up to the step unless the host is slower.

    Attributes:
        compute: In products and attention.
        memory: In what moves data through memory: all other operators, the optimiser's update.
        network: In which the GPU waits for other processes.
        host: By which the host needs longer to issue the work than the GPU to do it.
    """

    compute: float
    memory: float
    network: float
    host: float

    @property
    def step(self) -> float:
        """All together."""
        return self.compute + self.memory + self.network + self.host


@dataclass(frozen=True)
class LayoutPlan:
    """A layout and what it means for each process.

    Attributes:
        layout: The layout.
        memory: Bytes; None where the layout does not fit the model or batch.
        times: Seconds.
        sent: Bytes that a process sends in an update.
        missing: Why it is not feasible; None where it is.
    """

    layout: MeshLayout
    memory: StepMemory | None
    times: Times | None
    sent: float
    missing: str | None


def layouts_for(processes: int, moe: MoeConfig | None) -> list[MeshLayout]:
    """Every layout of so many processes; `expert_size` divides their number and that of the experts."""
    if processes == 1:
        return [MeshLayout("none", 1)]
    layouts = [MeshLayout("ddp", processes), MeshLayout("fsdp", processes)]
    if moe is not None:
        for size in range(2, processes + 1):
            if processes % size == 0 and moe.num_experts % size == 0:
                layouts += [MeshLayout("expert", processes, size, dense) for dense in ("cut", "whole")]
    return layouts


def make_plans(
    workload: Workload,
    layouts: list[MeshLayout],
    machine: Machine,
    network: float,
    refusal: Callable[[MeshLayout], str | None] = lambda layout: None,
    traces: Traces | None = None,
) -> list[LayoutPlan]:
    """Plans of all layouts: feasible ones by falling speed, of equally fast ones the simplest first; then the others.

    Args:
        workload: What is trained.
        layouts: To be compared.
        machine: Of each process.
        network: Bytes/s between machines, of a GPU.
        refusal: Why a layout cannot share the batches or experts; None where it can.
        traces: Of this workload, from an earlier call; gets those that are missing.
    """
    plans, traces = [], {} if traces is None else traces
    sizes = ParameterCounts.of(workload.model())
    for layout in layouts:
        reason = refusal(layout) or _misfit(sizes, layout)
        if reason is not None:
            plans.append(LayoutPlan(layout, None, None, 0, reason))
            continue
        images, exchanged = workload.batch // layout.processes, layout.expert_size if layout.expert_size > 1 else None
        if (images, exchanged) not in traces:
            targets = workload.classes if workload.mixes else None
            step = (images, workload.image_size, workload.dtype, targets, exchanged, machine.name != "cpu")
            traces[images, exchanged] = trace_step(workload.model(), *step)
        plans.append(_plan_layout(workload, layout, sizes, traces[images, exchanged], machine, network))
    feasible = [plan for plan in plans if plan.missing is None]
    best = min((plan.times.step for plan in feasible), default=0)
    feasible.sort(key=lambda plan: _order(plan, best))
    others = [plan for plan in plans if plan.missing is not None]
    others.sort(key=lambda plan: (plan.memory is None, plan.memory.peak if plan.memory else 0))
    return feasible + others


def _order(plan: LayoutPlan, best: float) -> tuple[int, bool, float]:
    """Among the best, simpler strategies come first, and those that keep less of the model."""
    if plan.times.step > best * (1 + _EQUALLY_FAST):
        return len(STRATEGIES), False, plan.times.step
    return STRATEGIES.index(plan.layout.strategy), plan.layout.keeps_dense, plan.times.step


def _misfit(sizes: ParameterCounts, layout: MeshLayout) -> str | None:
    """Why experts that are dealt out cannot be cut further; None where they can."""
    if layout.strategy != "expert":
        return None
    odd = next((shape[1] for shape, of_expert in sizes.shapes if of_expert and shape[1] % layout.parts), None)
    return None if odd is None else f"experts of width {odd} cannot be cut into {layout.parts} parts"


def _plan_layout(
    workload: Workload, layout: MeshLayout, sizes: ParameterCounts, trace: Trace, machine: Machine, network: float
) -> LayoutPlan:
    workspace = 0 if machine.name == "cpu" else WORKSPACE
    how = (workload.moments, workload.has_average, workspace, workload.accumulate > 1)
    memory = memory_of(sizes, layout, trace, *how)
    traffic = traffic_of(sizes, layout, trace, machine, network)
    averaging = averaging_of(sizes, layout, machine, network, workload.accumulate > 1)
    sent = traffic.bytes * (workload.accumulate if layout.is_cut else 1) + averaging.bytes
    times = times_of(workload, layout, sizes, trace, machine, traffic, averaging)
    missing = None
    if memory.peak > machine.memory:
        gib = 2**30
        missing = (
            f"memory: needs {memory.peak / gib:.1f} of {machine.memory / gib:.1f} GiB, "
            f"{(memory.peak - machine.memory) / gib:.1f} too few"
        )
    return LayoutPlan(layout, memory, times, sent, missing)


def times_of(
    workload: Workload, layout: MeshLayout, sizes: ParameterCounts, trace: Trace, machine: Machine, traffic: Traffic,
    averaging: Traffic,
) -> Times:  # fmt: skip
    """Seconds of an update.

    Weights and gradients travel while a pass is computed, and count only as far as they take longer; tokens, and
    gradients that are averaged after several passes, count always.
    """
    parts = [_pass_times([work for work in trace.work if work.is_backward is back], machine) for back in (False, True)]
    beside = (traffic.forward, traffic.backward + averaging.backward)
    compute = sum(part[0] for part in parts)
    moving = sum(part[1] for part in parts) + traffic.copied / machine.bandwidth
    hidden = [part[0] + part[1] if machine.overlaps else 0.0 for part in parts]
    waiting = [max(0.0, net - hides) for net, hides in zip(beside, hidden, strict=True)]
    issuing = traffic.calls * machine.host_call
    # A GPU computes while the host issues more; a CPU does one after the other
    beside_host = [
        part[0] + part[1] + wait if machine.overlaps else 0.0 for part, wait in zip(parts, waiting, strict=True)
    ]
    slow_host = sum(max(0.0, part[2] + issuing - done) for part, done in zip(parts, beside_host, strict=True))
    copying = averaging.copied / machine.bandwidth
    beside_averaging = copying + averaging.between if machine.overlaps else 0.0
    slow_averaging = max(0.0, averaging.calls * machine.host_call - beside_averaging)
    kept = kept_parameters(sizes, layout)
    floats = _UPDATE_FLOATS - 2 * (2 - workload.moments) + _CLIP_FLOATS + (5 if workload.has_average else 0)
    update = FLOAT * kept * floats / machine.update
    times = workload.accumulate
    exchanges = 1 if layout.strategy == "ddp" else times  # ddp's gradients travel once an update
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
