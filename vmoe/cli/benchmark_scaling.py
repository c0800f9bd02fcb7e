"""`vmoe benchmark scaling`: which trainings, and the files of their results."""

import argparse
import dataclasses
import signal
import tempfile
from pathlib import Path
from typing import Any

import torch

from vmoe.bench.plan.hardware import Machine, gpu_of_this_machine
from vmoe.bench.report import markdown_table
from vmoe.bench.scaling.jobs import SIZES, Job, Sizes, jobs_of
from vmoe.bench.scaling.launch import Launcher
from vmoe.bench.scaling.predicted import predicted
from vmoe.bench.scaling.report import TABLES, finished, write_csv
from vmoe.cli.benchmark_jobs import Results
from vmoe.errors import UserError


def scaling(options: argparse.Namespace, results: Results) -> None:
    """Runs the chosen parts; files are written anew after every row."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        _scaling(options, results, Path(scratch))


def _scaling(options: argparse.Namespace, results: Results, scratch: Path) -> None:
    counts = _counts(options)
    memory = options.memory or (None if options.device.type == "cuda" else 1.0)
    sizes = _sizes(options)
    jobs = jobs_of(options.parts, counts, sizes, options.job_limit, memory)
    settings = {"parts": options.parts, "processes": counts, "sizes": dataclasses.asdict(sizes)}
    tables: list[str] = []
    known: dict[str, dict[str, Any]] = {}
    machine = Machine.of(gpu_of_this_machine() if options.device.type == "cuda" else "cpu")
    models = {model.title: model for model in (*sizes.models, sizes.large)}

    def report(rows: list[dict[str, Any]]) -> None:
        ended = finished(rows, scratch, known)
        for row in ended:
            if row["part"] in ("speed", "size") and "peak_mib" in row and not row["compiled"]:
                key = f"predicted {row['key']} {row.get('blocks')}"
                known[key] = known.get(key) or predicted(row, models[row["model"]], machine)
                row |= known[key]
        tables[:] = _tables(ended)
        write_csv(options.out / "scaling.csv", ended)
        results.write("scaling", getattr(torch, sizes.dtype), settings | {"rows": ended}, tables)

    seconds = dict.fromkeys(options.parts, float(options.limit))
    launcher = Launcher(options.out / "work", scratch, options.device.type, seconds, results.say("scaling"), report)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the workers end too
    try:
        for launch in _launches(jobs, counts):
            launcher.run(launch)
    finally:
        signal.signal(signal.SIGTERM, before)
    print("\n\n".join(tables))
    print(f"\nscaling.csv, scaling.json and scaling.md in {options.out}; what workers said in {options.out / 'work'}")


def _launches(jobs: list[Job], counts: list[int]) -> list[list[Job]]:
    """Jobs that follow one another in the same processes. Most processes first: they save what one resumes."""
    early, sizes = ([job for job in jobs if (job.part == "size") is is_size] for is_size in (False, True))
    launches = [[job for job in part if job.processes == count] for part in (early, sizes) for count in counts[::-1]]
    return [launch for launch in launches if launch]


def _tables(rows: list[dict[str, Any]]) -> list[str]:
    tables = []
    for part, columns in TABLES.items():
        of_part = [row for row in rows if row["part"] == part]
        if of_part:
            tables.append(f"## {part}\n\n{markdown_table(columns, of_part)}")
    return tables


def _counts(options: argparse.Namespace) -> list[int]:
    is_gpu = options.device.type == "cuda"
    most = torch.cuda.device_count() if is_gpu else 2
    counts = sorted({1, *(options.processes or [most])})
    if is_gpu and counts[-1] > most:
        raise UserError(f"--processes {counts[-1]}: there are {most} GPUs here")
    for count in counts:
        if counts[-1] % count:
            raise UserError(f"--processes {count}: must divide the most, {counts[-1]}: all share batches of its size")
    return counts


def _sizes(options: argparse.Namespace) -> Sizes:
    """What the device can do in minutes, with the sizes that were given."""
    if options.cuda_graph and options.device.type != "cuda":
        raise UserError("--cuda-graph: needs a GPU; leave it out")
    sizes = SIZES[options.device.type]
    models = tuple(model for model in sizes.models if options.models is None or model.title in options.models)
    if not models:
        raise UserError(f"--models {' '.join(options.models)}: there are {', '.join(m.title for m in sizes.models)}")
    changes = {
        "compiled": options.compiled,
        "graphed": options.cuda_graph,
        "batch": options.batch,
        "steps": options.steps,
        "experts": tuple(options.experts or sizes.experts),
    }
    return dataclasses.replace(sizes, models=models, **{name: value for name, value in changes.items() if value})
