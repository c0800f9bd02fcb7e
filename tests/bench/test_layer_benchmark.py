"""The bookkeeping of the layer's benchmark: FLOPs, routing, ratios, failures. No test asserts a speed."""

import dataclasses

import pytest
import torch
from timm.layers import Mlp
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from vmoe.bench import peers
from vmoe.bench.cases import CASES, LayerCase, given_routing
from vmoe.bench.curves import AXES, benchmark_curves, draw_cost_curves, points
from vmoe.bench.layer import benchmark_layer, layer_jobs
from vmoe.bench.report import LAYER_COLUMNS, layer_rows, markdown_table
from vmoe.bench.timing import DeviceLost, Measurement, copy_bandwidth, matmul_peak, reason_of_failure, time_jobs

CPU = torch.device("cpu")
SMALL = LayerCase(width=16, hidden=24, num_experts=4, top_k=2, images=3, tokens=5)


def test_flops_are_those_of_the_dense_twin():
    mlp = Mlp(SMALL.width, SMALL.hidden)
    x = torch.randn(SMALL.num_tokens * SMALL.top_k, SMALL.width, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = mlp(x)
    assert counter.get_total_flops() == SMALL.forward_flops
    with counter:
        y.sum().backward()
    assert SMALL.forward_flops + counter.get_total_flops() == SMALL.flops


@pytest.mark.parametrize("case", [SMALL, CASES["Ti-k1"], dataclasses.replace(SMALL, num_experts=3, top_k=3)])
def test_given_routing_is_fair_and_drops_nothing(case):
    routing = given_routing(case, CPU)
    chosen = routing.chosen_GSK[0]
    assert all(len(set(row)) == case.top_k for row in chosen.tolist())
    load = torch.bincount(chosen.reshape(-1), minlength=case.num_experts)
    assert load.max() - load.min() <= 1
    assert routing.kept_GSK.all()
    assert given_routing(case, CPU, dropless=True).capacity is None


@pytest.mark.parametrize("name", peers.PEERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peers_compute_what_the_experts_do(name, dtype):
    assert 0 < peers.check(peers.PEERS[name], SMALL, CPU, dtype) <= peers.TOLERANCES[dtype]


def test_a_wrong_peer_is_refused():
    class NoSecondBias(peers.PaddedBmm):
        def compute(self, x_TD, chosen_TK, weights_TK, parameters):
            parameters[3] = parameters[3] * 0
            return super().compute(x_TD, chosen_TK, weights_TK, parameters)

    with pytest.raises(ArithmeticError, match="against float64"):
        peers.check(NoSecondBias, SMALL, CPU, torch.float32)


def test_every_job_is_timed_beside_its_dense_twin():
    results, peak = benchmark_layer(SMALL, CPU, torch.float32, rounds=2, with_peers=True)
    names = [name for name in layer_jobs(SMALL, CPU, torch.float32) if "compiled" not in name]
    assert list(results) == [*names, *(f"peer: {name}" for name in peers.PEERS)]
    rows = {row["job"]: row for row in layer_rows(results, SMALL, peak)}
    assert all("error" not in row and len(row["times_ms"]) == 2 for row in rows.values())
    assert rows["layer"]["ratio"] == pytest.approx(rows["layer"]["ms"] / rows["dense"]["ms"])
    inference = rows["layer inference"]
    assert inference["ratio"] == pytest.approx(inference["ms"] / rows["dense inference"]["ms"])
    assert inference["of_peak"] == pytest.approx(SMALL.forward_flops / inference["ms"] * 1e3 / peak)
    assert rows["dense"]["of_peak"] == pytest.approx(SMALL.flops / rows["dense"]["ms"] * 1e3 / peak)


def test_only_the_wanted_jobs_run():
    results, _ = benchmark_layer(
        SMALL, CPU, torch.float32, rounds=1, only=["experts, drop", "peer: loop"], with_peers=True
    )
    assert list(results) == ["dense", "experts, dropless", "dense inference", "peer: loop over experts"]


def test_a_failing_job_is_a_row_with_its_reason():
    calls = []

    def fails_late():
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError("gave | up")

    jobs = {"dense": lambda: torch.ones(8) @ torch.ones(8), "bad": lambda: 1 / 0, "late": fails_late}
    results = time_jobs(jobs, CPU, rounds=3, calls=1)
    assert len(results["dense"].times) == 3 and results["dense"].error is None
    assert results["bad"].error == "ZeroDivisionError: division by zero"
    assert results["late"].error == "RuntimeError: gave | up"
    rows = layer_rows(results, SMALL, peak=1e9)
    lines = markdown_table(LAYER_COLUMNS, rows).splitlines()
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
    assert "ZeroDivisionError: division by zero" in lines[3]


def test_a_job_that_breaks_the_gpu_stops_the_rest(monkeypatch):
    def broken(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(DeviceLost, match="layer, CUDA graph: ValueError: odd"):
        reason_of_failure("layer, CUDA graph", ValueError("odd"), torch.device("cuda"))


def test_without_a_dense_time_there_is_no_ratio():
    results = {"dense": Measurement(error="MemoryError: none"), "layer": Measurement(times=[2.0, 4.0])}
    dense, layer = layer_rows(results, SMALL, peak=1e9)
    assert dense == {"job": "dense", "error": "MemoryError: none"}
    assert layer["ratio"] is None and layer["ms"] == 3.0 and layer["spread"] == pytest.approx(1 / 6)


def test_points_of_the_curves():
    experts = dict(points("experts", SMALL))
    assert sorted(experts) == [2**n for n in range(9)]
    assert {(case.num_experts, case.top_k) for case in experts.values()} == {(n, 1) for n in experts}
    assert len({case.flops for case in experts.values()}) == 1
    assert [case.num_tokens for _, case in points("tokens", SMALL)] == [1000, 3000, 10000, 30000, 100000, 200000]
    assert [value for value, _ in points("top-k", SMALL)] == [1, 2, 4]
    assert [case.capacity_factor for _, case in points("capacity", SMALL)][-1] is None
    served = dict(points("images", SMALL))
    assert [case.images for case in served.values()] == list(served) == [1, 2, 4, 8, 16, 32, 64, 256]
    assert {case.capacity_factor for case in served.values()} == {None}


def test_the_curve_of_images_is_of_the_forward_pass(monkeypatch):
    monkeypatch.setitem(AXES, "images", ("images", (1, 2)))
    modes = set()
    handle = register_module_forward_hook(lambda module, *_: modes.add(module.training))
    try:
        rows = benchmark_curves(SMALL, ["images"], CPU, torch.float32, rounds=1)
    finally:
        handle.remove()
    assert [(row["value"], row["tokens"]) for row in rows] == [(1, SMALL.tokens), (2, 2 * SMALL.tokens)]
    assert modes == {False} and not any("error" in row for row in rows)
    assert all(row["experts_ratio"] > 0 and row["layer_ratio"] > 0 for row in rows)


def test_curves_are_relative_to_dense():
    rows = benchmark_curves(SMALL, ["top-k", "capacity"], CPU, torch.float32, rounds=1)
    assert [row["axis"] for row in rows] == ["top-k"] * 3 + ["capacity"] * 8
    for row in rows:
        assert row["tokens"] == 15 and "error" not in row
        assert row["layer_ratio"] == pytest.approx(row["layer_ms"] / row["dense_ms"])
    figure = draw_cost_curves(rows, "title")
    assert [axes.get_xlabel() for axes in figure.axes] == ["choices per token", "capacity factor"]
    assert len(figure.axes[1].lines[1].get_xdata()) == 8


def test_peaks_are_rates():
    assert matmul_peak(CPU, torch.float32, [(64, 64, 64)]) > 1e6
    assert copy_bandwidth(CPU) > 1e6
