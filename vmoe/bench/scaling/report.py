"""Compares rows: equal results, scaling, and the planner's predictions."""

from typing import Any

import torch

from vmoe.bench.plan.hardware import NETWORKS, Machine
from vmoe.bench.plan.planner import make_plans
from vmoe.bench.report import Column, Row
from vmoe.bench.scaling.jobs import ScalingJob

# The largest difference from one process that rounding explains, in weights and in losses. In float32 and bfloat16 a
# gradient may be rounding alone, such as that of a key's bias. AdamW turns it into a step of up to its rate (1e-3).
BOUNDS = {"float64": (1e-9, 1e-9), "float32": (1e-5, 1e-5), "bfloat16": (6.1e-3, 1e-2)}
_LAYOUT = (Column("layout", "layout"), Column("processes", "processes"))
_DIFFERENCES = (
    Column("weights", "weights", ".1e"),
    Column("beyond the bound", "weights_beyond", ".2%"),
    Column("losses", "loss", ".1e"),
    Column("gradients", "gradients", ".1e"),
    Column("bound", "bound", ".0e"),
    Column("within", "within"),
)
SCALING_TABLES = {
    "equality": (*_LAYOUT, Column("type", "dtype"), *_DIFFERENCES),
    "speed": (
        *_LAYOUT,
        Column("model", "model"),
        Column("E", "experts"),
        Column("batch", "batch"),
        Column("ms", "step_ms", "#.4g"),
        Column("spread", "spread", ".1%"),
        Column("img/s per process", "images_per_second_per_process", ",.0f"),
        Column("weak", "weak", ".1%"),
        Column("strong", "strong", ".1%"),
        Column("beside ddp", "beside_ddp", ".3f"),
        Column("MiB", "peak_mib", ",.0f"),
        Column("ms predicted", "predicted_ms", "#.4g"),
        Column("ratio", "time_ratio", ".2f"),
        Column("MiB predicted", "predicted_mib", ",.0f"),
        Column("ratio", "memory_ratio", ".2f"),
    ),
    "checkpoint": (
        *_LAYOUT,
        Column("s to save", "save_seconds", ".2f"),
        Column("MiB", "checkpoint_mib", ",.1f"),
        *_DIFFERENCES,
    ),
}


def differences_from_one(result: dict[str, Any], one: dict[str, Any], dtype: str) -> Row:
    """The differences of a training's results from those of one process.

    Args:
        result: `losses`, and `weights` and first `moments` of the gradients by a parameter's name.
        one: The same from one process. The losses of a resumed training are compared with its last ones.
        dtype: Type of both.
    """
    bound, loss_bound = BOUNDS[dtype]
    weights, moments = (
        {name: (result[kind][name] - value).abs() for name, value in one[kind].items()}
        for kind in ("weights", "moments")
    )
    losses = zip(result["losses"], one["losses"][-len(result["losses"]) :], strict=True)
    worst, loss = _largest(weights), max(abs(ours - other) for ours, other in losses)
    beyond = sum(int((difference > bound).sum()) for difference in weights.values())
    return {
        "weights": worst,
        "weights_beyond": beyond / sum(difference.numel() for difference in weights.values()),
        "loss": loss,
        "gradients": _largest(moments) / _largest(one["moments"]),
        "bound": bound,
        "loss_bound": loss_bound,
        "within": worst <= bound and loss <= loss_bound,
    }


def _largest(tensors: dict[str, torch.Tensor]) -> float:
    return max(float(tensor.abs().max()) for tensor in tensors.values())


def add_scaling(rows: list[Row]) -> None:
    """Adds to rows of speed their efficiency relative to one process, in weak and in strong scaling."""
    names = ("model", "experts", "layout", "processes", "batch")
    rates = {
        tuple(row[name] for name in names): row["images_per_second_per_process"] for row in rows if "step_ms" in row
    }
    for row in rows:
        if "step_ms" not in row or row["processes"] == 1:
            continue
        others = {
            "weak": ("none", 1, row["batch"] // row["processes"]),
            "strong": ("none", 1, row["batch"]),
            "beside_ddp": ("ddp", row["processes"], row["batch"]),
        }
        for name, other in others.items():
            if rate := rates.get((row["model"], row["experts"], *other)):
                row[name] = row["images_per_second_per_process"] / rate


def predicted(job: ScalingJob, row: Row, machine: Machine) -> Row:
    """The planner's peak memory and time of a step, and their ratios to the measured ones."""
    (plan,) = make_plans(job.workload, [job.layout], machine, NETWORKS["ib-400"].bandwidth)
    step_ms, memory = plan.times.step * 1e3, plan.memory.peak / 2**20
    result = {"predicted_ms": step_ms, "time_ratio": step_ms / row["step_ms"]}
    if machine.name == "cpu":  # there a process's memory includes Python and libraries
        return result
    return result | {"predicted_mib": memory, "memory_ratio": memory / row["peak_mib"]}
