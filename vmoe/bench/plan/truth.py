"""Compares the planner with one GPU: peak memory and time of a step, predicted and measured."""

import statistics
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from vmoe.bench.plan.hardware import Machine
from vmoe.bench.plan.layouts import MeshLayout
from vmoe.bench.plan.planner import LayoutPlan, Traces, make_plans
from vmoe.bench.plan.workload import Workload
from vmoe.bench.report import Column, Row
from vmoe.bench.timing import Log, TimedJob, reason_of_failure, release, time_calls
from vmoe.models.members import ensemble_size, of_rows
from vmoe.moe import MoeConfig, auxiliary_loss

MEASURED_MODELS = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")
MEASURED_EXPERTS = (0, 8, 32)
MEASURED_BATCHES = (64, 256)
MEASURED_COLUMNS = (
    Column("model", "model"),
    Column("experts", "experts"),
    Column("images", "images"),
    Column("GiB predicted", "predicted_gib", ".2f"),
    Column("measured", "measured_gib", ".2f"),
    Column("ratio", "memory_ratio", ".2f"),
    Column("ms predicted", "predicted_ms", ".1f"),
    Column("by table", "table_ms", ".1f"),
    Column("measured", "measured_ms", ".1f"),
    Column("ratio", "time_ratio", ".2f"),
    Column("by table", "table_ratio", ".2f"),
    Column("compute", "compute", ".0%"),
    Column("memory", "memory", ".0%"),
    Column("host", "host", ".0%"),
)


class PlannedCase(NamedTuple):
    """A model and a batch."""

    model: str
    experts: int
    images: int

    def workload(self, image_size: int, dtype: torch.dtype) -> Workload:
        """The workload. If there are experts, every second block has an MoE layer with K=2."""
        moe = None
        if self.experts:
            moe = MoeConfig(layers="every-2", num_experts=self.experts, top_k=2, batch_priority=True)
        return Workload(self.model, {}, moe, 1000, image_size, self.images, dtype=dtype)


def measured_beside_predicted(
    cases: Iterable[PlannedCase], image_size: int, table: Machine, measured: Machine, device: torch.device,
    dtype: torch.dtype, log: Log,
) -> Iterable[Row]:  # fmt: skip
    """A row for each case, even if it does not fit into memory.

    There are two predictions: with the rates of the `table`, and with those `measured`. Autocast is to `dtype`.
    """
    for case in cases:
        name = f"{case.model}, E={case.experts}, {case.images} images"
        log(f"plans {name}")
        workload = case.workload(image_size, dtype)
        traces: Traces = {}  # traces hold no rates, so both predictions share them
        plan, by_table = (
            make_plans(workload, [MeshLayout("none", 1)], machine, 1.0, traces=traces)[0]
            for machine in (measured, table)
        )
        log(f"runs {name}")
        yield _case_row(case, plan, by_table, _measured_step(workload, device, name))
        release(device)


def _case_row(case: PlannedCase, plan: LayoutPlan, by_table: LayoutPlan, measured: Row) -> Row:
    predicted, step, table = plan.memory.peak / 2**30, plan.times.step * 1e3, by_table.times.step * 1e3
    gib, ms = measured["measured_gib"], measured["measured_ms"]
    shares = {share: getattr(plan.times, share) / plan.times.step for share in ("compute", "memory", "host")}
    return case._asdict() | {
        "predicted_gib": predicted,
        "predicted_ms": step,
        "table_ms": table,
        **measured,
        "memory_ratio": predicted / gib if gib else None,
        "time_ratio": step / ms if ms else None,
        "table_ratio": table / ms if ms else None,
        "planned_not_to_fit": plan.missing is not None,
        **shares,
    }


def _measured_step(workload: Workload, device: torch.device, name: str) -> Row:
    """`measured_gib` (the peak, None off CUDA) and `measured_ms` of a step; with `error` where it cannot run."""
    release(device)
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    try:
        step = _trainer_step(workload, device)
        for _ in range(2):
            step()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        ms = statistics.median(time_calls(step, device, 2) for _ in range(4))
        gib = (torch.cuda.max_memory_allocated(device) - before) / 2**30 if on_gpu else None
        return {"measured_gib": gib, "measured_ms": ms}
    except Exception as error:  # such as a lack of memory, after which the other cases still run
        return {"measured_gib": None, "measured_ms": None, "error": reason_of_failure(name, error, device)}


def _trainer_step(workload: Workload, device: torch.device) -> TimedJob:
    """A step in the trainer's order: the old gradients are freed after the forward pass."""
    with device:
        model = workload.build()
        images = torch.randn(workload.batch, 3, workload.image_size, workload.image_size)
        labels = torch.randint(workload.classes, (workload.batch,))
    model.train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    enabled = workload.dtype != torch.float32

    def step():
        with torch.autocast(device.type, workload.dtype, enabled=enabled):
            loss = F.cross_entropy(model(images), of_rows(labels, ensemble_size(model))) + auxiliary_loss(model)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step
