"""`vmoe benchmark scaling`: which trainings it starts, how their results compare, and processes that fail."""

import csv
import gc
import json
import weakref
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback

from vmoe.bench.cases import IMAGES_PER_GROUP
from vmoe.bench.plan.layouts import MeshLayout
from vmoe.bench.scaling.jobs import PARTS, SETTINGS, ScalingJob, jobs_of
from vmoe.bench.scaling.launch import Launcher
from vmoe.bench.scaling.report import add_scaling, differences_from_one
from vmoe.bench.scaling.worker import train_on_noise
from vmoe.cli.benchmark import main

CPU = torch.device("cpu")


@pytest.mark.parametrize("device", SETTINGS)
@pytest.mark.parametrize("counts", [[1, 2], [1, 2, 4, 8], [1, 3], [1, 2, 6], [1, 48]])
def test_processes_can_share_the_experts_and_images_of_every_job(device, counts):
    jobs = jobs_of(list(PARTS), counts, SETTINGS[device])
    assert {job.part for job in jobs} == set(PARTS) and len(set(map(repr, jobs))) == len(jobs)
    for job in jobs:
        job.config(device)  # which refuses what cannot be
        processes = job.layout.processes
        assert job.experts % job.layout.expert_size == 0 and processes % job.layout.expert_size == 0
        assert job.batch % (processes * (1 if job.part == "speed" else IMAGES_PER_GROUP)) == 0
    for part in ("equality", "checkpoint"):
        assert next(job for job in jobs if job.part == part).layout.processes == 1  # others are compared with it


def test_differences_from_one_process():
    one = {"losses": [3.0, 2.0], "weights": {"a": torch.ones(4)}, "moments": {"a": torch.tensor([2.0])}}
    other = {"losses": [2.5], "weights": {"a": torch.tensor([1, 1, 1, 1.25])}, "moments": {"a": torch.tensor([1.0])}}
    row = differences_from_one(other, one, "float64")
    assert (row["weights"], row["weights_beyond"], row["loss"], row["gradients"]) == (0.25, 0.25, 0.5, 0.5)
    assert not row["within"] and differences_from_one(one, one, "float64")["within"]


def test_efficiency_is_beside_one_process_and_ddp():
    def row(layout, processes, batch, rate):
        names = {"model": "tiny", "experts": 4, "layout": layout, "processes": processes, "batch": batch}
        return names | {"step_ms": 1.0, "images_per_second_per_process": rate}

    rows = [row("expert 2", 2, 16, 60.0), row("ddp", 2, 16, 80.0), row("none", 1, 8, 100.0), row("none", 1, 16, 120.0)]
    add_scaling([*rows, {"model": "tiny", "state": "failed"}])
    assert [(rows[0][name]) for name in ("weak", "strong", "beside_ddp")] == [0.6, 0.5, 0.75]
    assert "weak" not in rows[2]


def test_a_job_that_ends_its_processes_loses_no_other(tmp_path, monkeypatch):
    """The processes end without a word of their second job, and say that there is no room for the third."""
    done, no_room = (
        json.dumps({"job": job, "state": state, "seconds": 3.0}) for job, state in ((0, "done"), (2, "no"))
    )
    script = f"echo a warning; echo '{done}'; echo killed >&2; echo '{no_room}'; echo '{no_room}'; exit 1"
    monkeypatch.setattr("vmoe.bench.scaling.launch._command", lambda *_: ["sh", "-c", script])
    jobs = [job for job in jobs_of(["equality"], [1, 2], SETTINGS["cpu"]) if job.layout.processes == 2][:6]
    rows = list(Launcher(tmp_path / "log", CPU, part_seconds=14.0, job_seconds=5.0).run(jobs))
    assert [row["state"] for row in rows] == ["done", "failed", "no", "failed", "no time", "no time"]
    assert [row["dtype"] for row in rows] == [job.dtype for job in jobs]
    assert rows[1]["error"] == "the processes ended: killed"


def test_processes_that_never_answer_are_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("vmoe.bench.scaling.launch._command", lambda *_: ["sleep", "100"])
    monkeypatch.setattr("vmoe.bench.scaling.launch._START_SECONDS", 0)
    jobs = jobs_of(["speed"], [1], SETTINGS["cpu"])[:1]
    (row,) = Launcher(tmp_path / "log", CPU, part_seconds=0.1, job_seconds=0.1).run(jobs)
    assert (row["state"], row["error"]) == ("failed", "the processes ended: ")


@pytest.mark.long
def test_torchrun_goes_on_behind_a_job_that_fails(tmp_path):
    fine = ScalingJob(
        "speed", SETTINGS["cpu"].small, MeshLayout("ddp", 2), experts=4, batch=8, dtype="float32", steps=2
    )
    jobs = [replace(fine, model=replace(fine.model, name="no_such_model")), fine]
    failed, done = Launcher(tmp_path / "log", CPU, part_seconds=500.0, job_seconds=200.0).run(jobs)
    assert failed["state"] == "failed" and "no_such_model" in failed["error"]
    assert done["state"] == "done" and done["step_ms"] > 0


@pytest.mark.long  # about 100 s of CPU time
def test_results_of_two_processes_beside_one(tmp_path, capsys):
    assert main(["scaling", "--device", "cpu", "--steps", "2", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert {row["state"] for row in rows} == {"done"}
    compared = [row for row in rows if "within" in row]
    assert {row["layout"] for row in compared} == {"ddp", "fsdp", "expert 2", "expert 2, dense whole"}
    assert all(row["within"] for row in compared), compared
    assert all(row["weights"] < 1e-12 for row in compared if row["dtype"] == "float64")
    assert all(row["weak"] > 0 for row in rows if row["part"] == "speed" and row["processes"] == 2)
    assert all(row["save_seconds"] > 0 for row in rows if row["part"] == "checkpoint")
    with open(tmp_path / "scaling.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert "| expert 2, dense whole |" in capsys.readouterr().out


class _Watches(Callback):
    def on_fit_start(self, trainer, module):
        self.model = weakref.ref(module.model)


def test_a_sharded_model_is_freed_after_its_training():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        watch = _Watches()
        job = ScalingJob("speed", SETTINGS["cpu"].small, MeshLayout("fsdp", 1), experts=4, batch=8, dtype="float32")
        train_on_noise(job, CPU, 2, [watch])
        gc.collect()
        assert watch.model() is None
    finally:
        torch.distributed.destroy_process_group()
