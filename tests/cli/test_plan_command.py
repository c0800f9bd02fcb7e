"""`vmoe plan`, and what `parallel.strategy: auto` makes of a config."""

import csv
import dataclasses
import json

import pytest

from vmoe.bench.plan.choice import resolved, workload_of
from vmoe.bench.plan.layouts import MeshLayout, StepMemory
from vmoe.bench.plan.planner import LayoutPlan, Times
from vmoe.bench.plan.report import draw_plans
from vmoe.cli.plan import main
from vmoe.cli.train_options import parse
from vmoe.data import DataConfig
from vmoe.data.datasets import load_splits
from vmoe.errors import UserError
from vmoe.training.config import TrainConfig
from vmoe.training.parallel.process import Process

DIGITS = ["--config", "configs/digits.yaml"]
SMALL = ["--model.kwargs", "{patch_size: 4, embed_dim: 48, depth: 2, num_heads: 3}"]


def test_plans_in_a_table_a_file_and_a_picture(tmp_path, capsys):
    assert main([*DIGITS, *SMALL, "--gpus", "4", "--data.batch_size", "64", "--curves", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "plan.json").read_text())
    assert [row["layout"] for row in written["rows"]] and written["machine"]["name"] == "h100-80g"
    assert all(row["missing"] is None for row in written["rows"])
    for row in written["rows"]:
        assert row["compute"] + row["memory"] + row["network"] + row["host"] == pytest.approx(1)
    assert "step ms" in capsys.readouterr().out
    for name in ("plan.png", "plan_curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("scale", [1, 10_000])
def test_bars_of_memory_are_seen_for_small_models_too(scale):
    memory = StepMemory(*(scale * size * 2**20 for size in (3, 3, 6, 0, 5, 1)))
    plan = LayoutPlan(MeshLayout("none", 1), memory, Times(1e-3, 1e-3, 0, 0), 0, None)
    axes = draw_plans([plan], 70 * 2**30, "a plan").axes[0]
    reach = max(bar.get_x() + bar.get_width() for bar in axes.patches)
    assert reach > 0.5 * axes.get_xlim()[1]
    assert axes.get_xlabel() == ("MiB" if scale == 1 else "GiB")
    assert [text.get_text() for text in axes.texts] == ([] if scale == 1 else [" usable"])
    assert ("usable: 70.0 GiB" in axes.get_title("left")) == (scale == 1)


def test_an_embedded_set_is_planned_with_its_own_classes():
    data = DataConfig(name="digits")
    assert workload_of(TrainConfig(data=data)).classes == len(load_splits(data).class_names)


def test_batches_that_cannot_be_shared_are_told(tmp_path, capsys):
    assert main([*DIGITS, "--gpus", "3", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "must be a multiple of" in shown and "no layout is feasible" in shown


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--gpu", "h1000"], "--gpu h1000"),
        (["--network", "pigeon"], "--network pigeon"),
        (["--gpus", "0"], "--gpus"),
        (["--data.batch_sizes", "8"], "--data.batch_sizes"),
    ],
)
def test_mistakes_are_one_line(arguments, named, tmp_path, capsys):
    assert main([*DIGITS, "--out", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_measured_beside_predicted(tmp_path):
    cases = ["--models", "test_vit", "--experts", "4", "--images", "2", "--image-size", "32"]
    assert main(["--measure", "--device", "cpu", *cases, "--out", str(tmp_path)]) == 0
    with open(tmp_path / "measured.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["experts"] for row in rows] == ["4"]
    assert all(float(row["measured_ms"]) > 0 and float(row["predicted_gib"]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("options", "layout"),
    [([], MeshLayout("expert", 2, 2, "whole")), (["--moe", "null"], MeshLayout("ddp", 2))],
)
def test_auto_is_none_in_one_process_and_says_why_in_several(options, layout):
    config = parse([*DIGITS, *options, "--parallel.strategy", "auto", "--trainer.device", "cpu"])
    assert resolved(config, Process())[0].parallel.strategy == "none"
    chosen, why = resolved(config, Process(0, 2, 0, 2))
    taken = dict(strategy=layout.strategy, expert_size=layout.expert_size, dense=layout.dense)
    assert chosen.parallel == dataclasses.replace(config.parallel, **taken)
    assert why.count("\n") == 0 and f"auto: {layout}, by prediction" in why


def test_auto_chooses_the_dense_part_itself(tmp_path, capsys):
    arguments = ["--parallel.strategy", "auto", "--parallel.dense", "whole", "--out", str(tmp_path)]
    assert main([*DIGITS, *arguments]) == 2
    error = capsys.readouterr().err
    assert "parallel.dense='whole': must be shard with parallel.strategy=auto" in error and error.count("\n") == 1


def test_auto_without_a_feasible_layout():
    config = parse([*DIGITS, *SMALL, "--parallel.strategy", "auto", "--trainer.device", "cpu"])
    with pytest.raises(UserError, match=r"parallel\.strategy=auto.*must be a multiple of"):
        resolved(config, Process(0, 3, 0, 3))
