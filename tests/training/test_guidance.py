"""Runs with a router of images that is guided towards super-classes."""

import csv
import json

import lightning as L
import pytest
import torch
import yaml
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import vmoe
from vmoe.checkpoints import RunFolder
from vmoe.cli.evaluate import main as evaluate
from vmoe.cli.super_classes import main as super_classes
from vmoe.cli.train import main as train
from vmoe.errors import UserError
from vmoe.evaluation.guidance import Guidance, right_routers
from vmoe.explain.explorer import ExploreOptions, explore

RECIPE = """
data: {name: digits, batch_size: 40, subset: {per_class: 20}, mix: {mixup_alpha: 0.8}}
model: {name: vit_tiny_patch16_224, kwargs: {patch_size: 4, embed_dim: 24, depth: 4, num_heads: 2}}
moe: {layers: last-2, num_experts: 3, top_k: 1, route: image, capacity_factor: null}
optim: {warmup_epochs: 0}
trainer: {epochs: 2, device: cpu, loggers: [csv]}
"""
GROUPS = {"round": "0689", "open": "235", "straight": "147"}
OF_CLASSES = {digit: group for group, digits in GROUPS.items() for digit in digits}
NAMES = [str(digit) for digit in range(10)]


def image_router(**moe):
    torch.manual_seed(0)
    config = vmoe.MoeConfig(layers="last-2", num_experts=3, top_k=1, route="image", capacity_factor=None, **moe)
    kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 10}
    return vmoe.create_model("vit_tiny_patch16_224", config, **kwargs)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a guided run, of which the file of super-classes is gone, and its recipe."""
    folder = tmp_path_factory.mktemp("guided")
    recipe, file = folder / "tiny.yaml", folder / "super.yaml"
    recipe.write_text(RECIPE)
    file.write_text(yaml.safe_dump(OF_CLASSES))
    assert train(["--config", str(recipe), "--output_dir", str(folder / "run"), "--loss.super_classes", str(file)]) == 0
    file.unlink()
    return folder / "run", recipe


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_the_loss_is_cross_entropy_with_gradients_of_the_router(shared, mixed):
    model = image_router(shared_router=shared).double().train()
    guidance = Guidance({**OF_CLASSES, "9": {"round": 0.25, "open": 0.75}}, model)
    guidance.match(NAMES)
    guidance.targets = guidance.targets.double()
    images, labels = torch.randn(10, 3, 16, 16, dtype=torch.float64), torch.arange(10)
    shares = F.one_hot(labels, 10).double()
    shares = 0.7 * shares + 0.3 * shares.roll(1, 0) if mixed else shares
    model(images)
    found = guidance.loss(labels, shares if mixed else None)
    logits = [layer.last_image_logits for _, layer in vmoe.moe_layers(model)][: 1 if shared else 2]
    wanted = torch.zeros(10, 3, dtype=torch.float64)
    for label in range(10):
        for of, weight in enumerate(shares[label].tolist()):
            own = {"round": 0.25, "open": 0.75} if of == 9 else {OF_CLASSES[str(of)]: 1.0}
            for group, share in own.items():
                wanted[label, sorted(GROUPS).index(group)] += weight * share
    each = [-(wanted * of.log_softmax(-1)).sum(-1).mean() for of in logits]
    torch.testing.assert_close(found, torch.stack(each).mean())
    found.backward()
    routers = [layer.router for _, layer in vmoe.moe_layers(model) if hasattr(layer.router, "gate")]
    assert len(routers) == len(logits) and all(router.gate.weight.grad.abs().sum() > 0 for router in routers)
    experts = [parameter.grad for parameter in vmoe.moe_layers(model)[-1][1].experts.parameters()]
    assert all(grad is None or not grad.any() for grad in experts)  # of the last layer: it is behind all routers


@torch.no_grad()
def test_mixed_targets_are_exact_in_mixed_precision():
    model = image_router().eval()
    guidance = Guidance(OF_CLASSES, model)
    guidance.match(NAMES)
    model(torch.randn(10, 3, 16, 16))
    labels, shares = torch.arange(10), torch.rand(10, 10).softmax(-1)
    wanted = guidance.loss(labels, shares)
    with torch.autocast("cpu", torch.bfloat16):
        assert guidance.loss(labels, shares) == wanted


@pytest.mark.parametrize("router", ["token_choice", "cosine"])
@torch.no_grad()
def test_right_routers_change_wrong_images_alone(router):
    model = image_router(router=router, shared_router=True).eval()
    guidance = Guidance(OF_CLASSES, model)
    guidance.match(NAMES)
    images, guidance.labels = torch.randn(40, 3, 16, 16), torch.arange(40) % 10
    before = model(images)
    first = vmoe.moe_layers(model)[0][1]
    right = guidance.targets[guidance.labels].argmax(1)
    was_right = first.last_image_logits.argmax(1) == right
    assert 0 < was_right.sum() < 40
    with right_routers(guidance):
        forced = model(images)
        assert (first.last_image_logits.argmax(1) == right).all()
        torch.testing.assert_close(first.statistics.load, right.bincount(minlength=3) / 40)
    changed = (forced - before).abs().amax(1) > 1e-6
    assert (changed == ~was_right).all()
    torch.testing.assert_close(model(images), before)


def test_a_run_logs_its_router_and_needs_no_file(run, capsys):
    folder, _ = run
    rows = list(csv.DictReader(RunFolder(folder).metrics.open()))
    names = ("train/router_loss", "train/router_top1", "val/router_loss", "val/router_top1")
    assert all(0 < float(row[name]) < 2 for row in rows for name in names)
    assert RunFolder(folder).read_config()["loss"]["super_classes"] == OF_CLASSES
    metrics = RunFolder(folder).read_summary()["metrics"]
    assert train(["--resume", "--output_dir", str(folder)]) == 0
    assert "this run is finished" in capsys.readouterr().out
    figures = vmoe.evaluate(vmoe.load(folder), progress=False)["router"]
    assert figures["super_classes"] == sorted(GROUPS) and figures["oracle_top1"] is None
    assert figures["top1"] == pytest.approx(metrics["test/router_top1"])
    assert figures["loss"] == pytest.approx(metrics["test/router_loss"], rel=1e-4)


def test_the_explorer_counts_experts_by_super_class(run):
    model = vmoe.load(run[0])
    data = vmoe.ImageDataModule("digits", batch_size=100, mean=model.mean, std=model.std)
    data.setup("test")
    batches = [batch[:2] for batch in data.test_dataloader()]
    options = ExploreOptions(probe_images=0, cause_images=0, replicates=20, sample=1)
    report = explore(model, batches, options=options).report
    layers = [layer["super_classes"] for layer in report["layers"]]
    top1 = vmoe.evaluate(model, progress=False)["router"]["top1"]
    assert sum(layer["own"] for layer in layers) / len(layers) == pytest.approx(top1, abs=1e-5)
    assert all(layer["own"] <= layer["purity"] and 1 / 3 < layer["purity"] <= 1 for layer in layers)
    sizes = [len(GROUPS[name]) / 10 for name in sorted(GROUPS)]  # about as many images of each class
    for layer in layers:
        assert layer["names"] == sorted(GROUPS)
        assert [sum(row) for row in layer["shares"]] == pytest.approx([1, 1, 1])
        own = sum(size * layer["shares"][index][index] for index, size in enumerate(sizes))
        assert own == pytest.approx(layer["own"], abs=0.02)
    assert any(line.startswith("The expert of the image's super-class") for line in report["findings"])


def test_the_oracle_is_measured_beside_the_router(run, tmp_path, capsys):
    folder, _ = run
    assert evaluate([str(folder), "--oracle-router", "--split", "val", "--out", str(tmp_path)]) == 0
    assert "guided towards 3 super-classes" in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    assert 0 <= result["router"]["oracle_top1"] <= 1
    known = ["--classes", "by-name", "--data", "digits"]
    assert evaluate([str(folder), *known, "--ensemble-with", str(folder), "--oracle-router"]) == 2
    assert "an ensemble has several routers" in capsys.readouterr().err


def test_a_run_is_grouped_for_the_next(run, tmp_path, capsys):
    folder, recipe = run
    out = tmp_path / "found.yaml"
    assert super_classes([str(folder), "--count", "3", "--soft", "--out", str(out)]) == 0
    assert "of the model's errors on the validation images are within a super-class" in capsys.readouterr().out
    options = ["--loss.super_classes", str(out), "--trainer.epochs", "1", "--loss.guidance_weight", "2"]
    assert train(["--config", str(recipe), "--output_dir", str(tmp_path / "run"), *options]) == 0
    assert set(RunFolder(tmp_path / "run").read_config()["loss"]["super_classes"]) == set(NAMES)


def test_a_classifier_is_guided_by_the_names_of_its_classes():
    images, labels = torch.randn(20, 3, 16, 16), torch.arange(20) % 10
    loader = DataLoader(TensorDataset(images, labels), 10)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    task = vmoe.Classifier(image_router(), class_names=NAMES, loss={"super_classes": OF_CLASSES})
    trainer = L.Trainer(accelerator="cpu", enable_model_summary=False, **options)
    trainer.fit(task, loader, loader)
    assert 0 <= trainer.callback_metrics["val/router_top1"] <= 1
    nameless = vmoe.Classifier(image_router(), loss={"super_classes": OF_CLASSES})
    with pytest.raises(UserError, match="needs the names of the classes"):
        L.Trainer(accelerator="cpu", enable_model_summary=False, **options).fit(nameless, loader)
    with pytest.raises(UserError, match="guides a router of images, and this model is dense"):
        vmoe.Classifier(vmoe.create_model("vit_tiny_patch16_224", moe=False), loss={"super_classes": OF_CLASSES})
