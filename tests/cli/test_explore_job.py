"""`vmoe explore`: a page, figures and numbers; one line for a mistake."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from vmoe.checkpoints import ENTRY
from vmoe.cli.explore import main
from vmoe.explain.explorer import read_images

MOE = {"num_experts": 4, "top_k": 2}
FEW = ["--sample", "8", "--probe-images", "30", "--cause-images", "30", "--capacity-factor", "0.5", "1"]
QUICK = [*FEW, "--replicates", "20"]
COUNTS_ALONE = ["--sample", "1", "--probe-images", "0", "--cause-images", "0", "--replicates", "20"]


def later(run, name, epochs, change=0.0):
    """A copy of the run's checkpoint as of another epoch."""
    content = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    content[ENTRY]["epochs_done"] = epochs
    for key, value in content["state_dict"].items():
        if "router" in key:
            value += change * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    torch.save(content, run / "checkpoints" / name)


def test_a_run_is_explored(save_run, tmp_path, capsys):
    run, out = save_run(moe=MOE), tmp_path / "out"
    (run / "metrics.csv").write_text(
        "epoch,step," + ",".join(f"moe/blocks.1.mlp/load/{e}" for e in range(4)) + "\n1,9,1,1,1,1\n2,18,2,1,0.5,0.5\n"
    )
    assert main([str(run), "--out", str(out), *QUICK]) == 0
    assert {path.name for path in out.iterdir()} == {"index.html", "figures", "data"}
    report = json.loads((out / "data" / "report.json").read_text())
    told = report["provenance"]
    assert told["data"] == "digits" and told["split"] == "test" and told["num_images"] > 300
    assert told["checkpoint"].endswith("run/checkpoints/best.ckpt") and told["command"].startswith("vmoe explore ")
    assert told["versions"]["torch"] == torch.__version__
    assert report["title"] == "What the experts of run do" and report["classes"] == list("0123456789")
    assert report["training"]["steps"] == [9, 18]
    assert report["training"]["layers"]["blocks.1.mlp"]["load"] == [[1, 1, 1, 1], [2, 1, 0.5, 0.5]]
    assert report["saturation"] is None
    images = read_images(out / "data" / "images.npz")
    assert images["pixels"].shape == (8, 16, 16, 3) and images["layers"][1]["gates"].shape == (8, 17, 4)
    assert images["layers"][0]["dispatch"] is None
    page = (out / "index.html").read_text()
    assert "blocks.3.mlp" in page or len(page) > 50_000
    figures = {path.stem for path in (out / "figures").iterdir()}
    assert figures == {
        *("load", "specialisation", "classes-0", "classes-1", "coactivation", "flows", "experts-per-image"),
        *("consistency", "ablation", "capacity", "training-load", "experts-0", "experts-1", "maps"),
    }
    for path in (out / "figures").iterdir():
        Image.open(path).verify()
    shown = capsys.readouterr().out
    assert report["findings"] and all(f"- {line}\n" in shown for line in report["findings"])


@pytest.mark.slow
def test_a_capacity_left_out_is_told_also_where_it_was_the_only_one(save_run, tmp_path, capsys):
    run = save_run(moe={**MOE, "capacity_rounding": "round", "capacity_multiple_of": 1})
    few = ["--sample", "1", "--probe-images", "0", "--cause-images", "4", "--replicates", "20"]
    assert main([str(run), "--out", str(tmp_path / "out"), *few, "--capacity-factor", "0.001"]) == 0
    assert "warning: --capacity-factor 0.001: left out" in capsys.readouterr().err


def test_soft_moe_has_no_capacity_to_try(save_run, tmp_path, capsys):
    run = save_run(moe={"num_experts": 4, "router": "soft"})
    assert main([str(run), "--out", str(tmp_path / "out"), "--capacity-factor", "0.5"]) == 2
    assert "--capacity-factor 0.5: must be inf with router=" in capsys.readouterr().err


