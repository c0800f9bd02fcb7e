"""Numbers that are not finite, and sizes at their ends: caught, shown or right, never silent."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from support import saved_runs

import vmoe
from vmoe import MoeConfig, MoeMlp
from vmoe.checkpoints import ENTRY, RunFolder
from vmoe.cli.evaluate import main as evaluate
from vmoe.cli.train import main as train
from vmoe.moe.config import ROUTER_NAMES
from vmoe.training.classifier import Classifier
from vmoe.training.guard import Guard
from vmoe.training.optim.muon import Muon

D, H, N, E = 16, 24, 6, 4
# What promises that a prediction does not depend on the rest of the batch; "random" draws, "balanced" counts tokens.
INDEPENDENT = [name for name in ROUTER_NAMES if name not in ("random", "balanced")]
LEARNING = [name for name in ROUTER_NAMES if name not in ("hash", "random")]
TINY = """
data: {name: digits, batch_size: 40, subset: {per_class: 4}, augment: {preset: none}}
model: {name: vit_tiny_patch16_224, kwargs: {patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}}
moe: {num_experts: 4}
trainer: {epochs: 1, device: cpu}
"""


def make_layer(router: str, **knobs) -> MoeMlp:
    torch.manual_seed(0)
    return MoeMlp(D, H, moe=MoeConfig(router=router, **{"num_experts": E, "top_k": 2} | knobs), tokens=N)


def make_tokens(images: int) -> torch.Tensor:
    return torch.randn(images, N, D, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def run(tmp_path):
    """A function that trains the tiny recipe with options, and gives the exit code and the run's folder."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY)

    def start(*options: str, name: str = "run") -> tuple[int, RunFolder]:
        folder = RunFolder(tmp_path / name)
        return train(["--config", str(recipe), "--output_dir", str(folder.path), *options]), folder

    return start


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("router", INDEPENDENT)
def test_an_image_that_is_not_finite_shows_and_spoils_no_other(router, bad):
    layer, x = make_layer(router).eval(), make_tokens(5)
    expected = layer(x)
    x[2, 3, 1] = bad
    y = layer(x)
    assert not y[2, 3].isfinite().all()
    others = [0, 1, 3, 4]
    torch.testing.assert_close(y[others], expected[others])


@pytest.mark.parametrize("router", LEARNING)
def test_router_weights_that_are_not_finite_show(router):
    layer = make_layer(router).eval()
    with torch.no_grad():
        next(layer.router.parameters()).flatten()[0] = math.nan
    assert not layer(make_tokens(3)).isfinite().all()


