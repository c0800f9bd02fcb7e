"""`vmoe tune`: Optuna proposes options, runs try them, validation decides."""

import csv
import itertools
from pathlib import Path

import numpy as np
import optuna
import pytest
import yaml
from matplotlib import pyplot
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

import vmoe
from vmoe.cli.tune import main
from vmoe.errors import UserError
from vmoe.training.tuning import JOURNAL, draw_search

TINY = {
    "data": {"name": "digits", "batch_size": 64, "subset": {"per_class": 8}},
    "model": {"name": "vit_tiny_patch16_224", "kwargs": {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 3}},
    "moe": {"num_experts": 2, "layers": [0]},
    "trainer": {"epochs": 1, "device": "cpu"},
}
# A quick `vmoe train`: the best rate is 0.01, and it fails with dropout
_QUICK_JOB = """
import json, math, pathlib, sys
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
if float(options.get("--model.kwargs.drop_rate", 0)):
    sys.exit("vmoe train: error: it became NaN")
folder = pathlib.Path(options["--output_dir"])
folder.mkdir(parents=True, exist_ok=True)
value = 1 - abs(math.log10(float(options["--optim.lr"])) + 2) / 10
(folder / "summary.json").write_text(json.dumps({"metrics": {"test/top1": 0.5, "val/top1": value}}))
"""
SEARCH = ["--search", "optim.lr=1e-4:1:log", "moe.num_experts=2,4"]


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> str:
    monkeypatch.setattr("vmoe.training.sweep._JOB", _QUICK_JOB)
    monkeypatch.setattr("vmoe.training.sweep._SECONDS_BETWEEN_LOOKS", 0.02)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    return str(tmp_path / "tiny.yaml")


def rows(out: Path) -> list[dict[str, str]]:
    with open(out / "trials.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_search_finds_and_goes_on(recipe, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [recipe, *SEARCH, "--out", str(out)]
    assert main([*arguments, "--trials", "3"]) == 0
    first = rows(out)
    assert [row["state"] for row in first] == ["complete"] * 3
    best = max(first, key=lambda row: float(row["val/top1"]))
    said = capsys.readouterr().out
    assert f"--optim.lr {best['optim.lr']}" in said.splitlines()[-2] and best["folder"] in said.splitlines()[-1]
    assert {path.name for path in out.glob("*.png")} == {"history.png", "options.png"}
    assert main([*arguments, "--trials", "5"]) == 0
    assert rows(out)[:3] == first and len(rows(out)) == 5 and (out / "importances.png").is_file()
    whole = tmp_path / "whole"  # at once: the proposals do not depend on a stop
    assert main([recipe, *SEARCH, "--out", str(whole), "--trials", "5"]) == 0
    assert rows(whole) == rows(out)
    other = [recipe, "--search", "optim.lr=1e-3:1:log", "--out", str(out)]
    assert main(other) == 2
    assert "holds a search over other ranges, options, metric or seed" in capsys.readouterr().err


def test_a_run_that_was_under_way_is_gone_on_with(recipe, tmp_path):
    search = {"optim.lr": {"low": 1e-4, "high": 1.0, "log": True}}
    vmoe.tune(recipe, search, tmp_path / "out", trials=2, log=lambda line: None)
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "out" / JOURNAL))
    )
    study = optuna.load_study(study_name="vmoe", storage=storage)
    lr = study.ask(vmoe.training.tuning.read_space(search)).params["optim.lr"]  # and the search is killed
    found = vmoe.tune(recipe, search, tmp_path / "out", trials=3, log=lambda line: None)
    assert [trial.state for trial in found.study.trials] == [TrialState.COMPLETE] * 3
    assert found.study.trials[2].params["optim.lr"] == lr
    assert (
        found.options == found.study.best_params
        and found.path == tmp_path / "out" / f"trial_00{found.study.best_trial.number}"
    )
    assert found.value == found.study.best_value


def test_runs_that_fail_count_as_trials(recipe, tmp_path, capsys):
    arguments = [recipe, "--search", "optim.lr=1e-3:1e-1", "model.kwargs.drop_rate=0,0.5", "--jobs", "2"]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--trials", "6"]) == 0
    states = {(row["model.kwargs.drop_rate"], row["state"]) for row in rows(tmp_path / "out")}
    assert states == {("0", "complete"), ("0.5", "fail")}
    assert "FAILED: vmoe train: error: it became NaN" in capsys.readouterr().out
    failing = [recipe, "--search", "model.kwargs.drop_rate=0.5,0.6", "--out", str(tmp_path / "no"), "--trials", "1"]
    assert main(failing) == 2
    assert "no run reached val/top1; the first one said: vmoe train: error: it became NaN" in capsys.readouterr().err


