"""`vmoe calibrate`, and the sets that `vmoe predict --coverage` gives by it."""

import csv
import json

import numpy as np
from PIL import Image

import vmoe
from vmoe.cli.calibrate import main
from vmoe.cli.predict import main as predict


def test_a_calibrated_file_gives_sets(save_run, tmp_path, capsys):
    run, out, report = save_run(), tmp_path / "calibrated.safetensors", tmp_path / "report.json"
    assert main([str(run), "--out", str(out), "--json", str(report)]) == 0
    told = capsys.readouterr().out
    assert "temperature " in told and "sets for a coverage of 90% hold the right class" in told
    assert [each["coverage"] for each in json.loads(report.read_text())["sets"]] == [0.8, 0.9, 0.95]
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    files = ["--json", str(tmp_path / "a.json"), "--csv", str(tmp_path / "a.csv")]
    assert predict([str(out), str(tmp_path / "a.png"), "--coverage", "0.9", "--top", "2", *files]) == 0
    (answer,) = json.loads((tmp_path / "a.json").read_text())["images"]
    assert answer["set"][0] == answer["predictions"][0]["class"]
    assert f"a.png: {' or '.join(answer['set'])} (" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert len(rows) == 2 and {row["set"] for row in rows} == {"; ".join(answer["set"])}


def test_a_fit_that_ends_at_a_bound_or_is_by_few_images_says_so(save_run, tmp_path, capsys):
    run, out = save_run(), tmp_path / "calibrated.safetensors"
    images = np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3), dtype=np.uint8)
    right = vmoe.load(run).predict(images[:4], progress=False).probabilities.argmax(1)
    arrays = {f"{split}_x": images for split in ("train", "test")} | {"val_x": images[:4], "val_y": right}
    arrays |= {"train_y": np.arange(10), "test_y": np.arange(10), "class_names": np.array(list("0123456789"))}
    np.savez(tmp_path / "few.npz", **arrays)
    report = tmp_path / "report.json"
    assert main([str(run), "--out", str(out), "--data", str(tmp_path / "few.npz"), "--json", str(report)]) == 0
    assert "2 images for validation ends at the smallest temperature" in capsys.readouterr().err
    assert json.loads(report.read_text())["at_bound"]
    arrays |= {
        "val_x": np.concatenate([images[:4]] * 10),
        "val_y": np.concatenate([right] * 3 + [right + 1 + k for k in range(7)]) % 10,
    }
    np.savez(tmp_path / "few.npz", **arrays)
    assert main([str(run), "--out", str(out), "--data", str(tmp_path / "few.npz"), "--json", str(report)]) == 0
    assert "warning: 20 images for validation are few to fit a temperature" in capsys.readouterr().err
    assert main([str(run), "--out", str(out), "--json", str(report)]) == 0
    assert not capsys.readouterr().err and not json.loads(report.read_text())["at_bound"]


def test_an_ensemble_is_refused_before_it_is_run(save_run, tmp_path, capsys):
    run, out = save_run("e3", moe={"num_experts": 4, "top_k": 1, "ensemble": 2}), tmp_path / "calibrated.safetensors"
    assert main([str(run), "--out", str(out)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith(
        "a temperature divides the logits of one member (the model has moe.ensemble=2); take a single model"
    )
    assert not out.exists()
