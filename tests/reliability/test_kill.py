"""A run that is killed at any moment goes on, bit for bit, as if it had not been; its folder is always readable."""

import random
import signal
from pathlib import Path

import pytest
from reliability.children import Attack, assert_readable, assert_same_run, train

from vmoe.checkpoints import RunFolder

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
pytestmark = pytest.mark.slow  # in one process: tests/training/test_resume.py
MOMENTS = {signal.SIGKILL: 8, signal.SIGTERM: 4, signal.SIGINT: 4}  # a run is trained twice per moment


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


def _check(recipe, expected: RunFolder, folder: RunFolder, attack: Attack) -> None:
    arguments = ["--config", str(recipe), "--output_dir", str(folder.path), "--resume", "auto"]
    end = train(arguments, attack)
    stopped = {signal.SIGKILL: {-9}, signal.SIGTERM: {143, -15, 0}, signal.SIGINT: {130, 0}, None: {2}}
    assert end.code in stopped[attack.signum], end.error
    assert "Traceback" not in end.error, end.error
    if attack.signum is None:
        assert end.error.count("\n") == 1 and "cannot be written" in end.error, end.error
    assert_readable(folder)
    again = train(arguments)
    assert again.code == 0, again.error
    assert_same_run(folder, expected)


@pytest.mark.parametrize(
    ("signum", "moment"),
    [
        pytest.param(signum, moment, id=f"{signum.name}-{moment:.3f}")
        for signum, count in MOMENTS.items()
        for moment in _moments(signum, count)
    ],
)
def test_stopped_at_any_moment(recipe, unbroken, tmp_path, signum, moment):
    expected, calls = unbroken
    _check(recipe, expected, RunFolder(tmp_path / "run"), Attack(int(moment * calls), signum))


# The second time that a function is entered, or the first where there is one only, and so many calls later
PLACES = [
    *(("save_checkpoint", calls) for calls in (10, 500, 1500)),
    *(("copy_checkpoint", calls) for calls in (5, 60)),
    *(("append", calls) for calls in (1, 60)),
    ("validation_step", 1),
    *(("_summary", calls) for calls in (1, 400)),
]
ONCE = ("_summary", "on_train_end", "copy_checkpoint")


@pytest.mark.parametrize(("place", "calls"), PLACES)
def test_killed_where_it_hurts(recipe, unbroken, tmp_path, place, calls):
    _check(
        recipe,
        unbroken[0],
        RunFolder(tmp_path / "run"),
        Attack(calls, signal.SIGKILL, place, 1 if place in ONCE else 2),
    )


def test_stopped_while_the_best_checkpoint_is_tested(recipe, unbroken, tmp_path):
    _check(recipe, unbroken[0], RunFolder(tmp_path / "run"), Attack(10, signal.SIGTERM, "test_step"))


# From some moment on files cannot grow beyond so many bytes
FULL = [
    *(("save_checkpoint", size) for size in (0, 20_000, 150_000)),
    ("append", 0),
    ("training_step", 0),
    ("flush", 0),
    ("add_scalar", 0),
    ("on_train_end", 0),
    ("_summary", 0),
]


@pytest.mark.parametrize(("place", "size"), FULL)
def test_a_disk_that_is_full(recipe, unbroken, tmp_path, place, size):
    _check(recipe, unbroken[0], RunFolder(tmp_path / "run"), Attack(1, None, place, 1 if place in ONCE else 2, size))
