"""`vmoe benchmark scaling`: what it makes of a profile, of memory, and of processes that fail."""

import csv
import gc
import json
import weakref

import pytest
import torch
from lightning.pytorch import Callback

from vmoe.bench.scaling.exchange import shares_of
from vmoe.bench.scaling.fit import Images, train
from vmoe.bench.scaling.jobs import IMAGES_PER_GROUP, PARTS, SIZES, Job, jobs_of
from vmoe.bench.scaling.launch import Launcher
from vmoe.bench.scaling.size import next_size
from vmoe.cli.benchmark import main


def test_shares_of_a_profile():
    shares = shares_of([
        ("gemm", (0.0, 40.0)),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage)", (30.0, 60.0)),  # 10 of 30 behind the product
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage)", (70.0, 80.0)),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage)", (75.0, 90.0)),
        ("void at::native::vectorized_elementwise_kernel", (85.0, 100.0)),  # hides 5 of 50 in all
    ])  # fmt: skip
    assert shares.exchange == pytest.approx(0.5)
    assert (shares.tokens, shares.gradients, shares.weights) == pytest.approx((0.3, 0.1, 0.15))
    assert shares.hidden == pytest.approx(15 / 50)
    assert shares.idle == pytest.approx(0.1)
    assert shares_of([]) is None


def largest(capacity: float, each: float, fixed: float) -> tuple[int, list[int]]:
    """The largest size that the search finds, and all that it tried."""
    known: dict[int, float] = {}
    failed, tried = None, []
    while (size := next_size(known, failed, capacity)) is not None:
        tried.append(size)
        if fixed + each * size <= capacity:
            known[size] = fixed + each * size
        else:
            failed = size
    return max(known), tried


@pytest.mark.parametrize(("each", "fixed"), [(4.5, 10.0), (2.3, 12.0), (20.0, 30.0), (39.0, 1.0)])
def test_the_largest_size_is_found_in_a_few_steps(each, fixed):
    found, tried = largest(80.0, each, fixed)
    assert found == int((80 - fixed) / each)
    assert len(tried) <= 6


def test_a_size_that_failed_early_is_approached_by_halves():
    assert next_size({1: 10.0, 2: 20.0}, 8, 80.0) == 5
    assert next_size({1: 10.0, 5: 50.0}, 6, 80.0) is None


@pytest.mark.parametrize("device", SIZES)
@pytest.mark.parametrize("counts", [[1, 2], [1, 2, 4, 8], [1, 3], [1, 2, 6], [1, 48]])
def test_jobs_are_named_apart(device, counts):
    jobs = jobs_of(list(PARTS), counts, SIZES[device], 60, None)
    assert len({job.key for job in jobs}) == len(jobs)
    assert {job.part for job in jobs} == set(PARTS)
    assert all(job.experts % job.expert_size == 0 and job.processes % job.expert_size == 0 for job in jobs)
    for job in jobs:
        job.config(device)  # which refuses what cannot be
        assert job.batch % job.processes == 0
        if job.part in ("equality", "checkpoint"):
            assert job.batch % (job.processes * IMAGES_PER_GROUP) == 0  # else processes and groups cut it differently
    for part, least in (("equality", 8), ("checkpoint", 8), ("size", 32)):
        (experts,) = {job.experts for job in jobs if job.part == part}
        assert experts >= least and experts % counts[-1] == 0


def test_a_job_that_ends_its_process_loses_no_other(tmp_path, monkeypatch):
    """The first job takes longer than it may: its process ends, and the next is done in another."""
    slow, fast = jobs_of(["checkpoint"], [1], SIZES["cpu"], 60, None)[:2]
    slow = type(slow)(**{**vars(slow), "seconds": 0})
    lines, reports = [], []
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda *_, **__: None)
    launcher = Launcher(tmp_path, tmp_path, "cpu", {"checkpoint": 100.0}, lines.append, reports.append)
    monkeypatch.setattr(launcher, "_launch", lambda jobs: fake_launch(launcher, jobs, slow))
    launcher.run([slow, fast])
    states = [(row["key"], row["state"]) for row in launcher.rows() if row["state"] != "started"]
    assert states == [(slow.key, "failed"), (fast.key, "done")]
    assert "ended with 1: it hung" in launcher.rows()[1]["error"]
    assert reports[-1] == launcher.rows()


def fake_launch(launcher, jobs, fails):
    for job in jobs:
        launcher._add(job.as_row() | {"state": "started"})
        if job == fails:
            return 1, "it hung"
        launcher._add(job.as_row() | {"state": "done", "seconds": 1.0})
    return 0, ""


@pytest.mark.slow
def test_results_of_two_processes_beside_one(tmp_path, capsys):
    arguments = ["scaling", "--device", "cpu", "--parts", "equality", "checkpoint", "--out", str(tmp_path)]
    assert main(arguments) == 0
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    compared = [row for row in rows if "within" in row]
    assert {row["layout"] for row in compared} == {"ddp", "fsdp", "expert 2", "expert 2, dense whole", "none"}
    assert {row["state"] for row in rows} == {"done"}
    assert all(row["within"] for row in compared), compared
    assert all(row["weights"] < 1e-12 for row in compared if row["dtype"] == "float64")
    with open(tmp_path / "scaling.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert "| expert 2, dense whole |" in capsys.readouterr().out


class _Watches(Callback):
    def on_fit_start(self, trainer, module):
        self.model = weakref.ref(module.model)


def test_a_cut_model_is_freed_after_its_training():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        device, watch = torch.device("cpu"), _Watches()
        job = Job("speed", 1, "fsdp", 1, "cut", SIZES["cpu"].small, experts=4, batch=8, dtype="float32")
        train(job, device, Images(job, 2, device, different=False), [watch])
        gc.collect()
        assert watch.model() is None
    finally:
        torch.distributed.destroy_process_group()
