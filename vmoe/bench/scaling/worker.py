"""One process of a measurement, started by `launch`: does the jobs of a list one by one and writes rows as they come.

    python -m vmoe.bench.scaling.worker PLAN.json ROWS.jsonl

A row tells what became of a job: `state` is "started", "done", "failed", "no room" or "no time". What fails in one of
several processes ends them all, since the others may wait for it: the launcher goes on with the jobs that are left.
"""

import faulthandler
import json
import os
import resource
import statistics
import sys
import threading
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vmoe.bench.scaling.fit import Images, Outcome, Saves, Speed, measure_speed, train
from vmoe.bench.scaling.jobs import Job, Model
from vmoe.bench.scaling.size import grow, is_out_of_memory
from vmoe.bench.timing import release
from vmoe.training.processes import Place, connect, disconnect, gather

Row = dict[str, Any]


class Rows:
    """The file that all processes append to; a line is written at once."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, job: Job, state: str, **content: Any) -> None:
        line = json.dumps(job.as_row() | {"state": state} | content) + "\n"
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(line)


def main(plan: Path, rows: Path) -> None:
    """Does the jobs of a plan."""
    plan = json.loads(plan.read_text(encoding="utf-8"))
    jobs = [Job(**{**job, "model": Model(**job["model"])}) for job in plan["jobs"]]
    place, device = Place.of_this(), torch.device(plan["device"])
    if device.type == "cuda":
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
    # A product in float32 is one, whatever the number of processes
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    faulthandler.dump_traceback_later(plan["start_seconds"], exit=True)
    ended = Path(plan["ended"])
    if place.count > 1:
        threading.Thread(target=_end_with, args=(ended,), daemon=True).start()
    connect(device.type)
    gather(None)
    left = dict(plan["seconds_left"])
    for job in jobs:
        if min(gather(left[job.part])) <= 0:
            _write_once(Rows(rows), job, "no time")
            continue
        started = time.monotonic()
        faulthandler.dump_traceback_later(job.seconds, exit=True)  # also out of a collective that never ends
        _do(job, device, plan, Rows(rows))
        left[job.part] -= time.monotonic() - started
    faulthandler.cancel_dump_traceback_later()
    disconnect()


def _end_with(ended: Path) -> None:
    """Ends this process when another has failed, for which it may wait in vain, deaf to signals."""
    while not ended.exists():
        time.sleep(0.5)
    time.sleep(1.0)  # for what it may have to say itself
    os._exit(1)


def _do(job: Job, device: torch.device, plan: dict[str, Any], rows: Rows) -> None:
    write = partial(_write_once, rows, job)
    write("started")
    start = time.monotonic()
    try:
        _limit_memory(job.memory if job.part == "size" else None, device)
        if job.part == "size":
            known = plan["sizes"].get(job.key, {})
            fitted = {int(pairs): peak for pairs, peak in known.get("fitted", {}).items()}
            for row in grow(job, device, fitted, known.get("failed")):
                write("fits", **row)
                faulthandler.dump_traceback_later(job.seconds, exit=True)  # as for a job of its own
            content = {}
        else:
            content = _MEASURES[job.part](job, device, Path(plan["folder"]))
    except Exception as error:  # whatever stops one job must not lose the others
        state = "no room" if is_out_of_memory(error) else "failed"
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        where = {"pairs": getattr(error, "pairs", None), "rank": Place.of_this().rank}
        traceback.print_exc()
        ended = Path(plan["ended"])
        if not ended.exists():  # else another failed first, and this is what came of it
            ended.touch()
            rows.write(job, state, error=reason, seconds=time.monotonic() - start, **where)
        if job.processes > 1:
            sys.stderr.flush()
            os._exit(1)
        ended.unlink()
        traceback.clear_frames(error.__traceback__)
    else:
        write("done", seconds=time.monotonic() - start, **content)
    release(device)


def _write_once(rows: Rows, job: Job, state: str, **content: Any) -> None:
    if Place.of_this().is_first:
        rows.write(job, state, **content)


def _results(job: Job, device: torch.device, folder: Path) -> Row:
    """Three updates, of which weights, losses and the rest go to a file."""
    outcome = Outcome()
    train(job, device, Images(job, job.steps, device, different=True), [outcome])
    return _keep(outcome, job, folder)


def _checkpoint(job: Job, device: torch.device, folder: Path) -> Row:
    """Two epochs of three updates without a stop, or the first to a checkpoint, or the second from there."""
    images = Images(job, job.steps, device, different=True)
    place = folder / "checkpoint.ckpt"
    if job.step == "save":
        train(job, device, images, [Saves(place)], epochs_in_all=2)
        return {}
    outcome = Outcome()
    resume_from = place if job.step == "resume" else None
    train(job, device, images, [outcome], epochs=2, epochs_in_all=2, resume_from=resume_from)
    return _keep(outcome, job, folder)


def _keep(outcome: Outcome, job: Job, folder: Path) -> Row:
    if Place.of_this().is_first:
        torch.save(outcome.content, folder / f"{job.key}.pt")
    return {"losses": outcome.losses}


def _speed(job: Job, device: torch.device, folder: Path) -> Row:
    return _row_of(measure_speed(job, device, profiled=job.processes > 1), job)


def _row_of(speed: Speed, job: Job) -> Row:
    """Of the slowest process; memory of each."""
    every = gather(speed)
    slowest = max(every, key=lambda one: one.step_ms)
    row = {
        "step_ms": slowest.step_ms,
        "spread": slowest.spread,
        "images_per_second": job.batch / slowest.step_ms * 1e3,
        "images_per_second_a_process": job.batch / slowest.step_ms * 1e3 / job.processes,
        "peak_mib": [one.peak_mib for one in every],
    }
    if slowest.waits is not None:
        row |= {"waits": max(len(one.waits) for one in every), "waits_at": sorted({w for o in every for w in o.waits})}
    shares = [one.shares for one in every if one.shares is not None]
    for name in shares[0]._fields if shares else ():
        row[f"share_{name}"] = statistics.mean(getattr(one, name) for one in shares)
    return row


def _limit_memory(gib: float | None, device: torch.device) -> None:
    if gib is None:
        return
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / whole), device)
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (int(gib * 2**30), resource.RLIM_INFINITY))


_MEASURES = {"equality": _results, "speed": _speed, "checkpoint": _checkpoint}

if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
