"""The job `vmoe benchmark scaling`: the measured trainings and the files of their results."""

import argparse
import dataclasses
import signal

import torch

from vmoe.bench.plan.hardware import Machine, gpu_of_this_machine
from vmoe.bench.report import Row, markdown_table
from vmoe.bench.scaling.jobs import SETTINGS, ScalingSettings, jobs_of
from vmoe.bench.scaling.launch import Launcher
from vmoe.bench.scaling.report import SCALING_TABLES, add_scaling, predicted
from vmoe.cli.benchmark_jobs import Results
from vmoe.errors import UserError
from vmoe.files import write_csv


def scaling(options: argparse.Namespace, results: Results) -> None:
    """Runs the chosen parts, and writes the files again after every row."""
    counts, settings, log_file = _processes(options), _scaling_settings(options), options.out / "processes.log"
    jobs = jobs_of(options.parts, counts, settings)
    header = {"parts": options.parts, "processes": counts, "sizes": dataclasses.asdict(settings)}
    machine = Machine.of(gpu_of_this_machine() if options.device.type == "cuda" else "cpu")
    log, rows = results.log("scaling"), []
    log(f"{len(jobs)} trainings")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the processes end too
    try:
        launcher = Launcher(log_file, options.device, options.limit, options.job_limit)
        for job, row in zip(jobs, launcher.run(jobs), strict=True):
            if "step_ms" in row and not job.compiled:
                row |= predicted(job, row, machine)
            rows.append(row)
            add_scaling(rows)
            tables = _tables(rows)
            write_csv(options.out / "scaling.csv", rows)
            results.write("scaling", getattr(torch, settings.dtype), header | {"rows": rows}, tables)
            log(f"{job.part}, {job.layout}, {job.layout.processes} processes: {row.get('error', row['state'])}")
    finally:
        signal.signal(signal.SIGTERM, before)
    print("\n\n".join(tables))
    print(f"\nscaling.csv, scaling.json and scaling.md in {options.out}; what the processes wrote last in {log_file}")


def _tables(rows: list[Row]) -> list[str]:
    tables = []
    for part, columns in SCALING_TABLES.items():
        of_part = [row for row in rows if row["part"] == part]
        shown = [row if row["state"] == "done" else {"error": row["state"]} | row for row in of_part]
        tables += [f"## {part}\n\n{markdown_table(columns, shown)}"] if shown else []
    return tables


def _processes(options: argparse.Namespace) -> list[int]:
    """The numbers of processes, ascending."""
    is_gpu = options.device.type == "cuda"
    most = torch.cuda.device_count() if is_gpu else 2
    counts = sorted({1, *(options.processes or [most])})
    if is_gpu and counts[-1] > most:
        raise UserError(f"--processes {counts[-1]}: there are {most} GPUs here")
    for count in counts:
        if counts[-1] % count:
            raise UserError(f"--processes {count}: must divide the most, {counts[-1]}: all share batches of its size")
    return counts


def _scaling_settings(options: argparse.Namespace) -> ScalingSettings:
    """Settings that take minutes on the device, with the sizes in the options."""
    if options.cuda_graph and options.device.type != "cuda":
        raise UserError("--cuda-graph: needs a GPU; leave it out")
    settings = SETTINGS[options.device.type]
    models = tuple(model for model in settings.models if options.models is None or model.title in options.models)
    if not models:
        raise UserError(f"--models {' '.join(options.models)}: there are {', '.join(m.title for m in settings.models)}")
    changes = {
        "compiled": options.compiled,
        "graphed": options.cuda_graph,
        "batch": options.batch,
        "steps": options.steps,
        "experts": tuple(options.experts or ()),
    }
    return dataclasses.replace(settings, models=models, **{name: value for name, value in changes.items() if value})