def test_a_search_may_be_a_file(recipe, tmp_path, capsys):
    file = tmp_path / "search.yaml"
    file.write_text(
        "config: tiny.yaml\nsearch:\n  optim.lr: {low: 1e-3, high: 1e-1, log: true}\n  moe.layers: [[0], []]\n"
    )
    assert main([str(file), "--out", str(tmp_path / "out"), "--trials", "1", "--", "--seed", "3"]) == 0
    (row,) = rows(tmp_path / "out")
    said = capsys.readouterr().out
    assert said.count(f"--moe.layers '{row['moe.layers']}'") == 2  # as a shell takes it
    assert row["moe.layers"] in ("[0]", "[]") and 1e-3 <= float(row["optim.lr"]) <= 1e-1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "--search: is missing"),
        (["--search", "optim.lrr=1:2"], "optim.lrr is no option; did you mean optim.lr?"),
        (["--search", "optim.lr=2:1"], "low must be below high"),
        (["--search", "optim.lr=0:1:log"], "low"),
        (["--search", "optim.lr=a:b"], "low='a': must be a number"),
        (["--search", "optim.lr=1:2:3"], "must be LOW:HIGH or LOW:HIGH:log, or A,B,C"),
        (["--search", "optim.lr"], "must be OPTION=RANGE"),
        (["--search", "optim.lr=1e-3"], "must be two values or more"),
        (["--search", "optim.lr=-1:1"], "optim.lr=-1"),
        (["--search", "optim.schedule=cosine,fast,constant"], "--optim.schedule fast: must be cosine or"),
        (["--search", "trainer.epochs=1:2", "--metric", "test/top1"], "--metric test/top1: must be of validation"),
        (["--search", "trainer.epochs=1:2", "--", "--data.sizes", "3"], "--data.sizes: no such option"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(recipe, tmp_path, capsys, arguments, line):
    assert main([recipe, "--out", str(tmp_path / "out"), *arguments]) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_whole_ends_of_an_option_that_takes_fractions(recipe, tmp_path):
    search = ["optim.weight_decay=0:1", "optim.warmup_epochs=0:2", "trainer.epochs=1:9", "optim.lr=0.01,0.1"]
    assert main([recipe, "--search", *search, "--out", str(tmp_path / "out"), "--trials", "2"]) == 0
    for row in rows(tmp_path / "out"):
        assert float(row["optim.weight_decay"]) % 1 and float(row["optim.warmup_epochs"]) % 1
        assert row["trainer.epochs"].isdecimal()


def test_python_s_mistakes(recipe, tmp_path):
    with pytest.raises(UserError, match=r"moe\.top_k"):
        vmoe.tune(recipe, {"moe.top_k": [1, 5]}, tmp_path / "out")
    with pytest.raises(UserError, match="must be low and high"):
        vmoe.tune(recipe, {"moe.top_k": 3}, tmp_path / "out")


def test_a_metric_that_runs_lack_ends_the_search_at_once(recipe, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([recipe, *SEARCH, "--out", str(out), "--metric", "val/top5", "--trials", "5"]) == 2
    said = capsys.readouterr().err
    assert "--metric val/top5: trial_000 has none; it has val/top1" in said and said.count("\n") == 1
    assert len(rows(out)) == 1

    other = tmp_path / "other"
    (other / "trials.csv").mkdir(parents=True)  # what cannot be written hides nothing
    assert main([recipe, *SEARCH, "--out", str(other), "--metric", "val/top5"]) == 2
    assert "--metric val/top5: trial_000 has none" in capsys.readouterr().err


def test_labels_of_a_range_within_a_magnitude_do_not_overlap(tmp_path, monkeypatch):
    space = {
        "moe.top_k": CategoricalDistribution([1, 2]),
        "optim.lr": FloatDistribution(1e-4, 1e-2, log=True),
    }
    study = optuna.create_study(direction="maximize")
    for rate in (6.8e-4, 7.4e-4, 1.3e-3):
        trial = optuna.trial.create_trial(params={"moe.top_k": 1, "optim.lr": rate}, distributions=space, value=rate)
        study.add_trial(trial)
    monkeypatch.setattr(pyplot, "close", lambda figure: None)  # to look at them
    draw_search(study, tmp_path, "val/top1")
    (axes,) = [
        axes for number in pyplot.get_fignums() for axes in pyplot.figure(number).axes if axes.get_xscale() == "log"
    ]
    monkeypatch.undo()
    left, right = axes.get_xlim()
    ticks = [*axes.xaxis.get_major_ticks(), *axes.xaxis.get_minor_ticks()]
    labels = [tick.label1 for tick in ticks if left <= tick.get_loc() <= right and tick.label1.get_text()]
    boxes = [label.get_window_extent() for label in sorted(labels, key=lambda label: label.get_position()[0])]
    pyplot.close("all")
    assert len(boxes) > 2 and not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))


def test_a_metric_that_no_run_can_have_is_refused_before_the_first(recipe, tmp_path, capsys):
    np.savez(
        tmp_path / "labels.npz",
        train_x=np.zeros((40, 16, 16, 3), np.uint8),
        train_y=np.eye(4, dtype=np.uint8)[np.arange(40) % 4],
        test_x=np.zeros((8, 16, 16, 3), np.uint8),
        test_y=np.eye(4, dtype=np.uint8)[np.arange(8) % 4],
    )
    arguments = [recipe, *SEARCH, "--out", str(tmp_path / "out")]
    npz = str(tmp_path / "labels.npz")
    several = "several classes each have none; give one of val/loss, val/mAP, val/f1"
    for options, line in (
        (["--metric", "val/mAP"], "--metric val/mAP: runs on images of one class each have none; give one of val/loss"),
        (["--", npz, "--data.subset.per_class", "null"], f"--metric val/top1: runs on images of {several}"),
        (["--", "--data.val_fraction", "0"], "--metric val/top1: the runs have no validation images"),
        (["--search", "data.val_fraction=0.1,0.2,0"], "--metric val/top1: the runs have no validation images"),
    ):
        assert main([*arguments, *options]) == 2
        assert line in capsys.readouterr().err
    with pytest.raises(UserError, match=r"metric=val/mAP: runs on images of one class each have none"):
        vmoe.tune(recipe, {"optim.lr": [1e-3, 1e-2]}, tmp_path / "out", metric="val/mAP")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_real_runs(recipe, tmp_path, monkeypatch):
    monkeypatch.undo()
    out = tmp_path / "out"
    assert main([recipe, "--search", "optim.lr=1e-4:1e-2:log", "--out", str(out), "--trials", "2", "--jobs", "2"]) == 0
    from vmoe.cli.compare import main as compare

    assert compare([*map(str, sorted(out.glob("trial_*"))), "--out", str(tmp_path / "compared")]) == 0
