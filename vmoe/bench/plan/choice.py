"""The planner for a run's config: its workload, its layouts, and the choice of `parallel.strategy: auto`."""

import dataclasses

import torch

from vmoe.bench.plan.hardware import USUAL_NETWORK, Machine, gpu_of_this_machine, network_bandwidth
from vmoe.bench.plan.layouts import MeshLayout
from vmoe.bench.plan.planner import LayoutPlan, Traces, layouts_for, make_plans
from vmoe.bench.plan.workload import Workload
from vmoe.data.config import DEFAULTS
from vmoe.data.patchwork import OBJECTS
from vmoe.errors import UserError
from vmoe.training.config import TrainConfig
from vmoe.training.parallel.process import Process
from vmoe.training.parallel.strategies import check_parts

_CLASSES_OF_SETS = {
    "digits": 10,
    "patchwork": len(OBJECTS),
    "cifar10": 10,
    "cifar100": 100,
    "imagenette": 10,
    "imagenet": 1000,
}
AUTOCAST_DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def workload_of(config: TrainConfig, classes: int | None = None) -> Workload:
    """The planner's workload for a run's config.

    Args:
        config: The run.
        classes: Number of classes, if the data set does not fix it; None takes the set's own, or 1000.
    """
    data, trainer = config.data, config.trainer
    own = len(data.subset.classes) if data.subset.classes else _CLASSES_OF_SETS.get(data.name, 1000)
    own = data.fractals.classes if data.name == "fractals" else own
    return Workload(
        config.model.name,
        dict(config.model.kwargs),
        config.moe,
        classes or own,
        data.image_size or DEFAULTS[data.name].image_size or 32,
        data.batch_size,
        trainer.accumulate,
        AUTOCAST_DTYPES[trainer.precision],
        data.mix.is_on,
        moments=1 if config.optim.name == "muon" else 2,  # counted as if all parameters were matrices; nearly all are
        has_average=trainer.ema_decay is not None,
        graphed=trainer.cuda_graph,
        channels=data.channels,
    )


def plans_of(
    config: TrainConfig,
    workload: Workload,
    processes: int,
    machine: Machine,
    network: float,
    traces: Traces | None = None,
) -> list[LayoutPlan]:
    """Plans of every layout for this number of processes, the best first; see `make_plans`."""

    def refusal(layout: MeshLayout) -> str | None:
        try:
            check_parts(_with_layout(config, layout), workload.batch, processes)
        except ValueError as error:
            return str(error)
        return None

    return make_plans(workload, layouts_for(processes, config.moe), machine, network, refusal, traces)


def resolved(config: TrainConfig, process: Process) -> tuple[TrainConfig, str | None]:
    """The config with `parallel.strategy: auto` replaced, and a line with the reason; None for one process.

    Raises:
        UserError: No layout is feasible.
    """
    if process.world_size == 1:
        return _with_layout(config, MeshLayout("none", 1)), None
    name = "cpu" if config.trainer.device == "cpu" else gpu_of_this_machine()
    machine = dataclasses.replace(Machine.of(name), count=process.local_world_size)
    if name == "cpu":  # all processes share its memory
        machine = dataclasses.replace(machine, memory=machine.memory / process.local_world_size)
    plans = plans_of(config, workload_of(config), process.world_size, machine, network_bandwidth(USUAL_NETWORK))
    best = plans[0]
    if best.missing is not None:
        raise UserError(f"parallel.strategy=auto: no layout of {process.world_size} processes will do; {best.missing}")
    return _with_layout(config, best.layout), f"parallel.strategy auto: {_why_chosen(best, plans[1:], machine)}"


def _why_chosen(best: LayoutPlan, others: list[LayoutPlan], machine: Machine) -> str:
    """A line on the chosen layout and the next best ones."""
    line = (
        f"{best.layout}, by prediction {best.times.step * 1e3:,.0f} ms per step and "
        f"{best.memory.peak / 2**30:.1f} of {machine.memory / 2**30:.1f} GiB"
    )
    slower = [f"{plan.layout} {plan.times.step * 1e3:,.0f} ms" for plan in others if plan.missing is None]
    too_large = [str(plan.layout) for plan in others if plan.missing is not None]
    rest = [*slower[:2], *([f"not feasible: {', '.join(too_large[:3])}"] if too_large else [])]
    return line + (f" ({'; '.join(rest)})" if rest else "")


def _with_layout(config: TrainConfig, layout: MeshLayout) -> TrainConfig:
    parallel = dataclasses.replace(
        config.parallel,
        strategy=layout.strategy,
        expert_size=layout.expert_size,
        dense=layout.dense,
        async_save=config.parallel.async_save and layout.strategy in ("fsdp", "expert"),
    )
    return dataclasses.replace(config, parallel=parallel)
