"""The trainer: what it optimises, what it writes down, and what it stops at."""

import csv
import json
import math
import os
import re
import shutil
import signal
from multiprocessing import active_children

import pytest
import timm
import torch
from PIL import Image
from timm.models import VisionTransformer
from torch.nn import functional as F
from torch.utils.data._utils import signal_handling

import vmoe
from vmoe.checkpoints import ENTRY, RunFolder, load_checkpoint
from vmoe.cli.export import main as export
from vmoe.cli.train import main
from vmoe.data import DataConfig, ImageDataModule
from vmoe.data.config import AugmentConfig, SubsetConfig
from vmoe.data.loading import TrainImages
from vmoe.errors import UserError
from vmoe.training.classifier import Classifier
from vmoe.training.run.checkpoints import RunCheckpoints
from vmoe.training.run.journal import MetricsTable

TINY = """
data: {name: digits, batch_size: 40, subset: {per_class: 20}, augment: {preset: none}}
model: {name: vit_tiny_patch16_224, kwargs: {patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}}
moe: {num_experts: 4}
optim: {warmup_epochs: 0}
trainer: {epochs: 1, device: cpu}
"""


@pytest.fixture
def run(tmp_path):
    """A function that trains the tiny recipe with options, and gives the exit code and the run's folder."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY)

    def train(*options: str, name: str = "run") -> tuple[int, RunFolder]:
        folder = RunFolder(tmp_path / name)
        return main(["--config", str(recipe), "--output_dir", str(folder.path), *options]), folder

    return train


def _weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    return torch.load(folder.last, weights_only=True)["state_dict"]


def test_a_run_s_folder_holds_what_is_promised(run):
    code, folder = run("--trainer.epochs", "2")
    assert code == 0
    with open(folder.metrics, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "5"), ("2", "10")]
    layer = "moe/blocks.1.mlp"
    assert list(rows[0]) == [
        *("epoch", "step", "train/loss", "train/top1", "train/images_per_second", "lr"),
        *("val/loss", "val/top1", "val/top5"),
        *(f"{layer}/load/{e}" for e in range(4)),
        f"{layer}/max_load",
        f"{layer}/dropped",
        f"{layer}/entropy",
    ]
    loads = [float(rows[0][f"{layer}/load/{e}"]) for e in range(4)]
    assert sum(loads) == pytest.approx(4)  # relative: 1 is fair
    assert float(rows[0][f"{layer}/max_load"]) == max(loads)
    summary = json.loads(folder.summary.read_text())
    assert 0 <= summary["metrics"]["test/top1"] <= summary["metrics"]["test/top5"] <= 1
    assert summary["parameters"]["total"] > summary["parameters"]["active"] > 0
    assert summary["flops_per_image"] > summary["dense_twin"]["flops_per_image"] > 0  # K=2 full-width experts cost more
    assert summary["images_trained"] == 10 * 40 and set(summary["moe_tokens_per_image"].values()) == {17}
    assert summary["epochs"] == 2 and summary["seed"] == 0 and "--trainer.epochs 2" in summary["command"]
    assert list(folder.path.glob("events.*"))
    assert not list(folder.path.rglob(".*"))  # no temporary file stays


def test_a_run_first_prints_what_it_trains_on(run, capsys):
    run("--data.subset.classes", "[3, 7]", "--data.subset.per_class", "21")
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert "test top-1" in out and "top-5" not in out  # which two classes cannot miss
    assert lines[0].startswith("threads: ") and lines[1].startswith("device: cpu, by trainer.device=cpu; ")
    assert lines[2:6] == [
        "images: digits, 2 classes, 16 x 16 pixels",
        "  training: 42 images, 21 per class",
        "  validation: 29 images, 15 of 3, 14 of 7",
        "  test: 73 images, 37 of 3, 36 of 7",
    ]
    assert (
        "model: vit_tiny_patch16_224, 4 experts with router=token_choice in each of 1 MoE layer (blocks.1.mlp)" in lines
    )


@pytest.fixture
def pictures(tmp_path):
    """A folder of 12 pictures for training, 4 for validation and 4 for test; the options that train on it."""
    for number in range(20):
        split = "train" if number < 12 else "val" if number < 16 else "test"
        path = tmp_path / "pictures" / split / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (12 * number, 0, 0)).save(path)
    root = tmp_path / "pictures"
    where = ("--data.name", "folder", "--data.root", str(root), "--data.image_size", "16")
    return root, (*where, "--data.subset.per_class", "null", "--data.batch_size", "4")


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_damaged_image_of_evaluation_is_found_before_the_run(run, pictures, capsys, split):
    root, options = pictures
    damaged = sorted((root / split).rglob("*.png"))
    for path in damaged[:2]:
        path.write_bytes(b"no picture")
    code, folder = run(*options)
    assert code == 2 and not folder.path.exists()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{damaged[0]}: cannot be read" in error and str(damaged[1]) in error
    assert "the same of 1 other" in error


def test_damaged_images_of_training_are_named_before_the_run(run, pictures, capsys):
    root, options = pictures
    first = min((root / "train").rglob("*.png"))
    first.write_bytes(b"no picture")
    assert run(*options)[0] == 0
    out = capsys.readouterr().out
    assert f"all 20 image files were opened, of which 1 of training cannot be read and are replaced: {first}" in out


def test_what_the_training_gave_is_written_where_the_test_fails(run, pictures, capsys):
    root, options = pictures
    damaged = min((root / "test").rglob("*.png"))
    content = damaged.read_bytes()
    damaged.write_bytes(b"no picture")
    code, folder = run(*options, "--data.check", "false")
    assert code == 2
    printed = capsys.readouterr()
    assert "data.check: the 20 image files are not opened before the run\n" in printed.out
    assert str(damaged) in printed.err and f"vmoe train --resume --output_dir {folder.path}" in printed.err
    summary = json.loads(folder.summary.read_text())
    assert summary["epochs"] == 1 and "val/top1" in summary["metrics"] and "test/top1" not in summary["metrics"]
    damaged.write_bytes(content)
    assert main(["--resume", "--output_dir", str(folder.path)]) == 0
    assert "test/top1" in json.loads(folder.summary.read_text())["metrics"]


def test_images_of_very_many_tokens_are_warned_about_on_a_cpu(run, capsys):
    no_place = ("--moe.capacity_factor", "0.00001", "--moe.capacity_rounding", "round")
    assert run("--data.image_size", "132", *no_place)[0] == 2  # before the first step, which would take long
    assert "warning: at 132 x 132 pixels an image has 1,089 tokens" in capsys.readouterr().out


def test_the_checkpoint_gives_the_model_back(run):
    _, folder = run()
    checkpoint = load_checkpoint(folder.path)
    assert checkpoint.path == folder.best
    assert (checkpoint.epoch, checkpoint.step, checkpoint.image_size) == (1, 5, 16)
    assert checkpoint.class_names == [str(digit) for digit in range(10)]
    assert not checkpoint.model.training
    saved = _weights(folder)
    assert all(torch.equal(saved[f"model.{key}"], value) for key, value in checkpoint.model.state_dict().items())
    data = ImageDataModule(DataConfig(batch_size=500, subset=SubsetConfig(per_class=20)), seed=0)
    data.setup("test")
    with torch.inference_mode():
        hits = [(checkpoint.model(batch.images).argmax(1) == batch.labels).float() for batch in data.test_dataloader()]
    top1 = json.loads(folder.summary.read_text())["metrics"]["test/top1"]
    assert torch.cat(hits).mean().item() == pytest.approx(top1)


def test_a_checkpoint_rebuilds_a_model_that_a_folder_described(run, tmp_path, capsys):
    """Also when the folder is gone, and the weights that the run started from."""
    source = tmp_path / "described"
    source.mkdir()
    described = {"architecture": "vit_tiny_patch16_224", "num_classes": 7}
    arguments = {"patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 64, "num_classes": 7}
    (source / "config.json").write_text(json.dumps({**described, "model_args": arguments, "pretrained_cfg": {}}))
    start = tmp_path / "start.pth"
    kwargs = {"patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=16, **kwargs).state_dict(), start)
    given = ("--model.name", f"local-dir:{source}", "--model.kwargs", json.dumps({"checkpoint_path": str(start)}))
    code, folder = run(*given, "--moe", "null")
    assert code == 0, capsys.readouterr().err
    shutil.rmtree(source)
    start.unlink()
    opened = load_checkpoint(folder.path)
    assert len(opened.model.blocks) == 3 and opened.config["model"]["name"] == "vit_tiny_patch16_224"
    shared = tmp_path / "shared.safetensors"
    assert export([str(folder.path), "--out", str(shared)]) == 0
    assert len(load_checkpoint(shared).model.blocks) == 3
    assert main(["--resume", "--output_dir", str(folder.path), "--trainer.epochs", "2"]) == 0
    assert load_checkpoint(folder.last).epoch == 2


def test_accumulation_equals_a_bigger_batch(run):
    dense = ("--moe", "null", "--data.subset.per_class", "24", "--trainer.epochs", "2")
    _, whole = run(*dense, "--data.batch_size", "40", name="whole")
    _, halves = run(*dense, "--data.batch_size", "20", "--trainer.accumulate", "2", name="halves")
    for key, value in _weights(whole).items():
        torch.testing.assert_close(_weights(halves)[key], value, rtol=1e-4, atol=1e-5)


def test_the_last_update_of_an_epoch_is_the_mean_of_the_batches_it_has(run):
    """Five batches make one update of an epoch; that up to eight could does not make it smaller."""
    states = []
    for accumulate in ("5", "8"):
        code, folder = run("--trainer.accumulate", accumulate, "--optim.clip_norm", "null", name=accumulate)
        assert code == 0
        states.append(torch.load(folder.last, weights_only=True)["optimizer_states"][0]["state"])
    for ours, expected in zip(*(state.values() for state in reversed(states)), strict=True):
        torch.testing.assert_close(ours["exp_avg"], expected["exp_avg"], rtol=1e-5, atol=0)


def test_auxiliary_losses_train_the_router(run):
    gates = []
    for name, weight in (("without", "0"), ("with", "100")):
        _, folder = run("--moe.importance_loss_weight", weight, "--moe.load_loss_weight", "0", name=name)
        gates.append(_weights(folder)["model.blocks.1.mlp.router.gate.weight"])
    assert (gates[0] - gates[1]).abs().max() > 1e-3


def test_learning_rate_warms_up_and_follows_a_cosine(run):
    options = ("--optim.warmup_epochs", "1", "--trainer.epochs", "3", "--optim.lr", "0.01", "--optim.min_lr", "0.001")
    _, folder = run(*options)
    table = MetricsTable(folder.metrics, [], step=100)
    first, second, third = (float(row["lr"]) for row in table.rows)
    assert first == pytest.approx(0.01)  # the last of five warm-up updates
    assert 0.001 < second < 0.01
    assert third == pytest.approx(0.001)


def test_a_warm_up_longer_than_the_run_is_told(run, capsys):
    run("--optim.warmup_epochs", "2")
    assert "optim.warmup_epochs=2.0 is longer than trainer.epochs=1" in capsys.readouterr().out


def test_early_stopping(run, monkeypatch):
    monkeypatch.setattr(Classifier, "evaluation_metrics", lambda self, split: dict.fromkeys(_names(split), 0.5))
    code, folder = run("--trainer.epochs", "9", "--trainer.early_stopping", "2")
    assert code == 0
    summary = json.loads(folder.summary.read_text())
    assert (summary["epochs"], summary["best_epoch"]) == (3, 1)


def test_a_run_that_goes_on_keeps_its_best_epoch(run, monkeypatch):
    """The second epoch is as good as the first, and so not better."""
    monkeypatch.setattr(Classifier, "evaluation_metrics", lambda self, split: dict.fromkeys(_names(split), 0.5))
    _, folder = run()
    assert main(["--resume", "--output_dir", str(folder.path), "--trainer.epochs", "2"]) == 0
    summary = json.loads(folder.summary.read_text())
    assert (summary["epochs"], summary["best_epoch"]) == (2, 1)


def _names(split: str) -> list[str]:
    return [f"{split}/loss", f"{split}/top1", f"{split}/top5"]


def test_without_validation_the_end_of_training_is_tested(run, capsys):
    code, folder = run("--data.val_fraction", "0", "--trainer.epochs", "2", "--trainer.ema_decay", "0.9")
    assert code == 0
    out = capsys.readouterr().out
    assert "by the checkpoint of epoch 2 (no validation, unaugmented training images" in out and "val " not in out
    assert re.search(r"test top-1 [\d.]+%, top-5 [\d.]+%, loss", out)
    summary = json.loads(folder.summary.read_text())
    assert summary["best_epoch"] == summary["epochs"] == 2
    assert {name.partition("/")[0] for name in summary["metrics"]} == {"test", "train_clean"}
    with open(folder.metrics, newline="") as file:
        assert not any(name.startswith("val/") for name in next(csv.reader(file)))
    best, last = (torch.load(path, weights_only=True) for path in (folder.best, folder.last))
    assert best[ENTRY]["best"] == {"epoch": 2} and best["global_step"] == last["global_step"] == 10
    weights = load_checkpoint(folder.path).model.state_dict()
    for name, average in last[ENTRY]["ema"]["weights"].items():
        assert torch.equal(weights[name], average) and not torch.equal(average, last["state_dict"][f"model.{name}"])


@pytest.mark.parametrize("place", ["loss", "gradient", "input"])
def test_nan_stops_before_the_update_and_keeps_the_last_checkpoint(run, monkeypatch, capsys, place):
    step = Classifier.training_step

    def poisoned(self, batch, batch_idx):
        if self.global_step == 7:
            if place == "input":
                batch = batch._replace(images=batch.images * float("nan"))
            if place == "gradient":
                self.model.head.bias.register_hook(lambda gradient: gradient * float("inf"))
            loss = step(self, batch, batch_idx)
            return loss * float("nan") if place == "loss" else loss
        return step(self, batch, batch_idx)

    def watch(self, trainer, module, exception):
        seen.append({key: value.clone() for key, value in module.state_dict().items()})

    seen = []
    monkeypatch.setattr(Classifier, "training_step", poisoned)
    monkeypatch.setattr(RunCheckpoints, "on_exception", watch)
    code, folder = run("--trainer.epochs", "2")
    assert code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "step 8:" in error
    assert ("images" in error) == (place == "input")
    assert all(value.isfinite().all() for value in seen[0].values())
    saved = torch.load(folder.last, weights_only=True)
    assert (saved["global_step"], saved[ENTRY]["epochs_done"]) == (5, 1)


def test_dead_and_dominant_experts_are_told(run, monkeypatch, capsys):
    create_model = vmoe.create_model

    def without_preference(*args, **kwargs):
        """Equal gates, of which the first expert is chosen."""
        model = create_model(*args, **kwargs)
        for _, layer in vmoe.moe_layers(model):
            torch.nn.init.zeros_(layer.router.gate.weight)
        return model

    monkeypatch.setattr("vmoe.checkpoints.building.create_model", without_preference)
    _, folder = run(
        "--moe.noise_std",
        "0",
        "--moe.top_k",
        "1",
        "--moe.num_experts",
        "8",
        "--optim.lr",
        "1e-12",
        "--optim.min_lr",
        "0",
    )
    out = " ".join(capsys.readouterr().out.split())
    assert "blocks.1.mlp: expert 0 has taken over" in out
    assert "blocks.1.mlp: experts 1, 2, 3, 4, 5, 6, 7 got under 1%" in out
    assert folder.summary.exists()


def test_a_second_epoch_compiles_nothing_again_and_names_stay(run, monkeypatch):
    compile_module, step, epoch, compiled = torch.nn.Module.compile, Classifier.training_step, 0, []

    def keep_graph(graph, inputs):
        compiled.append(epoch)
        return graph

    def note_epoch(self, *args):
        nonlocal epoch
        epoch = self.current_epoch
        return step(self, *args)

    monkeypatch.setattr(Classifier, "training_step", note_epoch)
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **kwargs: compile_module(self, backend=keep_graph, **kwargs)
    )
    code, folder = run("--trainer.compile", "true", "--trainer.epochs", "2")
    assert code == 0 and 0 in compiled
    assert sum(each > 0 for each in compiled) <= 1  # the test's last batch has a size of its own
    assert not any("_orig_mod" in key for key in _weights(folder))


def test_damaged_images_are_counted_and_named(run, monkeypatch, capsys):
    step = Classifier.training_step
    monkeypatch.setattr(
        Classifier, "training_step", lambda self, batch, i: step(self, batch._replace(damaged=["a/b.png", "c.png"]), i)
    )
    run()
    assert "2 damaged images were replaced: a/b.png, c.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("signum", "advice"), [(signal.SIGKILL, "most likely memory ran out"), (signal.SIGBUS, "--shm-size 1g")]
)
def test_the_death_of_a_loader_s_worker_ends_the_run_with_a_line(run, monkeypatch, capsys, signum, advice):
    monkeypatch.setattr(TrainImages, "__getitems__", lambda self, keys: os.kill(os.getpid(), signum))
    # an earlier run of this process: after it Lightning took back the handler of SIGCHLD, which torch sets once
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    code, _ = run("--data.workers", "1")
    assert code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "data.workers: a process that loads images ended by the signal" in error and advice in error
    assert not active_children()


def test_a_full_disk_leaves_the_old_checkpoint(run, monkeypatch, capsys):
    save = torch.save
    calls = []

    def full(content, file):
        calls.append(None)
        if len(calls) > 1:
            file.write(b"half")
            raise RuntimeError("PytorchStreamWriter failed writing file")
        save(content, file)

    monkeypatch.setattr(torch, "save", full)
    code, folder = run("--trainer.epochs", "2")
    assert code == 2
    assert "cannot be written" in capsys.readouterr().err
    assert torch.load(folder.last, weights_only=True)["global_step"] == 5
    assert not list(folder.path.rglob(".*"))


def test_metrics_table_is_cut_to_the_resumed_step(tmp_path):
    table = MetricsTable(tmp_path / "metrics.csv", ["epoch", "step"], step=0)
    for epoch in (1, 2, 3):
        table.append({"epoch": epoch, "step": 10 * epoch})
    resumed = MetricsTable(tmp_path / "metrics.csv", ["epoch", "step"], step=25)
    resumed.append({"epoch": 3, "step": 30})
    assert (tmp_path / "metrics.csv").read_text() == "epoch,step\n1,10\n2,20\n3,30\n"


def test_our_trainer_and_a_bare_loop_both_train_a_v_moe(run):
    """The bare loop knows nothing of MoE: the layers inject the gradients of their losses."""
    code, folder = run("--trainer.epochs", "10", "--data.subset.per_class", "40", "--optim.lr", "3e-3")
    assert code == 0
    rows = MetricsTable(folder.metrics, [], step=10**6).rows
    assert float(rows[-1]["train/loss"]) < 0.9 * float(rows[0]["train/loss"])
    assert float(rows[-1]["moe/blocks.1.mlp/max_load"]) < 1.5

    data = ImageDataModule(
        DataConfig(batch_size=40, subset=SubsetConfig(per_class=40), augment=AugmentConfig(preset="none")), seed=0
    )
    data.setup("fit")
    torch.manual_seed(0)
    moe = vmoe.MoeConfig(num_experts=4, inject_auxiliary_loss=True)
    model = vmoe.create_model(
        "vit_tiny_patch16_224", moe, num_classes=10, img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    loader, losses, loads = data.train_dataloader(), [], []
    for epoch in range(10):  # rounding differs between processors: enough that each is well below the limit
        data.train_sampler.set_epoch(epoch)
        for images, labels, *_ in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            loads.append(vmoe.moe_layers(model)[0][1].statistics.load)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert 4 * torch.stack(loads[-10:]).mean(0).max() < 1.5


def test_a_folder_of_classes_alone_is_split_and_few_images_for_validation_are_warned_of(run, tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (16, 16), (number, 99, 0)).save(tmp_path / "pets" / name / f"{number}.png")
    options = ("--data.name", "folder", "--data.root", str(tmp_path / "pets"), "--data.subset.per_class", "10")
    code, folder = run(*options, "--data.image_size", "16")
    assert code == 0 and folder.summary.exists()
    lines = " ".join(capsys.readouterr().out.split())
    assert f"{tmp_path / 'pets'}: has no split of its own: 20% of each class are cut off for the test" in lines
    assert "warning: 4 images for validation: too few to choose an epoch by, as one is 25.0% of them" in lines


def test_a_run_of_few_updates_is_warned_of(run, capsys):
    assert run("--trainer.accumulate", "2")[0] == 0  # 5 batches, two per update
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: 3 updates in all, which is few to learn from: lower trainer.accumulate=2 or lower data" in said
    assert run("--data.batch_size", "16", "--data.subset.per_class", "5", name="small")[0] == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "few to learn from: raise trainer.epochs=" in said
    assert run("--data.batch_size", "1", "--data.subset.per_class", "10", name="long")[0] == 0
    assert "updates in all" not in capsys.readouterr().out


def test_what_is_frozen_keeps_its_weights(run):
    code, folder = run("--finetune.freeze", "[backbone, routers]", "--optim.lr", "0.01")
    assert code == 0
    _, start = run(
        "--finetune.freeze", "[backbone, routers]", "--optim.lr", "1e-30", "--optim.min_lr", "0", name="start"
    )
    before, after = _weights(start), _weights(folder)
    changed = {name for name, value in after.items() if not torch.equal(before[name], value)}
    expected = {name for name in after if name.startswith("model.head.") or ".experts." in name}
    assert changed == expected


def test_a_linear_probe_trains_on_features_of_evaluation(run, capsys):
    code, folder = run("--finetune.freeze", "all_but_head", "--model.kwargs.drop_path_rate", "0.9")
    assert code == 0 and "330 of 53,130 parameters, the classifier alone: a linear probe" in capsys.readouterr().out
    _, without = run("--finetune.freeze", "all_but_head", name="without")
    head = [_weights(each)["model.head.weight"] for each in (folder, without)]
    assert torch.equal(*head)  # no drop path, which the classifier would have learnt to bear


def test_gradient_checkpointing_changes_no_weight(run):
    options = ["--model.kwargs.drop_path_rate", "0.3", "--moe.router", "sigmoid"]
    (_, plain), (_, checkpointed) = (
        run(*options, "--trainer.grad_checkpointing", str(is_on).lower(), name=str(is_on)) for is_on in (False, True)
    )
    before, after = _weights(plain), _weights(checkpointed)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_learning_rate_is_found_and_nothing_trained(run, capsys):
    router = ["--moe.router", "soft", "--moe.capacity_factor", "1"]
    code, folder = run("--find_lr", *router, "--parallel.strategy", "fsdp", "--trainer.accumulate", "2")
    assert code == 0 and not folder.last.exists() and not folder.config.exists()
    with open(folder.path / "find_lr.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rates = [float(row["lr"]) for row in rows]
    # The loss of ten classes of which nothing is known, of one batch and of the mean over more
    assert [float(row["loss"]) for row in rows[:20]] == pytest.approx([math.log(10)] * 20, rel=0.1)
    found = float(re.search(r"--optim.lr (\S+);", capsys.readouterr().out)[1])
    assert rates == sorted(rates) and any(found == pytest.approx(rate, rel=0.1) for rate in rates)
    assert run("--find_lr", "--optim.name", "timm:lyon", name="other")[0] == 2


def test_the_largest_batch_that_fits_is_found(run, capsys, monkeypatch):
    def fill_memory(module, inputs):
        if isinstance(module, VisionTransformer) and inputs and len(inputs[0]) > 40:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    code, folder = run("--find_batch_size", "--data.batch_size", "5000")  # more than there are images
    assert code == 0 and not folder.path.exists()
    assert "a batch of 128 images fits, the training images are too few for twice" in capsys.readouterr().out
    with torch.nn.modules.module.register_module_forward_pre_hook(fill_memory):
        assert run("--find_batch_size")[0] == 0
    assert "a batch of 32 images fits, 64 do not: --data.batch_size 32\n" in capsys.readouterr().out
    monkeypatch.setattr("vmoe.training.run.finding.LARGEST_BATCH", 4)
    assert run("--find_batch_size")[0] == 0
    assert "a batch of 4 images fits, larger ones are not tried: " in capsys.readouterr().out
    assert run("--find_batch_size", "--find_lr")[0] == 2


def test_a_found_rate_is_the_seed_s(tmp_path):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY)
    ones, others = (vmoe.find_lr(recipe, steps=25, log=lambda line: None) for _ in range(2))
    assert ones.losses == others.losses and ones.lr == others.lr
    with pytest.raises(UserError, match=r"steps=12: must be 20 or more"):
        vmoe.find_lr(recipe, steps=12)
