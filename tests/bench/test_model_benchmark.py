"""Whole models and loaders: what a row says. No test asserts a speed."""

import pytest
import torch

import vmoe
from vmoe.bench.data import loader_rate
from vmoe.bench.model import ModelTiming, benchmark_models

CPU = torch.device("cpu")


def make(moe=None):
    return lambda: vmoe.create_model(
        "vit_tiny_patch16_224", moe, img_size=32, num_classes=10, depth=2, embed_dim=24, num_heads=3
    )


def test_rows_of_models_beside_their_twin():
    moe = vmoe.MoeConfig(num_experts=4, top_k=1, eval_capacity_factor=1.05, batch_priority=True)
    makers = {"dense": make(), "every-2 K=1": make(moe), "broken": lambda: 1 / 0}
    rows = benchmark_models(makers, ModelTiming(32, 4, CPU, torch.bfloat16, rounds=2))
    assert [(row["model"], row.get("pass")) for row in rows] == [
        ("broken", None), ("dense", "training"), ("every-2 K=1", "training"),
        ("dense", "inference"), ("every-2 K=1", "inference"),
    ]  # fmt: skip
    assert rows[0]["error"] == "ZeroDivisionError: division by zero"
    dense, sparse = rows[1:3]
    assert sparse["ratio"] == pytest.approx(sparse["ms"] / dense["ms"]) and dense["ratio"] == 1
    assert sparse["images_per_second"] == pytest.approx(4 / sparse["ms"] * 1e3)
    assert sparse["million_parameters"] > sparse["million_active"] > dense["million_active"]  # more by its router
    # five tokens meet a router of 24 x 4, and nothing else is new
    assert (sparse["gflops_per_image"] - dense["gflops_per_image"]) * 1e9 == pytest.approx(2 * 5 * 24 * 4)
    assert dense["optimizer_ms"] > 0 and "optimizer_ms" not in rows[3]
    assert all(row["fastest"] and row["compile"] == "off" for row in rows[1:])


def test_measuring_changes_no_weight():
    models = []
    torch.manual_seed(0)
    makers = {"dense": lambda: models.append(make()()) or models[0]}
    benchmark_models(makers, ModelTiming(32, 2, CPU, torch.float32, rounds=1))
    torch.manual_seed(0)
    fresh = make()()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), fresh.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in models[0].parameters())


@pytest.mark.slow
def test_the_fastest_mode_is_the_base_of_the_ratios():
    timing = ModelTiming(32, 2, CPU, torch.float32, passes=("training",), modes=("off", "default"))
    rows = benchmark_models({"dense": make()}, timing)
    assert [row["compile"] for row in rows] == ["off", "default"]
    fastest = min(rows, key=lambda row: row["ms"])
    assert fastest["fastest"] and fastest["ratio"] == 1
    assert sum(row["fastest"] for row in rows) == 1


def test_a_loader_is_read_again_from_its_start():
    batches = [(torch.zeros(size, 1), None) for size in (4, 4, 2)]
    rate = loader_rate(lambda: batches, seconds=0.01, ahead=4, device=CPU)
    assert rate.images > 10 and rate.images_per_second >= rate.images
    assert loader_rate(lambda: batches, seconds=1e-9, ahead=1, device=CPU).images == 2
