"""`vmoe prune` and `vmoe distill`."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

import vmoe
from vmoe import moe_layers
from vmoe.checkpoints import load_checkpoint
from vmoe.cli.distill import main as distill
from vmoe.cli.evaluate import main as evaluate
from vmoe.cli.explore import main as explore
from vmoe.cli.export import main as export
from vmoe.cli.heatmap import main as heatmap
from vmoe.cli.predict import main as predict
from vmoe.cli.prune import main as prune
from vmoe.cli.train import main as train

PHOTO = Path(__file__).parents[2] / "assets" / "heatmap.png"
MOE = {"num_experts": 4, "top_k": 2, "layers": [1, 3]}
BY_IMAGE = {"num_experts": 4, "top_k": 1, "layers": [1, 3], "route": "image", "capacity_factor": None}
FEW = {"subset": {"per_class": 4}, "batch_size": 20}


@pytest.mark.parametrize(
    "options",
    [[], ["--merge"], pytest.param(["--by", "activation-norm"], marks=pytest.mark.slow)],
    ids=["mass", "merge", "norm"],
)
def test_the_result_is_an_ordinary_checkpoint(save_run, tmp_path, capsys, options):
    run, out = save_run(moe=MOE), tmp_path / "pruned"
    assert prune([str(run), "--keep", "2", "--out", str(out), "--images", "30", *options]) == 0
    printed = capsys.readouterr().out
    assert "before" in printed and "after" in printed
    assert {file.name for file in out.iterdir()} == {"model.safetensors", "prune.json"}
    report = json.loads((out / "prune.json").read_text())
    checkpoint = load_checkpoint(out)
    assert [layer.num_experts for _, layer in moe_layers(checkpoint.model)] == [2, 2]
    found = {}
    for name, source in (("before", run), ("after", out)):
        assert evaluate([str(source), "--json", str(tmp_path / "result.json"), "--out", str(tmp_path)]) == 0
        found[name] = json.loads((tmp_path / "result.json").read_text())["results"][0]["top1"]
        assert report["results"][name]["top1"] == found[name]
    before, after = (report["results"][name]["parameters"] for name in ("before", "after"))
    # Two layers lose two experts each, of 24 x 96 weights twice and biases, and two rows of the router.
    lost = 2 * 2 * (2 * 24 * 96 + 96 + 24 + 24)
    assert before["total"] - after["total"] == lost
    assert before["active"] - after["active"] == 2 * 2 * 24
    kept = [expert for group in report["layers"]["blocks.1.mlp"]["groups"] for expert in group]
    assert sorted(kept) == [0, 1, 2, 3] if "--merge" in options else len(kept) == 2


def test_the_experts_of_some_classes(save_run, tmp_path, capsys):
    guided = {"super_classes": {digit: f"group {int(digit) % 4}" for digit in "0123456789"}}
    run, out = save_run(moe=BY_IMAGE, loss=guided), tmp_path / "pruned"
    assert prune([str(run), "--keep-classes", "3, 5", "--keep", "2", "--out", str(out)]) == 0
    report = json.loads((out / "prune.json").read_text())
    assert report["classes"] == ["3", "5"]
    found, results = report["unchanged"], report["results"]
    assert found["images"] == results["before"]["images"] == results["after"]["images"] < 100
    assert f"{found['same_logits']} of {found['images']} test images" in capsys.readouterr().out
    assert found["largest_difference"] < 1e-4
    smaller = load_checkpoint(out)
    assert [layer.config.removed_experts for _, layer in moe_layers(smaller.model)] == [2, 2]
    assert predict([str(out), str(PHOTO)]) == 0
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    images = DataLoader(torch.zeros(2, 3, 16, 16), 2)
    (answers,) = trainer.predict(vmoe.Classifier.load_from_checkpoint(out), images)
    assert answers.shape == (2, 10)  # no super-class is left without its expert


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["1", "2"])
def test_every_tool_opens_it(save_run, tmp_path, keep):
    out = tmp_path / "pruned"
    assert prune([str(save_run(moe=MOE, data=FEW)), "--keep", keep, "--merge", "--out", str(out)]) == 0
    assert export([str(out), "--out", str(tmp_path / "again.safetensors")]) == 0
    assert export([str(out), "--format", "torch-export", "--out", str(tmp_path / "program.pt2")]) == 0
    assert heatmap([str(out), str(PHOTO), "--out", str(tmp_path / "maps")]) == 0
    assert predict([str(out), str(PHOTO)]) == 0
    assert explore([str(out), "--out", str(tmp_path / "explorer")]) == 0
    recipe = ["--data.name", "digits", "--data.subset.per_class", "4", "--data.batch_size", "20"]
    moe = ["--moe.layers", "[1,3]", "--moe.num_experts", keep, "--moe.top_k", keep]
    model = ["--model.kwargs", '{"patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3}']
    options = [*recipe, *moe, *model, "--optim.warmup_epochs", "0", "--trainer.epochs", "1"]
    assert train(["--output_dir", str(tmp_path / "run"), "--init_from", str(out), *options]) == 0


def test_fine_tuning_is_a_run_that_starts_from_it(save_run, tmp_path, capsys):
    run, out = save_run(moe=MOE, data=FEW, finetune={"unfreeze_epochs": 3}), tmp_path / "pruned"
    arguments = [str(run), "--keep", "2", "--out", str(out), "--finetune", "1"]
    assert prune([*arguments, "--", "--seed", "3", "--trainer.log_every", "1"]) == 0
    assert "fine-tuned" in capsys.readouterr().out
    report = json.loads((out / "prune.json").read_text())
    summary = json.loads((out / "finetune" / "summary.json").read_text())
    assert report["results"]["fine-tuned"]["top1"] == pytest.approx(summary["metrics"]["test/top1"])
    assert summary["seed"] == 3 and summary["command"].startswith("vmoe prune ")
    tuned = load_checkpoint(out / "finetune").config
    assert tuned["init_from"] == str(out / "model.safetensors") and tuned["moe"]["num_experts"] == 2


@pytest.mark.parametrize(
    ("moe", "options", "told"),
    [
        (MOE, ["--keep", "0"], "--keep: '0' must be a whole number >= 1"),
        (MOE, ["--keep", "4"], "--keep 4: RUN has 4 experts in blocks.1.mlp; keep 1 to 3"),
        (MOE, [], "--keep"),
        (MOE, ["--keep", "2", "--by", "magnitude"], "--by"),
        (MOE, ["--keep", "2", "--images", "0"], "--images"),
        (MOE, ["--keep", "2", "--", "--seed", "3"], "--seed: is for a fine-tuning"),
        (MOE, ["--keep", "2", "--finetune", "1", "--", "--optim.lrr", "1"], "--optim.lrr: no such option"),
        (MOE, ["--keep", "2", "--data", "cifar1"], "cifar1"),
        (None, ["--keep", "2"], "is a dense model"),
        (MOE | {"router": "soft", "capacity_factor": 1.0}, ["--keep", "2"], 'router="soft"'),
        (MOE | {"router": "hash"}, ["--keep", "2"], 'router="hash"'),
        (MOE, ["--keep-classes", "1,2"], '--keep-classes 1,2: RUN has route="patch"'),
        (BY_IMAGE, ["--keep-classes", "1, ten"], "--keep-classes: 'ten' is no class of the images"),
        (BY_IMAGE, ["--keep-classes", " ,"], "--keep-classes: names no class; the images have 0, 1, 2"),
        (BY_IMAGE, ["--keep-classes", "1", "--keep", "2", "--images", "1"], "no image of them is among the 1 of"),
        (BY_IMAGE, ["--keep-classes", "1", "--merge"], "--merge: changes what --keep-classes leaves as it is"),
        (BY_IMAGE | {"num_experts": 1}, ["--keep-classes", "1"], "has 1 expert in blocks.1.mlp; keep its only one"),
        (BY_IMAGE | {"num_experts": 2, "top_k": 2}, ["--keep-classes", "1,"], "their images use every expert"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(save_run, tmp_path, capsys, moe, options, told):
    run, out = save_run(moe=moe), tmp_path / "pruned"
    assert prune([str(run), "--out", str(out), *options]) == 2
    error = capsys.readouterr().err
    assert told.replace("RUN", str(run / "checkpoints" / "best.ckpt")) in error and error.count("\n") == 1
    assert not out.exists()


def test_what_is_there_is_not_overwritten(save_run, tmp_path, capsys):
    run = save_run(moe=MOE)
    for job, options in ((prune, ["--keep", "2"]), (distill, [])):
        assert job([str(run), "--out", str(tmp_path), *options]) == 2
        assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize("width", [0.5, pytest.param(1.0, marks=pytest.mark.slow)])
def test_a_student_starts_from_the_merged_experts(save_run, tmp_path, width):
    run, out = save_run(moe=MOE | {"expert_width": width}, data=FEW), tmp_path / "student"
    options = ["--", "--trainer.epochs", "1", "--optim.lr", "1e-12", "--optim.min_lr", "0"]
    assert distill([str(run), "--out", str(out), "--images", "20", *options]) == 0
    student = load_checkpoint(out)
    assert not moe_layers(student.model) and student.config["moe"] is None
    assert student.config["distill"]["teacher"] == str(run / "checkpoints" / "best.ckpt")
    start = load_checkpoint(out / "start.safetensors").model.state_dict()
    teacher = load_checkpoint(run).model.state_dict()
    assert all(value.allclose(start[name], atol=1e-6) for name, value in student.model.state_dict().items())
    unchanged = [name for name in start if ".mlp." not in name or name.startswith(("blocks.0.", "blocks.2."))]
    assert unchanged and all(teacher[name].equal(start[name]) for name in unchanged)
    assert evaluate([str(out), "--out", str(tmp_path)]) == 0


def test_a_student_of_a_recipe_of_its_own(save_run, tmp_path):
    recipe, out = tmp_path / "small.yaml", tmp_path / "student"
    recipe.write_text(
        "data: {name: digits, subset: {per_class: 4}, batch_size: 20, mean: [0.3, 0.3, 0.3], std: [0.4, 0.4, 0.4]}\n"
        "model: {name: vit_tiny_patch16_224, kwargs: {patch_size: 4, embed_dim: 12, depth: 1, num_heads: 3}}\n"
        "optim: {warmup_epochs: 0}\ntrainer: {epochs: 1}\n"
    )
    run = save_run(moe=MOE | {"router": "hash"})
    arguments = [str(run), "--config", str(recipe), "--out", str(out)]
    assert distill([*arguments, "--start", "recipe"]) == 0
    assert not (out / "start.safetensors").exists()
    assert load_checkpoint(out).model.embed_dim == 12


@pytest.mark.parametrize(
    ("moe", "options", "told"),
    [
        (None, [], "is a dense model, without experts; or start without merging: --start recipe"),
        (MOE | {"router": "hash"}, [], 'router="hash"'),
        (MOE | {"expert_width": 0.75}, [], "expert_width=0.75"),
        (MOE | {"shared_experts": 1}, [], "shared experts"),
        (MOE, ["--config", "nowhere"], "--config nowhere"),
        (MOE, ["--", "--distill.weight", "2"], "distill.weight=2"),
        (MOE, ["--", "--model.name", "vit_small_patch16_224"], "vit_small_patch16_224"),
        (MOE, ["--", "--data.name", "patchwork"], "its class_names is"),
        (MOE, ["--", "--model.kwargs", '{"patch_size": 4, "embed_dim": 24, "depth": 2}'], "--init_from"),
    ],
)
def test_a_students_mistakes_are_one_line_and_leave_nothing(save_run, tmp_path, capsys, moe, options, told):
    out = tmp_path / "student"
    assert distill([str(save_run(moe=moe)), "--out", str(out), "--images", "20", *options]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not out.exists()
