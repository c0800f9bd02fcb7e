"""Starts runs of several processes on this machine, and compares runs."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.forks import SECONDS, run_forked

from vmoe.checkpoints import ENTRY, RunFolder, load_checkpoint, read_checkpoint
from vmoe.training.config import OptimConfig
from vmoe.training.optim.groups import by_name, parameter_groups

TINY = """
data: {name: digits, batch_size: 32, image_size: 8, subset: {per_class: 10}, mix: {mixup_alpha: 0.4, cutmix_alpha: 0.4}}
model: {name: vit_tiny_patch16_224, kwargs: {patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}}
moe: {num_experts: 4, group: 4, batch_priority: true, capacity_multiple_of: 1}
optim: {warmup_epochs: 0, clip_norm: 0.1, lr: 0.01}
trainer: {epochs: 1, device: cpu, ema_decay: 0.9}
parallel: {draws: sample}
"""
WORKER = Path(__file__).with_name("parallel_worker.py")


def launch(
    recipe: Path,
    folder: Path,
    processes: int,
    *options: str,
    restarts: int = 0,
    script: Path = WORKER,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Trains a recipe in several processes, and returns the finished `torchrun`."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    torchrun += ("--max-restarts", str(restarts))
    command = [sys.executable, *(torchrun if processes > 1 else ()), str(script)]
    command += ["--config", str(recipe), "--output_dir", str(folder), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)


def train_forked(
    recipe: Path, folder: Path, processes: int, *options: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Like `launch`, but by forks, which saves the seconds of torchrun's start."""
    arguments = ("--config", str(recipe), "--output_dir", str(folder), *options)
    return run_forked(WORKER, processes, *arguments, **environment)


def strategy_options(strategy: str) -> list[str]:
    options = ("--parallel.strategy", "--parallel.expert_size", "--parallel.dense")
    return [word for pair in zip(options, strategy.split(), strict=False) for word in pair]


def assert_same_run(ours: RunFolder, alone: RunFolder, tolerance: float = 1e-9) -> None:
    """Compares weights, their average, moments of the clipped gradients, and metrics to their written digits."""
    one, other = read_checkpoint(alone.last), read_checkpoint(ours.last)
    assert one["global_step"] == other["global_step"]
    assert_close(tensors(other["state_dict"]), tensors(one["state_dict"]), tolerance)
    assert_close(tensors(other[ENTRY]["ema"]), tensors(one[ENTRY]["ema"]), tolerance)
    names = optimizer_names(alone)
    moments = (by_name(content["optimizer_states"][0], names)["state"] for content in (other, one))
    assert_close(*map(tensors, moments), tolerance)
    for row, expected in zip(rows(ours), rows(alone), strict=True):
        for name, value in expected.items():
            if name != "train/images_per_second":
                assert float(row[name]) == pytest.approx(float(value), rel=1e-6), name


def optimizer_names(folder: RunFolder) -> list[str]:
    model = load_checkpoint(folder.last).model
    names = {parameter: f"model.{name}" for name, parameter in model.named_parameters()}
    return [names[parameter] for group in parameter_groups(model, OptimConfig()) for parameter in group["params"]]


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
