"""A run that is killed at any moment goes on, bit for bit, as if it never had been; its folder is readable meanwhile."""

import random
import signal
from pathlib import Path

import pytest
from reliability.children import assert_readable, assert_same_run, rows, train

from vmoe.checkpoints import RunFolder, load_checkpoint

# Everything random, or with a state, is on: router noise, dropout, drop path, augmentation, order, Muon, EMA.
RECIPE = """
data: {name: digits, batch_size: 40, subset: {per_class: 12}, augment: {preset: strong}}
model:
  name: vit_tiny_patch16_224
  kwargs: {patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2, drop_path_rate: 0.2, proj_drop_rate: 0.1}
moe: {num_experts: 4, expert_dropout: 0.1}
optim: {name: muon, adamw_lr: 5.0e-4, warmup_epochs: 1}
trainer: {epochs: 3, accumulate: 2, device: cpu, log_every: 1, ema_decay: 0.9}
"""
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def unbroken(recipe) -> tuple[RunFolder, int]:
    """The run that was never stopped, and the calls it made."""
    folder = RunFolder(recipe.parent / "unbroken")
    end = train(["--config", str(recipe), "--output_dir", str(folder.path)])
    assert end.code == 0, end.error
    return folder, end.calls


def _moments(signum: int, count: int) -> list[float]:
    draw = random.Random(int(signum))
    return [(number + draw.random()) / count for number in range(count)]  # one in each stretch


def _cases(count: int) -> list:
    return [
        pytest.param(signum, moment, id=f"{name}-{moment:.3f}")
        for name, signum in SIGNALS.items()
        for moment in _moments(signum, count)
    ]


def _check(recipe, unbroken, tmp_path, signum, moment) -> None:
    expected, calls = unbroken
    folder = RunFolder(tmp_path / "run")
    arguments = ["--config", str(recipe), "--output_dir", str(folder.path), "--resume"]
    end = train(arguments, signum, int(moment * calls))
    stopped = {signal.SIGKILL: {-9}, signal.SIGTERM: {143, -15, 0}, signal.SIGINT: {130, 0}}[signum]
    assert end.code in stopped, end.error
    assert "Traceback" not in end.error, end.error
    assert_readable(folder)
    again = train(arguments)
    assert again.code == 0, again.error
    assert_same_run(folder, expected)


@pytest.mark.parametrize(("signum", "moment"), _cases(1))
def test_stopped_at_a_moment(recipe, unbroken, tmp_path, signum, moment):
    _check(recipe, unbroken, tmp_path, signum, moment)


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "moment"), _cases(30))
def test_stopped_at_any_moment(recipe, unbroken, tmp_path, signum, moment):
    _check(recipe, unbroken, tmp_path, signum, moment)