@pytest.mark.parametrize("router", ROUTER_NAMES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_equal_gates_are_finite_and_repeatable(router, training):
    layer = make_layer(router, **({} if router in ("soft", "hash", "random") else {"noise_std": 0.0})).train(training)
    with torch.no_grad():
        for parameter in layer.router.parameters():
            parameter.zero_()
    x = make_tokens(4).requires_grad_()
    torch.manual_seed(3)
    y = layer(x)
    (y.square().mean() + layer.last_auxiliary_loss).backward()
    assert y.isfinite().all() and layer.last_auxiliary_loss.isfinite() and x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    torch.manual_seed(3)
    assert torch.equal(layer(x), y)


def lopsided(**knobs) -> tuple[MoeMlp, torch.Tensor]:
    """A layer all of whose tokens choose expert 0."""
    layer, x = make_layer("token_choice", **{"top_k": 1, "noise_std": 0.0} | knobs), make_tokens(8)
    x[..., 0] = 5
    with torch.no_grad():
        layer.router.gate.weight.zero_()
        layer.router.gate.weight[0, 0] = 10
    return layer, x


def test_all_tokens_to_one_expert_are_counted_and_cost():
    layer, x = lopsided(capacity_factor=1.0, capacity_multiple_of=1)
    y = layer(x)
    assert layer.statistics.load.tolist() == [1, 0, 0, 0]
    assert layer.statistics.dropped.item() == pytest.approx(1 - 1 / E)  # an expert has a fair share of places
    assert layer.statistics.importance_loss.item() == pytest.approx(E - 1, rel=1e-3)  # the largest that there is
    (y.sum() + layer.last_auxiliary_loss).backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    assert not layer.experts.fc1.weight.grad[1:].any()  # zero, not None


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_experts_idle_for_1000_steps_stay_finite(optimizer):
    layer, x = lopsided()
    layer.router.requires_grad_(False)
    start = layer.experts.fc1.weight[0].clone()
    parameters = [layer.experts.fc1.weight, *(p for p in layer.experts.parameters() if p.ndim == 2)]
    made = (
        torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
        if optimizer == "adamw"
        else Muon([{"params": parameters[:1], "method": "muon", "lr": 1e-3, "weight_decay": 0.05}], betas=(0.9, 0.99))
    )
    for _ in range(1000):
        made.zero_grad()
        layer(x).square().mean().backward()
        made.step()
    assert layer.statistics.load.tolist() == [1, 0, 0, 0]
    assert all(parameter.isfinite().all() for parameter in layer.parameters())
    assert all(value.isfinite().all() for state in made.state.values() for value in state.values())
    assert not torch.equal(layer.experts.fc1.weight[0], start)
    assert layer.experts.fc1.weight[1].abs().max() > 0.1 * start.abs().max()  # decayed, not destroyed


@pytest.mark.parametrize("router", ROUTER_NAMES)
@pytest.mark.parametrize("knobs", [{"top_k": E}, {"num_experts": 1, "top_k": 1}], ids=["K=E", "E=1"])
@pytest.mark.parametrize("images", [1, 0], ids=["one image", "no image"])
def test_the_ends_of_all_sizes(router, knobs, images):
    layer = make_layer(router, **knobs)
    for training in (True, False):
        layer.train(training)
        y = layer(make_tokens(images))
        assert y.shape == (images, N, D) and y.isfinite().all()
        loss = y.sum() + layer.last_auxiliary_loss
        assert loss.isfinite()
    layer.train()
    (layer(make_tokens(images)).sum() + layer.last_auxiliary_loss).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    assert all(value.isfinite().all() for value in layer.statistics)


@pytest.mark.parametrize("router", INDEPENDENT)
def test_logits_do_not_depend_on_the_rest_of_the_batch(router):
    torch.manual_seed(0)
    moe = MoeConfig(router=router, num_experts=E, layers="every-1")
    model = vmoe.create_model("vit_tiny_patch16_224", moe, num_classes=7, img_size=16, **saved_runs.KWARGS).eval()
    images = torch.randn(9, 3, 16, 16)
    with torch.no_grad():
        together = model(images)
        for number, image in enumerate(images):
            torch.testing.assert_close(model(image[None])[0], together[number], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(images.flip(0)).flip(0), together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_blocked", [True, False])
def test_a_blocked_update_moves_no_bias_of_the_sigmoid_router(is_blocked):
    """As on a GPU, where the guard blocks updates until the host looks."""
    moe = MoeConfig(router="sigmoid", num_experts=E)
    model = vmoe.create_model("vit_tiny_patch16_224", moe, num_classes=3, img_size=16, **saved_runs.KWARGS)
    module, guard = Classifier(model), Guard()
    optimizer = module.configure_optimizers()["optimizer"]
    optimizer.register_step_pre_hook(lambda optimizer, *_: guard.block(optimizer))
    model(torch.randn(4, 3, 16, 16)).sum().backward()
    if is_blocked:
        guard.bad_step.fill_(0)
    optimizer.step()
    biases = torch.cat([layer.router.bias for _, layer in vmoe.moe_layers(model)])
    assert biases.any() != is_blocked
    assert not any(layer.router.choices.any() for _, layer in vmoe.moe_layers(model))


@pytest.mark.parametrize("ema", [[], ["--trainer.ema_decay", "0.5"]], ids=["", "average"])
@pytest.mark.parametrize("validation", [[], ["--data.val_fraction", "0"]], ids=["", "without_validation"])
def test_weights_that_overflow_are_never_saved(run, capsys, ema, validation):
    """One update an epoch, which is finite itself: only evaluation can tell."""
    options = ("--data.batch_size", "4000", "--optim.lr", "1e38", "--optim.warmup_epochs", "0")
    code, folder = run(*options, *ema, *validation)
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1
    assert "epoch 1" in error and "not finite" in error and "--optim.lr" in error
    assert not folder.last.exists() and not folder.best.exists()


def test_a_set_smaller_than_a_batch_is_trained_on(run):
    code, folder = run("--data.batch_size", "4000", "--trainer.epochs", "2")
    assert code == 0
    with open(folder.metrics, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2"]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())


def test_one_class(run):
    code, folder = run("--data.subset.classes", "[3]")
    assert code == 0
    metrics = json.loads(folder.summary.read_text())["metrics"]
    assert (metrics["test/top1"], metrics["test/top5"], metrics["test/loss"]) == (1, 1, 0)
    assert evaluate([str(folder.path)]) == 0


@pytest.mark.slow
def test_ten_thousand_classes(run, tmp_path, capsys):
    labels = np.arange(10_000)
    images = (labels[:, None, None] % 251 + np.arange(64).reshape(8, 8)).astype(np.uint8)
    few = labels[::500]
    held_out = {"test_x": images[few], "test_y": few, "val_x": images[few], "val_y": few}
    np.savez(tmp_path / "many.npz", train_x=images, train_y=labels, **held_out)
    options = ("--data.name", "npz", "--data.root", str(tmp_path / "many.npz"), "--data.batch_size", "1000")
    code, folder = run(*options, "--data.subset.per_class", "null", "--data.augment.preset", "none")
    assert code == 0
    assert torch.load(folder.best, weights_only=True)[ENTRY]["class_names"][-1] == "9999"
    assert evaluate([str(folder.path)]) == 0
    result = json.loads((folder.path / "evaluation.json").read_text())["results"][0]
    assert result["images"] == 20 and result["confusion"] is None
    assert len(result["class_accuracy"]) == 10_000 and result["class_accuracy"][1] is None
    assert (folder.path / "evaluation.json").stat().st_size < 1e6
    assert "too many classes" in capsys.readouterr().out