def test_capacities_without_bound_and_without_places(save_run, tmp_path, capsys):
    rounded = {**MOE, "capacity_rounding": "round", "capacity_multiple_of": 1}
    run, out = save_run(moe=rounded), tmp_path / "out"
    few = ["--sample", "4", "--probe-images", "0", "--cause-images", "16", "--replicates", "20"]
    assert main([str(run), "--out", str(out), *few, "--capacity-factor", "inf", "0.001", "0.5"]) == 0
    assert "warning: --capacity-factor 0.001: left out, as it leaves experts no place" in capsys.readouterr().err
    found = json.loads((out / "data" / "report.json").read_text())["capacity"]
    assert [part["factor"] for part in found] == [None, None, 0.5, 0.5]
    assert [part["dropped"] > 0 for part in found] == [False, False, True, True]
    assert (out / "figures" / "capacity.png").exists()


@pytest.mark.slow
def test_the_same_call_gives_the_same_numbers(save_run, tmp_path):
    run = save_run(moe=MOE)
    reports = []
    for name in ("a", "b"):
        assert main([str(run), "--out", str(tmp_path / name), *QUICK]) == 0
        reports.append(json.loads((tmp_path / name / "data" / "report.json").read_text()))
        del reports[-1]["provenance"]["command"]
    assert reports[0] == reports[1]


def test_runs_beside_each_other_and_earlier_checkpoints(save_run, tmp_path):
    run, seed1, dense = save_run("run", moe=MOE), save_run("seed1", moe=MOE | {"num_experts": 3}), save_run("dense")
    later(run, "epoch0.ckpt", 0, change=0.5)
    out = tmp_path / "out"
    assert main([str(run), str(seed1), str(dense), "--out", str(out), *QUICK]) == 0
    report = json.loads((out / "data" / "report.json").read_text())
    assert [run["name"] for run in report["runs"]] == ["run", "seed1", "dense"]
    assert [run["is_dense"] for run in report["runs"]] == [False, False, True]
    assert [part["run"] for part in report["agreement"]] == ["seed1"]
    assert report["saturation"]["epochs"] == [0, 1]
    for values in report["saturation"]["layers"].values():
        assert values[0] < 0.95 and values[1] == 1


def test_runs_of_one_name_are_told_apart(save_run, tmp_path):
    run = save_run("a", moe=MOE)
    shutil.copytree(run, tmp_path / "b" / "a")
    assert main([str(run), str(tmp_path / "b" / "a"), "--out", str(tmp_path / "out"), *COUNTS_ALONE]) == 0
    names = [run["name"] for run in json.loads((tmp_path / "out/data/report.json").read_text())["runs"]]
    assert len(set(names)) == 2 and names[1] == "b/a"


@pytest.mark.slow
def test_patch_labels_of_another_set(save_run, tmp_path):
    run = save_run(
        moe=MOE, data={"name": "patchwork"}, class_names=("disc", "ring", "square", "cross", "plus", "triangle")
    )
    out = tmp_path / "out"
    assert main([str(run), "--out", str(out), *COUNTS_ALONE]) == 0
    report = json.loads((out / "data" / "report.json").read_text())
    assert len(report["patch_names"]) == 12 and report["capacity"] is None
    assert np.shape(report["layers"][0]["patch_label_log_ratio"]["matrix"]) == (4, 12)
    assert "patch label" in report["layers"][0]["specialisation"]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"photo {number}.png")
    return folder


