"""The roofline of a case: a layer's times beside the device's limits.

T tokens of width D, R = T*K rows; E experts of hidden width H. A floor is the larger of FLOPs / the matrix products'
peak and bytes / the bandwidth of a large copy, both measured in the run. Bytes are the least that must move: each input
and output once, without padding. For a layer these are its input, result, weights and their gradients, as if all else
stayed on the chip. A stage has its own inputs and outputs.
"""

from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from vmoe.bench.cases import LayerCase
from vmoe.bench.figure import SERIES, dress, new_figure
from vmoe.bench.layer import layer_jobs
from vmoe.bench.report import Column, Row
from vmoe.bench.timing import Measurement
from vmoe.figures.style import INK, MUTED

FLOOR_COLUMNS = (
    Column("", "name"),
    Column("ms", "ms", "#.4g"),
    Column("floor ms", "floor_ms", "#.4g"),
    Column("time / floor", "over_floor", ".2f"),
    Column("GFLOP", "gflop", ",.1f"),
    Column("MB", "megabytes", ",.0f"),
    Column("TFLOP/s", "tflops", "#.4g"),
    Column("GB/s", "gigabytes_per_s", ",.1f"),
)
LAYERS = ("dense", "experts", "layer", "dense inference", "experts inference", "layer inference")
# Stages of the fused experts by parts of their kernels' names; the first match counts
PRODUCTS, CASTS, REST = "products", "weights cast", "all else"
KERNELS = {
    "_scatter": "dispatch",
    "_activate": "GELU",
    "_combine": "combine",
    "_combine_gradient": "combine, gradient",
    "_activation_gradient": "GELU, gradient",
    "_gather_sum": "dispatch, gradient",
    "_rows_by_weights": PRODUCTS,
    "_weight_gradient": PRODUCTS,
}
LIBRARY = {"gemm": PRODUCTS, "nvjet": PRODUCTS, "cutlass": PRODUCTS, "xmma": PRODUCTS, "copy_kernel": CASTS}
_PROFILED_STEPS = 5


@dataclass(frozen=True)
class LeastWork:
    """The least work: floating-point operations, and bytes read and written."""

    flops: float
    bytes: float


def layer_work(case: LayerCase, name: str, dtype: torch.dtype) -> LeastWork:
    """The least work of one of `LAYERS`, without the router's."""
    size = dtype.itemsize
    is_dense = name.startswith("dense")
    tokens = case.num_tokens * (case.top_k if is_dense else 1) * case.width
    weights = 2 * case.width * case.hidden * (1 if is_dense else case.num_experts)
    if name.endswith("inference"):
        return LeastWork(case.forward_flops, size * (2 * tokens + weights))
    # float32: input, weights and the gradients of both; in the low type: the result and its gradient
    return LeastWork(case.flops, 2 * 4 * (tokens + weights) + 2 * size * tokens)


def stage_work(case: LayerCase, dtype: torch.dtype) -> dict[str, LeastWork]:
    """The least work of each stage of the fused experts' forward and backward pass with a given routing, by name."""
    size = dtype.itemsize
    tokens, rows = case.num_tokens * case.width, case.num_tokens * case.top_k * case.width
    hidden = case.num_tokens * case.top_k * case.hidden
    weights = 2 * case.num_experts * case.width * case.hidden
    return {
        # two products forward, two for the rows' and two for the weights' gradients, which are float32
        PRODUCTS: LeastWork(case.flops, size * (6 * (rows + hidden) + 2 * weights) + 4 * weights),
        CASTS: LeastWork(0, (4 + size) * weights),
        "dispatch": LeastWork(0, 4 * tokens + size * rows),
        "GELU": LeastWork(0, size * 2 * hidden),
        "combine": LeastWork(0, size * (rows + tokens)),
        "combine, gradient": LeastWork(0, size * (tokens + 2 * rows)),
        "GELU, gradient": LeastWork(0, size * 3 * hidden),
        "dispatch, gradient": LeastWork(0, size * rows + 4 * tokens),
    }


def layer_floors(
    results: dict[str, Measurement], case: LayerCase, dtype: torch.dtype, peak: float, bandwidth: float
) -> list[Row]:
    """Rows of the measured layers. `peak` is the rate of products in FLOP/s, `bandwidth` that of a copy in bytes/s."""
    return [
        _floor_row(name, results[name].median, layer_work(case, name, dtype), peak, bandwidth)
        for name in LAYERS
        if name in results and results[name].error is None
    ]


