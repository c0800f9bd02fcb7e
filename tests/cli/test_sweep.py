"""`vmoe sweep`: a study's arms and seeds, each trained in a process of its own."""

import copy
import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from vmoe.cli.main import main as vmoe_main
from vmoe.cli.sweep import main
from vmoe.config_values import from_plain
from vmoe.training.config import TrainConfig
from vmoe.training.sweep import read_study

STUDIES = sorted((Path(__file__).parents[2] / "configs" / "studies").glob("*.yaml"))
TINY = {
    "data": {"name": "digits", "batch_size": 64, "subset": {"per_class": 8}},
    "model": {"name": "vit_tiny_patch16_224", "kwargs": {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}},
    "moe": {"num_experts": 2},
    "trainer": {"epochs": 1, "device": "cpu"},
}


@pytest.fixture
def study(tmp_path) -> Path:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    path = tmp_path / "study.yaml"
    path.write_text("config: tiny.yaml\nseeds: [0, 1]\narms:\n  dense: {moe: null}\n  k1: {moe.top_k: 1}\n")
    return path


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_holds_valid_recipes(path, tmp_path):
    study = yaml.safe_load(path.read_text())
    base = yaml.safe_load((path.parent / study["config"]).read_text())
    configs = {}
    for arm, options in study["arms"].items():
        plain = copy.deepcopy(base)
        for name, value in options.items():
            *sections, last = name.split(".")
            functools.reduce(lambda inner, section: inner.setdefault(section, {}), sections, plain)[last] = value
        configs[arm] = repr(from_plain(TrainConfig, plain))
    assert len(set(configs.values())) == len(configs)  # no arm is another's copy
    assert len(read_study(path, tmp_path)) == len(configs) * len(study["seeds"])
    assert f"vmoe sweep configs/studies/{path.name}" in path.read_text().partition("config:")[0]


def test_the_list_holds_the_command_of_each_run(study, tmp_path, capsys):
    out = tmp_path / "runs"
    assert vmoe_main(["sweep", str(study), "--out", str(out), "--seeds", "4", "--list", "--", "--optim.lr", "0.1"]) == 0
    config = tmp_path / "tiny.yaml"
    assert capsys.readouterr().out.splitlines() == [
        f"vmoe train --config {config} --moe null --seed 4 --optim.lr 0.1 --output_dir {out}/dense_s4",
        f"vmoe train --config {config} --moe.top_k 1 --seed 4 --optim.lr 0.1 --output_dir {out}/k1_s4",
    ]
    assert not out.exists()


def test_names_in_a_study_are_taken_as_they_are_written(study, tmp_path, capsys):
    arms = (
        "  no: {data.subset.classes: [00014, yes], moe: null}\n  010:\n    data.root: 1e3\n    moe.layers:\n    - 1\n"
    )
    study.write_text(f"config: tiny.yaml\nseeds: [0]\narms:\n{arms}  bare:\n")
    assert vmoe_main(["sweep", str(study), "--out", "o", "--list"]) == 0
    start = f"vmoe train --config {tmp_path / 'tiny.yaml'}"
    assert capsys.readouterr().out.splitlines() == [
        f"{start} --data.subset.classes '[00014, yes]' --moe null --seed 0 --output_dir o/no_s0",
        f"{start} --data.root 1e3 --moe.layers '[1]' --seed 0 --output_dir o/010_s0",
        f"{start} --seed 0 --output_dir o/bare_s0",
    ]


# A quick `vmoe train`: refuses a batch of 0 images, else leaves a summary
_QUICK_JOB = """
import json, pathlib, sys
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
if options.get("--data.batch_size") == "0":
    sys.exit("vmoe train: error: data.batch_size=0: must be at least 1")
folder = pathlib.Path(options["--output_dir"])
folder.mkdir(parents=True)
(folder / "summary.json").write_text(json.dumps({"metrics": {"test/top1": 0.5}, "top_k": options["--moe.top_k"]}))
print("test top-1 50.0 %")
"""


