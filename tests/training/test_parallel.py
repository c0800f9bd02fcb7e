"""Several processes: results do not depend on their number, and mistakes and failures are told once."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vmoe.checkpoints import ENTRY, RunFolder, read_checkpoint

TINY = """
data: {name: digits, batch_size: 32, image_size: 8, subset: {per_class: 10}, mix: {mixup_alpha: 0.4, cutmix_alpha: 0.4}}
model: {name: vit_tiny_patch16_224, kwargs: {patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}}
moe: {num_experts: 4, group: 4, batch_priority: true, capacity_multiple_of: 1}
optim: {warmup_epochs: 0, clip_norm: 0.1, lr: 0.01}
trainer: {epochs: 1, device: cpu, ema_decay: 0.9}
parallel: {draws: sample}
"""
WORKER = Path(__file__).with_name("parallel_worker.py")
SECONDS = 120  # at most, so that processes that wait for one another fail a test rather than block all


def launch(recipe: Path, folder: Path, processes: int, *options: str, seconds: int = SECONDS):
    """Trains a recipe in so many processes; the finished `torchrun`."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    command = [sys.executable, *(torchrun if processes > 1 else ()), str(WORKER)]
    command += ["--config", str(recipe), "--output_dir", str(folder), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def alone(recipe) -> RunFolder:
    """The run of one process."""
    folder = recipe.parent / "alone"
    done = launch(recipe, folder, 1)
    assert done.returncode == 0, done.stderr
    return RunFolder(folder)


@pytest.mark.parametrize(
    ("processes", "strategy"), [(2, "ddp"), pytest.param(4, "ddp", marks=pytest.mark.slow)], ids=str
)
def test_the_number_of_processes_changes_nothing(recipe, alone, tmp_path, processes, strategy):
    done = launch(recipe, tmp_path / "run", processes, *strategy_options(strategy))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/1") == 1
    assert_same_run(RunFolder(tmp_path / "run"), alone)


def strategy_options(strategy: str) -> list[str]:
    name, _, size = strategy.partition(" ")
    return ["--parallel.strategy", name, *(["--parallel.expert_size", size] if size else [])]


def assert_same_run(ours: RunFolder, alone: RunFolder) -> None:
    """Weights, their average, moments of the clipped gradients within 1e-9; metrics as exactly as they are kept."""
    one, other = read_checkpoint(alone.last), read_checkpoint(ours.last)
    assert one["global_step"] == other["global_step"] == 3
    for part in ("state_dict", "optimizer_states"):
        assert_close(tensors(other[part]), tensors(one[part]), 1e-9)
    assert_close(tensors(other[ENTRY]["ema"]), tensors(one[ENTRY]["ema"]), 1e-9)
    for row, expected in zip(rows(ours), rows(alone), strict=True):
        for name, value in expected.items():
            if name != "train/images_per_second":
                assert float(row[name]) == pytest.approx(float(value), rel=1e-6), name


def assert_close(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


def tensors(value, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {key: part for index, item in items for key, part in tensors(item, f"{name}/{index}").items()}


def rows(folder: RunFolder) -> list[dict[str, str]]:
    with open(folder.metrics, newline="") as file:
        return list(csv.DictReader(file))


def test_a_mistake_is_told_once(recipe, tmp_path):
    done = launch(recipe, tmp_path / "run", 2, "--parallel.strategy", "ddp", "--data.batch_size", "40")
    assert done.returncode != 0
    assert done.stderr.count("data.batch_size=40: 2 processes must get equally many whole groups") == 1
    assert "use 32 or 48" in done.stderr
    assert not (tmp_path / "run").exists()


def test_several_processes_need_a_strategy(recipe, tmp_path):
    done = launch(recipe, tmp_path / "run", 2)
    assert done.stderr.count("--parallel.strategy none: torchrun started 2 processes; use ddp, fsdp or expert") == 1