def stage_floors(case: LayerCase, device: torch.device, dtype: torch.dtype, peak: float, bandwidth: float) -> list[Row]:
    """Rows of the stages of the fused experts' forward and backward pass on a GPU, from the profiler's kernel times.

    Empty if other kernels than the fused ones ran.
    """
    times = _kernel_times(layer_jobs(case, device, dtype)["experts"](), device)
    stages: dict[str, float] = {}
    for kernel, time_ms in times.items():
        stages[stage_of(kernel)] = stages.get(stage_of(kernel), 0.0) + time_ms
    if "dispatch" not in stages:
        return []
    work = stage_work(case, dtype)
    order = sorted(stages, key=lambda stage: (stage == REST, -stages[stage]))
    rows = [_floor_row(stage, stages[stage], work.get(stage), peak, bandwidth) | {"stage": True} for stage in order]
    return [*rows, _sum_row(rows)]


def stage_of(kernel: str) -> str:
    """The stage that a kernel of the profiler belongs to."""
    if kernel in KERNELS:
        return KERNELS[kernel]
    return next((stage for part, stage in LIBRARY.items() if part in kernel.lower()), REST)


def _kernel_times(job, device: torch.device) -> dict[str, float]:
    """Milliseconds per call of each kernel."""
    for _ in range(3):
        job()
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(_PROFILED_STEPS):
            job()
        torch.cuda.synchronize(device)
    return {
        event.key: event.self_device_time_total / _PROFILED_STEPS / 1e3
        for event in profile.key_averages()
        if event.self_device_time_total > 0
    }


def _sum_row(stages: list[Row]) -> Row:
    """The sum of all stages: the kernels' times, and the sum of their floors."""
    time_ms, floor_ms = (sum(row.get(key, 0.0) for row in stages) for key in ("ms", "floor_ms"))
    return {"name": "all stages", "ms": time_ms, "floor_ms": floor_ms, "over_floor": time_ms / floor_ms, "stage": True}


def _floor_row(name: str, time_ms: float, work: LeastWork | None, peak: float, bandwidth: float) -> Row:
    row = {"name": name, "ms": time_ms}
    if work is None:
        return row
    floor_ms = max(work.flops / peak, work.bytes / bandwidth) * 1e3
    row |= {"floor_ms": floor_ms, "over_floor": time_ms / floor_ms, "megabytes": work.bytes / 1e6}
    row["gigabytes_per_s"] = work.bytes / time_ms / 1e6
    if work.flops:
        row |= {"gflop": work.flops / 1e9, "tflops": work.flops / time_ms / 1e9, "intensity": work.flops / work.bytes}
    return row


def draw_roofline(rows: list[Row], peak: float, bandwidth: float, title: str) -> Figure:
    """Draws on the left the rates over FLOPs per byte, under the roof; on the right each time with its floor."""
    figure = new_figure(10, 4.2, title)
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _draw_roof(left, [row for row in rows if "intensity" in row], peak, bandwidth)
    _draw_floors(right, rows)
    return figure


def _draw_roof(axes: Axes, rows: list[Row], peak: float, bandwidth: float) -> None:
    ridge = peak / bandwidth
    dress(axes, "rate under the roof", "FLOPs per byte that must move", "TFLOP/s")
    intensities = [ridge, *(row["intensity"] for row in rows)]
    low, high = min(intensities) / 3, max(intensities) * 3
    roof = [(x, min(peak, bandwidth * x) / 1e12) for x in (low, ridge, high)]
    axes.plot(*zip(*roof, strict=True), color=INK, linewidth=1.2)
    axes.annotate(
        f"{peak / 1e12:.3g} TFLOP/s · {bandwidth / 1e9:,.0f} GB/s", (high, peak / 1e12), xytext=(0, 4),
        textcoords="offset points", ha="right", fontsize=8, color=INK,
    )  # fmt: skip
    for row in rows:
        colour = SERIES.get(row["name"].split()[0], MUTED)
        hollow = row["name"].endswith("inference")
        axes.plot(
            row["intensity"], row["tflops"], marker="D" if row.get("stage") else "o", markersize=6, linestyle="",
            color=colour, markerfacecolor="white" if hollow else colour, label=row["name"],
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    axes.margins(y=0.12)
    axes.legend(fontsize=8, frameon=False, labelcolor=INK, loc="lower right")


def _draw_floors(axes: Axes, rows: list[Row]) -> None:
    dress(axes, "time, and its floor (dark)", "ms", "")
    names = [row["name"] for row in rows]
    axes.barh(names, [row["ms"] for row in rows], color="#cfe3f4", height=0.7)
    axes.barh(names, [row.get("floor_ms", 0.0) for row in rows], color=SERIES["layer"], height=0.7)
    for at, row in enumerate(rows):
        axes.annotate(
            f"{row['ms']:.3g}", (row["ms"], at), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7,
            color=INK,
        )  # fmt: skip
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