def test_runs_are_trained_passed_over_and_named_when_they_fail(study, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("vmoe.training.sweep._JOB", _QUICK_JOB)
    monkeypatch.setattr("vmoe.cli.progress.EVERY", 0.01)
    study.write_text(study.read_text() + "  wrong: {data.batch_size: 0}\n")
    out = tmp_path / "runs"
    command = [str(study), "--out", str(out), "--jobs", "2", "--seeds", "0", "--arms", "k1"]
    assert main([*command, "wrong"]) == 1
    assert [path.parent.name for path in out.glob("*/summary.json")] == ["k1_s0"]
    assert json.loads((out / "k1_s0" / "summary.json").read_text())["top_k"] == "1"
    told, progress = capfd.readouterr()
    assert "2 runs, 0 of them done" in told and "k1_s0: test top-1 " in told
    assert "0 of 2 done, " in progress
    assert "wrong_s0: FAILED with exit code 1: vmoe train: error: " in told and "batch_size=0" in told

    before = (out / "k1_s0" / "summary.json").stat().st_mtime_ns
    assert main([*command, "wrong"]) == 1
    told = capfd.readouterr().out
    assert "2 runs, 1 of them done" in told and "wrong_s0: FAILED" in told and "k1_s0: " not in told
    assert (out / "k1_s0" / "summary.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_stopped_sweep_saves_its_runs_and_goes_on(study, tmp_path):
    out = tmp_path / "runs"
    arguments = [str(study), "--out", str(out), "--arms", "k1", "--seeds", "0", "--", "--trainer.epochs", "40"]
    job = "import sys; from vmoe.cli.sweep import main; sys.exit(main())"
    sweep = subprocess.Popen([sys.executable, "-c", job, *arguments])
    while not (out / "k1_s0" / "checkpoints" / "last.ckpt").exists() and sweep.poll() is None:
        time.sleep(0.1)
    sweep.send_signal(signal.SIGTERM)
    assert sweep.wait() == 130
    assert not (out / "k1_s0" / "summary.json").exists()
    assert "the run is saved" in (out / "logs" / "k1_s0.log").read_text()
    assert main(arguments) == 0
    assert (out / "k1_s0" / "summary.json").exists()


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        ("config: no.yaml\nseeds: [0]\narms: {a: {}}", [], "no.yaml is not there"),
        ("seeds: [0]\narms: {a: {}}", [], "must hold config, seeds and arms"),
        ("config: tiny.yaml\nseeds: 3\narms: {a: {}}", [], "seeds: must be a list"),
        ("config: tiny.yaml\nseeds: [0]\narms: [a]", [], "arms: must be names"),
        ("config: tiny.yaml\nseeds: [0]\narms: {a: {}}", ["--arms", "b"], "--arms b"),
        ("config: tiny.yaml\nseeds: [0]\narms: {a: {}}", ["--arms", "a", "a"], "--arms: a is given twice"),
        ("config: tiny.yaml\nseeds: [0]\narms: {a: {}}", ["--seeds", "4", "04"], "--seeds: 4 is given twice"),
        ("config: tiny.yaml\nseeds: [0, 3, 3]\narms: {a: {}}", [], "study.yaml: seeds: 3 is given twice"),
        ("config: tiny.yaml\nseeds: [0]\narms: {a: {}}", ["--jobs", "0"], "--jobs: '0' must be"),
        ("{", [], "no readable YAML"),
    ],
)
def test_mistakes_are_one_line(text, options, reason, study, tmp_path, capsys):
    study.write_text(text)
    assert main([str(study), "--out", str(tmp_path / "runs"), *options]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_hold_runs_is_named(study, capsys):
    assert main([str(study), "--out", str(study / "runs")]) == 2
    error = capsys.readouterr().err
    assert "--out" in error and "cannot be written" in error and error.count("\n") == 1
