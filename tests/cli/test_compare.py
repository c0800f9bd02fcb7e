"""`vmoe compare`: a table, its CSV and markdown, and the plots; one line for a mistake."""

import csv
import json
import shutil

import pytest
import yaml
from PIL import Image

from vmoe.cli.compare import main


@pytest.fixture
def save_summary(tmp_path):
    def save(name, top1, seed=0, moe=None, device="a CPU", fraction=None, model="vit", validated=True, metric="top1"):
        folder = tmp_path / name
        folder.mkdir()
        data = {"name": "digits", "subset": {"fraction": fraction}}
        config = {
            "seed": seed,
            "data": data,
            "model": {"name": model, "kwargs": {}},
            "moe": moe,
            "trainer": {"epochs": 1},
        }
        summary = {
            "metrics": {f"test/{metric}": top1, f"train_clean/{metric}": 0.995}
            | ({f"val/{metric}": 0.5} if validated else {}),
            "parameters": {"total": 3_000_000 if moe else 1_000_000, "active": 1_250_000},
            "flops_per_image": 2_500_000,
            "images_per_second": 123.4,
            "device": device,
            "seed": seed,
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "metrics.csv").write_text(f"epoch,val/{metric}\n0,0.5\n" if validated else "epoch\n0\n")
        return str(folder)

    return save


