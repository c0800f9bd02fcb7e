"""`vmoe evaluate`: a table, evaluation.json and the confusion matrix; one line for a mistake."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import saved_runs

from vmoe.checkpoints import ENTRY, load_checkpoint
from vmoe.cli.evaluate import main
from vmoe.evaluation.ensemble import Ensemble

MOE = {"num_experts": 4, "top_k": 2}


def test_a_run_on_fractals_is_measured_on_its_own_test_set_and_on_another_set(save_run):
    data = {"name": "fractals", "images": 60, "fractals": {"classes": 10, "epoch_images": 80}}
    run = save_run(moe=MOE, data=data)
    for options, name, images in (([], "fractals", 20), (["--data", "digits"], "digits", 359)):
        assert main([str(run), *options]) == 0
        report = json.loads((run / "evaluation.json").read_text())
        assert report["data"]["name"] == name and report["results"][0]["images"] == images


def test_a_run_is_measured_on_its_own_test_set(save_run, capsys):
    run = save_run(moe=MOE)
    assert main([str(run)]) == 0
    report = json.loads((run / "evaluation.json").read_text())
    (result,) = report["results"]
    assert report["data"] == {"name": "digits", "root": "data", "split": "test"}
    assert result["images"] == sum(map(sum, result["confusion"])) > 300
    assert result["top1"] == pytest.approx(np.trace(result["confusion"]) / result["images"])
    assert result["dropped"] == 0 and result["capacity_factor"] is None
    assert [sum(layer["load"]) for layer in result["layers"].values()] == pytest.approx([4, 4], abs=1e-4)
    assert Image.open(run / "confusion.png").size[0] >= 760
    shown = capsys.readouterr().out
    assert Image.open(run / "precision_recall.png").size[0] >= 760
    assert f"{result['auroc']:.2%}" in shown and f"{result['average_precision']:.2%}" in shown
    assert f"{result['top1']:.2%}" in shown and "blocks.3.mlp" in shown and "top-5" in shown


def test_a_reader_that_leaves_loses_no_file(save_run, monkeypatch):
    run = save_run(moe=MOE)
    read, write = os.pipe()
    os.close(read)  # as `head` does
    with open(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        monkeypatch.setattr(sys, "stderr", pipe)
        assert main([str(run)]) == 0
        assert (run / "evaluation.json").exists() and (run / "confusion.png").exists()
        assert main([str(run), "--capacity", "1"]) == 2


def test_augmentation_that_only_training_knows_is_not_needed(save_run):
    steps = {"__class_fullname__": "Compose", "p": 1.0, "transforms": [{"__class_fullname__": "StepOfMine", "p": 1.0}]}
    augment = {"albumentations": {"__version__": "2.0.8", "transform": steps}}
    run = save_run(moe=MOE, data={"augment": augment})
    assert main([str(run)]) == 0 and (run / "evaluation.json").exists()


def test_capacity_factors_and_places_of_the_results(save_run, tmp_path):
    run, out, file = save_run(moe=MOE), tmp_path / "out", tmp_path / "numbers" / "a.json"
    arguments = ["--capacity-factor", "0.5", "inf", "--out", str(out), "--json", str(file), "--split", "val"]
    assert main([str(run), *arguments, "--batch-size", "50"]) == 0
    results = json.loads(file.read_text())["results"]
    assert [result["capacity_factor"] for result in results] == [0.5, None]
    assert results[0]["dropped"] > 0.2 > results[1]["dropped"] == 0
    assert {path.name for path in out.iterdir()} == {
        f"{kind}-{factor}.png" for kind in ("confusion", "precision_recall") for factor in ("0.5", "inf")
    }
    assert not (run / "evaluation.json").exists()


def test_experts_a_token_and_capacities_are_swept_together(save_run, tmp_path, capsys):
    run, out = save_run(moe=MOE), tmp_path / "out"
    assert main([str(run), "--top-k", "1", "4", "--capacity-factor", "1", "inf", "--out", str(out)]) == 0
    results = json.loads((out / "evaluation.json").read_text())["results"]
    assert [(part["top_k"], part["capacity_factor"]) for part in results] == [(1, 1), (1, None), (4, 1), (4, None)]
    assert {path.stem for path in out.glob("confusion*.png")} == {
        f"confusion-K{k}-{c}" for k in (1, 4) for c in (1, "inf")
    }


def test_frozen_features_are_probed(save_run, capsys):
    run = save_run(moe=MOE)
    arguments = ["--probe", "knn", "linear", "few-shot", "--shots", "5", "--shot-seeds", "3", "--batch-size", "256"]
    assert main([str(run), *arguments]) == 0
    probes = json.loads((run / "evaluation.json").read_text())["probes"]
    assert probes["features"] == 24 and probes["train_images"] > 1000 and probes["test_images"] > 300
    # Even untrained features tell digits apart, where the untrained classifier cannot.
    assert probes["knn"]["top1"] > 0.25 and probes["linear"]["top1"] > 0.6
    few = probes["few_shot"]
    assert (few["shots"], few["seeds"]) == (5, [0, 1, 2]) and len(few["top1_each"]) == 3
    assert few["top1_mean"] == pytest.approx(np.mean(few["top1_each"])) and few["top1_mean"] > 0.12
    assert few["top1_sd"] == pytest.approx(np.std(few["top1_each"], ddof=1))
    assert f"{probes['knn']['top1']:.2%}" in capsys.readouterr().out


def test_a_probe_in_another_set_has_a_validation_split_though_the_run_had_none(save_run, tmp_path, capsys):
    run, out = str(save_run(moe=MOE, data={"val_fraction": 0})), tmp_path / "out"
    arguments = [run, "--data", "npz", "--root", _colours(tmp_path), "--out", str(out)]
    assert main([*arguments, "--probe", "linear"]) == 0
    assert json.loads((out / "evaluation.json").read_text())["probes"]["train_images"] == 81  # of 90
    assert main([*arguments, "--probe", "knn", "--split", "val"]) == 2  # which its training may have been on
    assert "data.val_fraction=0" in capsys.readouterr().err


def _colours(folder: Path) -> str:
    """A file of images of three classes: red, green and blue."""
    generator = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 90), ("test", 30)):
        labels = np.arange(count) % 3
        images = generator.integers(0, 120, (count, 16, 16, 3), np.uint8)
        images[np.arange(count), ..., labels] += 100
        arrays |= {f"{split}_x": images, f"{split}_y": labels}
    np.savez(folder / "colours.npz", **arrays)
    return str(folder / "colours.npz")


def test_top_5_is_shown_only_where_there_are_more_classes(save_run, tmp_path, capsys):
    data = {"name": "npz", "root": _colours(tmp_path)}
    run = save_run(moe=MOE, data=data, class_names=("0", "1", "2"))
    assert main([str(run)]) == 0
    shown = capsys.readouterr().out
    assert "top-1" in shown and "top-5" not in shown and "top-3" not in shown


def test_features_of_a_set_with_other_classes_are_probed_alone(save_run, tmp_path, capsys):
    run, out = save_run(moe=MOE), tmp_path / "out"
    arguments = [str(run), "--data", "npz", "--root", _colours(tmp_path), "--out", str(out)]
    assert main([*arguments, "--probe", "knn", "few-shot"]) == 0
    report = json.loads((out / "evaluation.json").read_text())
    assert report["results"] == [] and [path.name for path in out.iterdir()] == ["evaluation.json"]
    assert report["probes"]["knn"]["top1"] > 0.8 and report["probes"]["few_shot"]["top1_mean"] > 0.8
    assert "the classifier knows other classes" in capsys.readouterr().out
    assert main([*arguments, "--probe", "knn", "--top-k", "1"]) == 2
    line = "--data: npz has 3 classes, the checkpoint 10; --top-k needs its own classes, leave it out"
    assert line in capsys.readouterr().err
    assert main(arguments) == 2
    assert "npz has 3 classes, the checkpoint 10, which does not know 0, 1, 2; give" in capsys.readouterr().err


def test_corrupted_images_are_measured(save_run, capsys):
    run = save_run("dense")
    arguments = ["--corruptions", "contrast", "gaussian_noise", "--severities", "5", "1", "--batch-size", "256"]
    assert main([str(run), *arguments]) == 0
    report = json.loads((run / "evaluation.json").read_text())["corruptions"]
    assert report["severities"] == [1, 5] and list(report["top1"]) == ["contrast", "gaussian_noise"]
    values = [value for of_name in report["top1"].values() for value in of_name.values()]
    assert len(values) == 4 and report["mean_top1"] == pytest.approx(np.mean(values))
    assert "gaussian_noise" in capsys.readouterr().out
    assert main([str(run), *arguments]) == 0
    assert json.loads((run / "evaluation.json").read_text())["corruptions"] == report


def test_another_set_is_prepared_for_the_model(save_run, tmp_path, capsys):
    arrays = {}
    for split, count in (("train", 40), ("test", 30)):
        arrays[f"{split}_x"] = np.random.default_rng(0).integers(0, 256, (count, 28, 28, 3), dtype=np.uint8)
        arrays[f"{split}_y"] = np.arange(count) % 10
    np.savez(tmp_path / "other.npz", **arrays)
    run = save_run("dense", data={"subset": {"classes": list("0123456789")}})
    assert main([str(run), "--data", "npz", "--root", str(tmp_path / "other.npz")]) == 0
    report = json.loads((run / "evaluation.json").read_text())
    assert report["results"][0]["images"] == 30
    assert report["results"][0]["dropped"] is None
    assert "dense" in capsys.readouterr().out


def test_mistakes_are_one_line_that_names_them(save_run, tmp_path, capsys):
    run = str(save_run(moe=MOE))
    dense = str(save_run("dense"))
    soft = str(save_run("soft", moe={"num_experts": 4, "router": "soft"}))
    three = str(save_run("three", moe=MOE, class_names=("a", "b", "c")))
    for arguments, named in (
        ([str(tmp_path / "missing")], "missing"),
        ([three], "10 classes, the checkpoint 3"),
        ([dense, "--capacity-factor", "1"], "--capacity-factor"),
        ([run, "--capacity-factor", "much"], "'much'"),
        ([run, "--capacity-factor", "nan"], "'nan'"),
        ([run, "--capacity-factor", "2000"], "error: --capacity-factor 2000: must be > 0 and at most 1000, or inf"),
        ([soft, "--capacity-factor", "0.5"], 'error: --capacity-factor 0.5: must be inf with router="soft"'),
        ([run, "--data", "digitz"], "error: --data digitz: must be one of"),
        ([run, "--data", "folder", "--root", str(tmp_path / "nowhere")], "nowhere"),
        ([run, "--batch-size", "0"], "--batch-size 0: must be from 1 to"),
        ([run, "--workers", "-1"], "--workers -1: must be from 0 to"),
        ([run, "--split", "train"], "--split"),
        ([run, "--top-k", "0"], "'0'"),
        ([run, "--top-k", "5"], "--top-k 5"),
        ([dense, "--top-k", "1"], "--top-k"),
        ([run, "--probe", "svm"], "--probe"),
        ([run, "--shots", "5"], "--shots"),
        ([run, "--probe", "linear", "--split", "val"], "--probe linear"),
        ([run, "--severities", "1"], "--severities"),
        ([run, "--corruptions", "frost"], "frost"),
        ([run, "--corruptions", "gausian_noise"], "'gaussian_noise'"),
        ([run, "--corruptions", "--severities", "6"], "--severities"),
        ([run, "--device", "cuda:77"], "--device cuda:77"),
        ([run, "--device", "meta"], "--device meta"),
    ):
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("vmoe evaluate: error: ") and error.count("\n") == 1, error
        assert named in error
    assert not list(tmp_path.rglob("evaluation.json"))


def test_more_shots_than_images_are_one_line(save_run, capsys):
    run = save_run(moe=MOE)
    assert main([str(run), "--probe", "few-shot", "--shots", "5000"]) == 2
    assert "error: --shots 5000: a class has only" in capsys.readouterr().err
    assert not (run / "evaluation.json").exists()


def test_a_capacity_that_leaves_no_place_is_one_line(save_run, capsys):
    run = str(save_run(moe=MOE | {"capacity_rounding": "round", "group": 1}))
    assert main([run, "--capacity-factor", "0.01"]) == 2
    error = capsys.readouterr().err.strip()  # behind the end of the progress bar
    assert error.startswith("vmoe evaluate: error: --capacity-factor 0.01: ") and "\n" not in error


def test_an_ensemble_answers_with_the_mean_of_probabilities(save_run, tmp_path, capsys):
    one, other = save_run("one", moe=MOE), save_run("other")
    models = [load_checkpoint(run).model for run in (one, other)]
    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        mean = torch.stack([model(images).softmax(-1) for model in models]).mean(0)
        torch.testing.assert_close(Ensemble(models)(images).exp(), mean)

    out = tmp_path / "out"
    assert main([str(one), "--ensemble-with", str(other), "--out", str(out)]) == 0
    report = json.loads((out / "evaluation.json").read_text())
    assert report["ensemble_with"] == [str(other)]
    assert list(report["results"][0]["layers"]) == ["members.0.blocks.1.mlp", "members.0.blocks.3.mlp"]
    assert not (one / "evaluation.json").exists()

    capsys.readouterr()
    for arguments, reason in (
        ([str(save_run("letters", class_names=tuple("abcdefghij")))], "has other class names than"),
        ([str(other), "--probe", "knn"], "an ensemble has no features"),
    ):
        assert main([str(one), "--ensemble-with", *arguments]) == 2
        assert reason in capsys.readouterr().err


def test_bit_depths_of_an_ensemble_matter_only_for_deep_files(save_run, tmp_path, capsys):
    one, deep = save_run("one"), save_run("deep")
    content = saved_runs.content()
    content[ENTRY]["bit_depth"] = 12
    torch.save(content, deep / "checkpoints" / "best.ckpt")
    words = ["--data", "folder", "--root", str(tmp_path / "images"), "--out", str(tmp_path / "out")]
    (tmp_path / "images" / "test" / "7").mkdir(parents=True)
    Image.new("L", (16, 16), 20).save(tmp_path / "images" / "test" / "7" / "1.png")
    for first, second in ((one, deep), (deep, one)):
        assert main([str(first), "--ensemble-with", str(second), *words]) == 0
    capsys.readouterr()
    Image.new("I;16", (16, 16), 3000).save(tmp_path / "images" / "test" / "7" / "2.png")
    assert main([str(one), "--ensemble-with", str(deep), *words]) == 2
    assert "reads these files of more than 8 bits by another bit depth than" in capsys.readouterr().err


def test_another_table_may_call_its_columns_otherwise(save_run, tmp_path, capsys):
    run = save_run(tmp_path / "run")
    for number in range(10):
        Image.new("L", (16, 16), 20 * number).save(tmp_path / f"{number}.png")
    table = tmp_path / "digits.csv"
    table.write_text("bild,art,split\n" + "".join(f"{number}.png,{number},test\n" for number in range(10)))
    named = ["--columns", "path=bild", "label=art", "--json", str(tmp_path / "x.json")]
    assert main([str(run), "--data", str(table), *named]) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "x.json").read_text())["results"][0]["images"] == 10
