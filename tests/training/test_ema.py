"""The average of the weights: its formula, what it leaves out, and how a run uses it."""

import csv
import json

import pytest
import torch

from vmoe.checkpoints import ENTRY, RunFolder, load_checkpoint
from vmoe.cli.train import main
from vmoe.data import DataConfig, ImageDataModule
from vmoe.data.config import SubsetConfig
from vmoe.training.classifier import Classifier
from vmoe.training.optim.average import WeightAverage

TINY = """
data: {name: digits, batch_size: 40, subset: {per_class: 20}, augment: {preset: none}}
model: {name: vit_tiny_patch16_224, kwargs: {patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}}
moe: {num_experts: 4}
optim: {warmup_epochs: 0}
trainer: {epochs: 2, device: cpu, ema_decay: 0.9}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunFolder:
    folder = tmp_path_factory.mktemp("run")
    recipe = folder / "tiny.yaml"
    recipe.write_text(TINY)
    assert main(["--config", str(recipe), "--output_dir", str(folder / "run")]) == 0
    return RunFolder(folder / "run")


def test_the_decay_warms_up():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema, expected = WeightAverage(model, 0.25), 0.0
    for update, decay in enumerate((1 / 10, 2 / 11, 3 / 12, 0.25, 0.25)):
        torch.nn.init.constant_(model.weight, update + 1)
        ema.update(None)
        expected = decay * expected + (1 - decay) * (update + 1)
        assert ema.weights["weight"].item() == pytest.approx(expected)


def test_a_blocked_update_never_enters():
    model = torch.nn.Linear(2, 2)
    ema = WeightAverage(model, 0.9)
    torch.nn.init.ones_(model.weight)
    ema.update(torch.tensor(0.0))
    before = {name: weight.clone() for name, weight in ema.weights.items()}
    torch.nn.init.zeros_(model.weight)
    ema.update(torch.tensor(1.0))
    assert ema.updates.item() == 1
    assert all(torch.equal(weight, before[name]) for name, weight in ema.weights.items())


def test_it_stands_in_for_the_weights_and_gives_them_back():
    model = torch.nn.Linear(2, 2)
    ema = WeightAverage(model, 0.9)
    average = ema.weights["weight"].clone()
    torch.nn.init.ones_(model.weight)
    with ema.applied():
        assert torch.equal(model.weight, average)
    assert torch.equal(model.weight, torch.ones(2, 2)) and torch.equal(ema.weights["weight"], average)


def test_validation_is_by_the_average_with_the_raw_weights_accuracy_beside(run):
    with open(run.metrics, newline="") as file:
        row = list(csv.DictReader(file))[-1]
    saved = torch.load(run.last, weights_only=True)
    raw = {key.removeprefix("model."): value for key, value in saved["state_dict"].items()}
    average = saved[ENTRY]["ema"]["weights"]
    assert average.keys() == raw.keys() and not torch.equal(average["head.weight"], raw["head.weight"])
    model = load_checkpoint(run.last).model
    assert _top1(model) == pytest.approx(float(row["val/top1"]))
    model.load_state_dict(raw)
    assert _top1(model) == pytest.approx(float(row["val/raw_top1"]))


def test_every_tool_gets_the_average_and_the_test_is_by_it(run):
    saved = torch.load(run.best, weights_only=True)
    model = load_checkpoint(run.path).model
    assert all(torch.equal(value, saved[ENTRY]["ema"]["weights"][name]) for name, value in model.named_parameters())
    metrics = json.loads(run.summary.read_text())["metrics"]
    assert _top1(model, "test") == pytest.approx(metrics["test/top1"])
    assert _top1(model, "train_eval") == pytest.approx(metrics["train_clean/top1"])
    assert "val/raw_top1" in metrics


def test_a_nan_stops_the_run_with_a_finite_average(run, tmp_path, monkeypatch):
    seen = []
    step = Classifier.training_step

    def poisoned(self, batch, batch_idx):
        seen[:] = [self.average]
        return step(self, batch, batch_idx) * (float("nan") if self.global_step == 3 else 1)

    monkeypatch.setattr(Classifier, "training_step", poisoned)
    assert main(["--config", str(run.config), "--output_dir", str(tmp_path)]) == 2
    assert seen[0].updates.item() == 3
    assert all(weight.isfinite().all() for weight in seen[0].weights.values())


def _top1(model: torch.nn.Module, split: str = "val") -> float:
    data = ImageDataModule(DataConfig(batch_size=40, subset=SubsetConfig(per_class=20)), seed=0)
    data.setup()
    with torch.inference_mode():
        batches = list(getattr(data, f"{split}_dataloader")())
        hits = [(model(batch.images).argmax(1) == batch.labels).float() for batch in batches]
    return torch.cat(hits).mean().item()
