"""`trainer.cuda_graph`: the step that is captured is the step that Lightning does."""

import csv
import os
import signal

import pytest
import torch

from vmoe.checkpoints import ENTRY, RunFolder
from vmoe.cli.train import main
from vmoe.training import classifier as module_file
from vmoe.training.classifier import Classifier
from vmoe.training.graph import GraphedStep
from vmoe.training.run import train as run_file

# All that is random is on. 3 epochs of 5 batches: a graph's warm-up takes 3, so 12 steps are replayed.
RECIPE = """
data: {name: digits, batch_size: 40, subset: {per_class: 20}, augment: {preset: none}}
model:
  name: vit_tiny_patch16_224
  kwargs: {patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2, drop_path_rate: 0.2, proj_drop_rate: 0.1}
moe: {num_experts: 4, expert_dropout: 0.1}
optim: {warmup_epochs: 1, min_lr: 1.0e-4, layer_decay: 0.9}
trainer: {epochs: 3, device: auto, log_every: 1, ema_decay: 0.9}
"""


@pytest.fixture
def run(tmp_path):
    """A function that trains the recipe with options, and gives the exit code and the run's folder."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE)

    def train(name: str, *options: str) -> tuple[int, RunFolder]:
        folder = RunFolder(tmp_path / name)
        return main(["--config", str(recipe), "--output_dir", str(folder.path), *options]), folder

    return train


def _checkpoint(folder: RunFolder) -> dict:
    return torch.load(folder.last, weights_only=True, map_location="cpu")


def _rows(folder: RunFolder) -> list[dict[str, str]]:
    with open(folder.metrics, newline="") as file:
        return list(csv.DictReader(file))


def _assert_same_run(ours: RunFolder, theirs: RunFolder, tolerance: float) -> None:
    """The same numbers, up to a relative difference of all weights together."""
    mine, other = _checkpoint(ours), _checkpoint(theirs)
    assert mine["global_step"] == other["global_step"] == 15
    assert mine[ENTRY]["ema"]["updates"] == other[ENTRY]["ema"]["updates"] == 15
    for weights, expected in (
        (mine["state_dict"], other["state_dict"]),
        (mine[ENTRY]["ema"]["weights"], other[ENTRY]["ema"]["weights"]),
    ):
        whole = torch.cat([expected[name].flatten() for name in expected])
        difference = torch.cat([weights[name].flatten() for name in expected]) - whole
        assert difference.norm() <= tolerance * whole.norm()
    for row, expected in zip(_rows(ours), _rows(theirs), strict=True):
        assert row["step"] == expected["step"] and row["lr"] == expected["lr"]
        for column in ("train/loss", "val/loss"):
            assert float(row[column]) == pytest.approx(float(expected[column]), rel=tolerance), column


IMAGES_IN_STEP = ("--data.pipeline", "device", "--data.augment.preset", "light", "--data.mix.mixup_alpha", "0.2")


@pytest.mark.parametrize(
    "options",
    [("--optim.name", "muon"), *(pytest.param(more, marks=pytest.mark.slow) for more in ((), IMAGES_IN_STEP))],
    ids=["muon", "adamw", "images made in the step"],
)
def test_the_step_that_is_captured_is_lightning_s(run, monkeypatch, options):
    """On the CPU there is no graph: the same step runs eagerly in its place, and must give the same numbers."""
    _, theirs = run("lightning", "--trainer.device", "cpu", *options)

    class Eager(GraphedStep):
        def __init__(self, step):
            self._step = step

        def __call__(self, batch):
            return self._step(batch)

    monkeypatch.setattr(module_file, "GraphedStep", Eager)
    monkeypatch.setattr(run_file, "device_of", lambda config: torch.device("cpu"))
    monkeypatch.setattr(run_file, "_without_cuda", lambda config, progress: config)
    code, ours = run("ours", "--trainer.cuda_graph", "true", *options)
    assert code == 0
    _assert_same_run(ours, theirs, tolerance=1e-5)


def test_on_a_cpu_it_is_turned_off_with_a_line(run, capsys):
    code, folder = run("run", "--trainer.device", "cpu", "--trainer.cuda_graph", "true", "--trainer.epochs", "1")
    assert code == 0 and folder.summary.exists()
    assert "trainer.cuda_graph: turned off" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ((), 1e-2),
        (("--optim.name", "muon"), 1e-2),
        (("--moe", "null"), 1e-2),
        (IMAGES_IN_STEP, 1e-2),
        (("--moe.router", "soft", "--moe.capacity_factor", "1"), 1e-2),
        (("--moe.router", "sigmoid", "--moe.shared_experts", "1"), 1e-2),
        (("--trainer.precision", "bf16"), 3e-2),
        (("--trainer.precision", "bf16", "--trainer.compile", "true", "--optim.name", "muon"), 3e-2),
    ],
    ids=["adamw", "muon", "dense", "images made in the step", "soft", "sigmoid", "bf16", "compiled"],
)
def test_a_graph_gives_the_numbers_of_eager_steps(run, options, tolerance):
    """Other random numbers, in dropout or the router, would move the weights by several times the tolerance."""
    _, eager = run("eager", "--trainer.device", "cuda", *options)
    code, graphed = run("graphed", "--trainer.device", "cuda", "--trainer.cuda_graph", "true", *options)
    assert code == 0
    _assert_same_run(graphed, eager, tolerance)


@pytest.mark.gpu
def test_a_graphed_run_resumes(run, monkeypatch):
    options = ("--trainer.device", "cuda", "--trainer.cuda_graph", "true")
    _, unbroken = run("unbroken", *options)
    step, seen = Classifier.training_step, []

    def step_and_signal(self, *args):
        seen.append(None)
        if len(seen) == 9:  # a replay, in the middle of an epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", step_and_signal)
        assert run("resumed", *options)[0] == 128 + signal.SIGTERM
    code, resumed = run("resumed", *options, "--resume")
    assert code == 0
    _assert_same_run(resumed, unbroken, tolerance=1e-2)


@pytest.mark.gpu
def test_a_nan_in_a_graph_blocks_all_later_updates(run, monkeypatch, capsys):
    call = GraphedStep.__call__
    calls = []

    def poisoned(self, batch):
        calls.append(None)
        if len(calls) == 8:
            batch = batch._replace(images=batch.images * float("nan"))
        return call(self, batch)

    monkeypatch.setattr(GraphedStep, "__call__", poisoned)
    options = ("--trainer.device", "cuda", "--trainer.cuda_graph", "true", "--trainer.log_every", "50")
    code, folder = run("run", *options)
    assert code == 2
    error = capsys.readouterr().err
    assert "step 8:" in error and "images" in error
    saved = _checkpoint(folder)
    assert saved["global_step"] == 5
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