def test_image_files_without_labels(save_run, photos, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--batch-size", "2", "--workers", "0", *QUICK]
    assert main([str(save_run(moe=MOE)), "--images", str(photos), "--out", str(out), *arguments]) == 0
    report = json.loads((out / "data" / "report.json").read_text())
    told = report["provenance"]
    assert (told["data"], told["split"], told["num_images"]) == (str(photos), None, 5)
    assert report["accuracy"] is None and "class" not in report["layers"][0]["specialisation"]
    images = read_images(out / "data" / "images.npz")
    assert sorted(images["name"]) == [f"photo {number}.png" for number in range(5)]
    for name, pixels in zip(images["name"], images["pixels"], strict=True):  # each name goes with its own picture
        with Image.open(photos / name) as image:
            whole = np.asarray(image).mean((0, 1))
        assert np.abs(pixels.mean((0, 1)) - whole).max() < 20
    figures = {path.stem for path in (out / "figures").iterdir()}
    assert {"maps", "load", "specialisation", "consistency"} <= figures
    assert not figures & {"classes-0", "ablation", "capacity"}
    assert "have no labels" in capsys.readouterr().out


def test_image_files_named_one_by_one(save_run, photos, tmp_path):
    run, out = str(save_run(moe=MOE)), tmp_path / "out"
    files = [str(photos / f"photo {number}.png") for number in (1, 3)]
    assert main([run, "--out", str(out), "--images", *files, *COUNTS_ALONE]) == 0
    told = json.loads((out / "data" / "report.json").read_text())["provenance"]
    assert (told["data"], told["num_images"]) == ("2 image files", 2)


def test_mistakes_are_one_line_that_names_them(save_run, tmp_path, capsys):
    run, dense = str(save_run(moe=MOE)), str(save_run("dense"))
    three = str(save_run("three", moe=MOE, class_names=("a", "b", "c")))
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"\x89PNG not really")
    out = ["--out", str(tmp_path / "out")]
    for arguments, named in (
        ([str(tmp_path / "missing"), *out], "missing"),
        ([dense, *out], "dense"),
        ([dense, run, *out], "dense"),
        ([run, run, *out], "twice"),
        ([run, three, *out], "3 classes"),
        ([three, *out], "10 classes, the checkpoint 3"),
        ([run], "--out"),
        ([run, *out, "--sample", "0"], "--sample 0: "),
        ([run, *out, "--replicates", "5"], "--replicates 5: "),
        ([run, *out, "--cause-images", "-1"], "--cause-images -1: "),
        ([run, *out, "--seed", "-1"], "--seed -1: "),
        ([run, *out, "--capacity-factor", "0"], "'0'"),
        ([run, *out, "--capacity-factor", "1", "2000"], "--capacity-factor 2000: must be > 0 and at most 1000"),
        ([run, *out, "--data", "digitz"], "--data digitz: "),
        ([run, *out, "--device", "cuda:77"], "--device cuda:77"),
        ([run, *out, "--split", "train"], "--split"),
        ([run, *out, "--images", str(tmp_path / "none")], "none"),
        ([run, *out, "--images", str(tmp_path / "run")], "no image file"),
        ([run, *out, "--images", str(damaged)], "damaged.png"),
        ([run, *out, "--images", str(damaged), "--data", "digits"], "--images"),
        ([run, *out, "--images", str(damaged), "--split", "val"], "--images"),
        ([run, *out, "--images", str(damaged), "--batch-size", "0"], "--batch-size 0: "),
        ([run, *out, "--workers", "-1"], "--workers -1: "),
    ):
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("vmoe explore: error: ") and error.count("\n") == 1, error
        assert named in error
    assert not (tmp_path / "out").exists()


def test_a_table_that_training_did_not_write_is_named(save_run, tmp_path, capsys):
    run = save_run(moe=MOE)
    (run / "metrics.csv").write_text("epoch,step,moe/blocks.1.mlp/load/0\n1,9,many\n")
    assert main([str(run), "--out", str(tmp_path / "out"), *QUICK]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "metrics.csv" in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("blocker", ["out", "out/data"])
def test_a_place_that_cannot_be_written_is_named(save_run, tmp_path, capsys, blocker):
    place = tmp_path / blocker
    place.parent.mkdir(exist_ok=True)
    place.write_text("in the way")
    assert main([str(save_run(moe=MOE)), "--out", str(tmp_path / "out"), *QUICK]) == 2
    assert "cannot be written" in capsys.readouterr().err