def test_runs_of_several_classes_per_image_are_compared_by_map(save_summary, tmp_path, capsys):
    arms = {"moe": ({"num_experts": 8}, (0.6, 0.64)), "dense": (None, (0.55, 0.58))}
    runs = [
        save_summary(f"{name}{seed}", value, seed, moe, metric="mAP", fraction=0.5)
        for name, (moe, values) in arms.items()
        for seed, value in enumerate(values)
    ]
    out = tmp_path / "out"
    assert main([*runs, "--against", "data.subset.fraction", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "+5.50 points of test mAP, 95 % interval" in shown and "(paired, n=2)" in shown and "top-1" not in shown
    with open(out / "comparison.csv", newline="") as file:
        moe = next(csv.DictReader(file))
    assert float(moe["test_mAP_mean"]) == pytest.approx(0.62) and float(moe["train_clean_mAP_mean"]) == 0.995
    assert "top-1" not in (out / "comparison.md").read_text()
    assert main([str(out / "comparison.json"), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "comparison.csv").read_bytes() == (out / "comparison.csv").read_bytes()
    capsys.readouterr()
    for more, line in (
        (["--gains"], "--gains: counts wrong answers, and moe0 has several classes"),
        ([save_summary("other", 0.9)], "has mAP and other has top-1; compare runs of one class per image"),
    ):
        assert main([*runs, *more, "--out", str(tmp_path / "none")]) == 2
        assert line in capsys.readouterr().err


def test_runs_are_put_side_by_side(save_summary, tmp_path, capsys):
    moe = {"num_experts": 8}
    runs = [save_summary("moe0", 0.97, 0, moe), save_summary("moe1", 0.99, 1, moe), save_summary("dense", 0.96)]
    out = tmp_path / "out"
    assert main([*runs, runs[0], "--out", str(out)]) == 0  # the same folder twice counts once
    shown = capsys.readouterr()
    assert "E=8 K=2 against dense: +1.00 points" in shown.out and "at equal compute" in shown.out
    assert shown.err == ""
    rows = list(csv.DictReader((out / "comparison.csv").read_text().splitlines()))
    assert [(row["name"], row["n"]) for row in rows] == [("E=8 K=2", "2"), ("dense", "1")]
    assert float(rows[0]["test_top1_mean"]) == pytest.approx(0.98)
    assert float(rows[0]["test_top1_sd"]) == pytest.approx(0.01414, abs=1e-4)
    assert rows[1]["test_top1_sd"] == ""
    markdown = (out / "comparison.md").read_text()
    assert "| E=8 K=2 | 2 | 98.00 ± 1.41 | 99.50 | +1.00 (n=1) | 2.5 M | 1.25 M | 3 M | 123 |" in markdown
    assert "- E=8 K=2 against dense" in markdown
    Image.open(out / "comparison.png").verify()
    report = json.loads((out / "comparison.json").read_text())
    assert [(run["run"], run["arm"], run["seed"]) for run in report["runs"]][:2] == [
        ("moe0", "E=8 K=2", 0),
        ("moe1", "E=8 K=2", 1),
    ]
    assert report["arms"][0]["test_top1_mean"] == pytest.approx(0.98) and len(report["notes"]) == 1
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"comparison.{kind}" for kind in ("csv", "json", "md", "png")),
        "runs.csv",
    ]


def test_runs_without_validation_are_compared_too(save_summary, tmp_path, capsys):
    runs = [save_summary("dense", 0.96, validated=False), save_summary("moe", 0.97, moe={"num_experts": 8})]
    assert main([*runs, "--out", str(tmp_path / "out")]) == 0
    assert main([str(tmp_path / "out" / "comparison.json"), "--out", str(tmp_path / "again")]) == 0
    assert capsys.readouterr().err == ""
    rows = csv.DictReader((tmp_path / "again" / "runs.csv").read_text().splitlines())
    assert [(row["run"], row["test_top1"], row["val_top1"]) for row in rows] == [
        ("dense", "0.96", ""),
        ("moe", "0.97", "0.5"),
    ]


def test_a_comparison_can_be_compared_again_beside_other_runs(save_summary, tmp_path, capsys):
    first, both = tmp_path / "first", tmp_path / "both"
    assert main([save_summary("dense", 0.96), "--out", str(first)]) == 0
    shutil.rmtree(tmp_path / "dense")
    sparse = save_summary("moe", 0.97, moe={"num_experts": 8})
    assert main([str(first / "comparison.json"), sparse, "--out", str(both)]) == 0
    report = json.loads((both / "comparison.json").read_text())
    assert [(run["run"], run["arm"]) for run in report["runs"]] == [("dense", "dense"), ("moe", "E=8 K=2")]
    assert report["arms"][1]["difference"] == pytest.approx(0.01)
    assert report["runs"][0]["curve"] == [[0.0, 0.5]]


ENDLESS = (
    '{"runs": [{"run": "a", "config": {}, "curve": [], '
    '"summary": {"metrics": {"test/top1": 1}, "parameters": {"total": Infinity}}}]}'
)


@pytest.mark.parametrize("content", ["{", "[]", '{"runs": []}', '{"runs": [{"run": "a"}]}', ENDLESS, None])
def test_a_file_that_is_no_comparison_is_refused(tmp_path, capsys, content):
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    assert main([str(path), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "other.json" in line and ("comparison.json" in line or "cannot be read" in line)
    assert not (tmp_path / "out").exists()


def test_gains_are_drawn_over_how_well_the_twin_fits(save_summary, tmp_path, capsys):
    runs, out = [save_summary("dense", 0.8), save_summary("moe", 0.83, moe={"num_experts": 8})], tmp_path / "out"
    assert main([*runs, "--gains", "--out", str(out)]) == 0
    (row,) = csv.DictReader((out / "gains.csv").read_text().splitlines())
    assert float(row["gain"]) == pytest.approx(0.03) and float(row["twin_train_top1"]) == 0.995
    Image.open(out / "gains.png").verify()
    assert main([runs[0], "--gains", "--out", str(tmp_path / "none")]) == 2
    assert "--gains: no V-MoE" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_gains_are_drawn_over_an_option(save_summary, tmp_path, capsys):
    moe = {"num_experts": 8}
    runs = [
        save_summary(f"{name}{part}_{seed}", top1 + part * gain + 0.001 * seed, seed, layers, fraction=part)
        for part in (0.5, 1.0)
        for seed in (0, 1)
        for name, top1, gain, layers in (("dense", 0.8, 0.1, None), ("moe", 0.8, 0.12, moe))
    ]
    out = tmp_path / "out"
    assert main([*runs, "--against", "data.subset.fraction", "--out", str(out)]) == 0
    rows = list(csv.DictReader((out / "against.csv").read_text().splitlines()))
    sparse = [row for row in rows if row["arm"] == "E=8 K=2"]
    assert [float(row["data.subset.fraction"]) for row in sparse] == [0.5, 1.0]
    assert [float(row["difference"]) for row in sparse] == pytest.approx([0.01, 0.02])
    assert [row["paired_seeds"] for row in sparse] == ["2", "2"]
    assert all(row["difference"] == "" for row in rows if row["arm"] == "dense")
    Image.open(out / "against.png").verify()


@pytest.mark.parametrize("option, reason", [("data.name", "no number there ('digits')"), ("data.nam", "(None)")])
def test_an_option_without_numbers_cannot_be_drawn_over(save_summary, tmp_path, capsys, option, reason):
    assert main([save_summary("a", 0.9), "--against", option, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--against {option}: a has" in line and reason in line


def test_runs_that_differ_in_more_than_the_option_are_told(save_summary, tmp_path, capsys):
    runs = [save_summary("a", 0.9, fraction=0.5), save_summary("b", 0.9, 1, fraction=0.5, model="wide")]
    assert main([*runs, "--against", "data.subset.fraction", "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a and b have the same layers and data.subset.fraction=0.5, but differ in more" in line


def test_arms_are_compared_with_a_named_baseline(save_summary, tmp_path, capsys):
    runs = [
        save_summary(f"{name}{seed}", top1 + 0.01 * seed, seed, moe)
        for seed in (0, 1)
        for name, top1, moe in (
            ("dense", 0.9, None),
            ("eight", 0.92, {"num_experts": 8}),
            ("four", 0.95, {"num_experts": 4}),
        )
    ]
    out = tmp_path / "out"
    assert main([*runs, "--baseline", "eight1", "--out", str(out)]) == 0
    arms = json.loads((out / "comparison.json").read_text())["arms"]
    assert [(arm["name"], arm["baseline"], arm["paired_seeds"]) for arm in arms] == [
        ("dense", "E=8 K=2", 2),
        ("E=8 K=2", None, None),
        ("E=4 K=2", "E=8 K=2", 2),
    ]
    assert arms[0]["difference"] == pytest.approx(-0.02)
    assert arms[0]["difference_low"] == arms[0]["difference_high"] == pytest.approx(-0.02)  # the same in both seeds
    assert "-2.00 [-2.00, -2.00]" in (out / "comparison.md").read_text()


def test_other_hardware_is_one_warning(save_summary, tmp_path, capsys):
    runs = [save_summary("here", 0.9), save_summary("there", 0.9, seed=1, device="a GPU")]
    assert main([*runs, "--out", str(tmp_path / "out")]) == 0
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and warning.count("\n") == 1
    assert "images/s cannot be compared" in warning


def test_mistakes_are_one_line_that_names_them(save_summary, tmp_path, capsys):
    run = save_summary("run", 0.9)
    (tmp_path / "empty").mkdir()
    for arguments, named in (
        ([run, str(tmp_path / "missing"), "--out", str(tmp_path / "out")], "missing"),
        ([run, str(tmp_path / "empty"), "--out", str(tmp_path / "out")], "empty: holds no config.yaml"),
        ([run], "--out"),
        ([run, "--baseline", "twin", "--out", str(tmp_path / "out")], "--baseline twin"),
        (["--out", str(tmp_path / "out")], "RUN"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("vmoe compare: error: ") and error.count("\n") == 1
        assert named in error
    assert not (tmp_path / "out").exists()


def test_arms_are_named_by_the_folders_of_a_sweep(save_summary, tmp_path, capsys):
    moe = {"num_experts": 8}
    runs = [
        save_summary(f"{name}_s{seed}", 0.9, seed, each) for name, each in (("a", moe), ("b", None)) for seed in (0, 1)
    ]
    assert main([*runs, "--by-folder", "--baseline", "b", "--out", str(tmp_path / "out")]) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "runs.csv").read_text().splitlines()))
    assert [(row["arm"], row["run"], row["seed"]) for row in rows] == [
        ("a", "a_s0", "0"),
        ("a", "a_s1", "1"),
        ("b", "b_s0", "0"),
        ("b", "b_s1", "1"),
    ]
    capsys.readouterr()
    for name, each, reason in (("a_s2", None, "differ in more"), ("c_s3", moe, "have the same recipe")):
        odd = save_summary(name, 0.9, int(name[-1]), each)
        assert main([*runs, odd, "--by-folder", "--out", str(tmp_path / "odd")]) == 2
        assert "--by-folder" in (error := capsys.readouterr().err) and reason in error
        assert not (tmp_path / "odd").exists()
