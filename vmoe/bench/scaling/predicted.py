"""What the planner says of the trainings that were measured."""

from typing import Any

import torch

from vmoe.bench.plan.hardware import NETWORKS, Machine
from vmoe.bench.plan.layouts import MeshLayout
from vmoe.bench.plan.planner import Workload, make_plans
from vmoe.bench.scaling.jobs import CLASSES, Job, Model

MIB = 2**20


def predicted(row: dict[str, Any], model: Model, machine: Machine) -> dict[str, Any]:
    """Peak memory and time of a step by the planner, and their ratios to what was measured.

    Args:
        row: Of a training on one machine whose memory and time were measured.
        model: Its model; its depth is that of the row, where this tells of blocks.
        machine: Of each process.
    """
    kwargs = {**model.kwargs, **({"depth": row["blocks"]} if row.get("blocks") else {})}
    how = (row["layout"].split()[0], row["expert_size"], row["dense"])
    layout = MeshLayout(how[0], row["processes"], *how[1:])
    moe = Job("speed", row["processes"], *how, model, row["experts"], row["batch"], row["dtype"]).moe()
    dtype = getattr(torch, row["dtype"])
    graphed = row["graphed"]
    workload = Workload(model.name, kwargs, moe, CLASSES, model.image_size, row["batch"], dtype=dtype, graphed=graphed)
    (plan,) = make_plans(workload, [layout], machine, NETWORKS["ib-400"].bandwidth)
    step_ms = plan.times.step * 1e3
    told = {"predicted_ms": step_ms, "time_ratio": step_ms / row["step_ms"]}
    if machine.name == "cpu":  # where a process's memory is that of Python and libraries too
        return told
    memory = plan.memory.peak / MIB
    return told | {"predicted_mib": memory, "memory_ratio": memory / max(row["peak_mib"])}
