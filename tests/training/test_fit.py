"""`vmoe.fit`: a run from Python is the run of the command line, and a mistake is one line."""

import dataclasses
import importlib.util
import json

import pytest
import torch

import vmoe
from vmoe.cli.train import main
from vmoe.cli.train_options import parse
from vmoe.data import DataConfig
from vmoe.errors import UserError
from vmoe.training.config import TrainConfig
from vmoe.training.fit import FinishedRun, _config

SMALL = {
    "data.batch_size": 40,
    "data.image_size": 8,
    "data.subset.per_class": 8,
    "model.kwargs": {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "trainer.device": "cpu",
}
ON_THE_LINE = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in SMALL.items()]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> FinishedRun:
    folder = tmp_path_factory.mktemp("fit") / "run"
    moe = vmoe.MoeConfig(num_experts=4)
    options = SMALL | {"trainer.max_epochs": 2}
    return vmoe.fit(data="digits", model="vit_tiny_patch16_224", moe=moe, output_dir=folder, options=options)


def test_a_run_knows_its_folder_its_metrics_and_its_model(run):
    assert (run.path / "summary.json").exists() and run.summary["epochs"] == 2
    assert run.metrics == run.summary["metrics"] and 0 <= run.metrics["test/top1"] <= 1
    assert len(run.history) == 2 and run.history[1]["val/top1"] >= 0
    assert len(run.model.class_names) == 10 and vmoe.moe_layers(run.model)
    assert run.model.config["optim"]["warmup_epochs"] == 0.5  # a quarter of the run, in place of five epochs


def test_it_is_the_run_of_the_command_line(run, tmp_path):
    options = ["--data.name=digits", "--moe.num_experts=4", "--trainer.epochs=2", "--optim.warmup_epochs=0.5"]
    assert main([*options, *ON_THE_LINE, "--output_dir", str(tmp_path)]) == 0
    weights = vmoe.load(tmp_path).state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in run.model.state_dict().items())


def test_it_is_quiet_when_asked_and_names_a_new_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(parse(["--config", "digits", *ON_THE_LINE, "--trainer.epochs", "1"]), output_dir=None)
    first = vmoe.fit(dataclasses.replace(config, moe=None), progress=False)  # a config alone
    assert capsys.readouterr().out == "" and str(first.path) == "runs/digits" and not vmoe.moe_layers(first.model)
    (tmp_path / "runs" / "digits-2").mkdir()
    (tmp_path / "own.yaml").write_text("data: {nam: digits}")
    with pytest.raises(UserError, match=r"own\.yaml: unknown key data\.nam; did you mean data\.name"):
        vmoe.fit("own.yaml")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({}, "data: is missing"),
        ({"config": "no_such_recipe"}, "no_such_recipe: cannot be read"),
        ({"data": "digits", "model": torch.nn.Linear(1, 1)}, "model: must be timm's name of a model, not a Linear"),
        ({"data": "digits", "options": {"optim.lrr": 1}}, "options: unknown key optim.lrr; did you mean optim.lr"),
        ({"data": "digits", "epochs": 0}, "trainer.epochs=0: must be"),
        (
            {"data": "digits", "epochs": 2, "options": {"trainer.max_epochs": 3}},
            "epochs=2: options ask for",
        ),
        ({"data": "digits", "moe": False, "options": {"moe.top_k": 1}}, "options: moe.top_k is for MoE layers"),
        ({"data": ["a"]}, "data=.*: must be the name of a set, a path or a DataConfig"),
        ({"options": {"data.name": "folder", "data.root": "lost"}}, "data.root=lost: .* does not exist"),
        ({"data": "digits", "options": {"data.root": "photos"}}, "data.root=photos: digits comes with vmoe"),
        ({"config": "cifar10_cpu", "data": "digits"}, "data=digits: the recipe cifar10_cpu is made for cifar10 at 32"),
        ({"data": "digits", "options": {"trainer": {"max_epoch": 3}}}, "options: unknown key trainer.max_epoch"),
        (
            {"data": "digits", "options": {"trainer.max_epochs": 3, "trainer.epochs": 4}},
            "trainer.max_epochs=3 and trainer.epochs=4 mean the same",
        ),
    ],
)
def test_mistakes_are_one_line(arguments, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=line) as error:
        vmoe.fit(**arguments)
    assert "\n" not in str(error.value)


def test_sections_and_dotted_names_are_taken_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    options = {"optim.lr": 0.5, "optim": {"name": "adamw"}, "trainer": {"max_epochs": 3}}
    config = _config("digits", {"data": DataConfig(name="folder", root=str(tmp_path / "photos" / ".."))}, options)
    assert (config.optim.lr, config.optim.name, config.trainer.epochs) == (0.5, "adamw", 3)
    assert config.optim.weight_decay == parse(["--config", "digits"]).optim.weight_decay  # the recipe's
    assert config.output_dir == "runs/digits"
    assert _config(None, {"data": tmp_path / "photos" / ".." / "photos"}, {}).output_dir == "runs/photos"


def test_lightning_s_own_names_mean_ours(tmp_path, capsys):
    path = tmp_path / "theirs.yaml"
    path.write_text("data: {name: digits}\ntrainer: {max_epochs: 3, accumulate_grad_batches: 2, precision: bf16-mixed}")
    config: TrainConfig = parse(["--config", str(path)])
    assert (config.trainer.epochs, config.trainer.accumulate, config.trainer.precision) == (3, 2, "bf16")
    assert parse(["--config", str(path), "--trainer.max_epochs", "7"]).trainer.epochs == 7
    assert main(["--config", str(path), "--trainer.max_epochs", "7", "--trainer.epochs", "8"]) == 2
    assert "--trainer.max_epochs 7 and --trainer.epochs 8 mean the same" in capsys.readouterr().err
    path.write_text("data: {name: digits}\ntrainer: {max_epochs: 3, epochs: 4}")
    assert main(["--config", str(path)]) == 2
    assert "theirs.yaml: trainer.max_epochs=3 and trainer.epochs=4 mean the same" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("[csv, comet]", "must be a list of csv, tensorboard, wandb, mlflow"),
        ("[{csv: {a: 1}}]", "without options of these two"),
        ("csv", "must be a list"),
    ],
)
def test_wrong_loggers_are_one_line(tmp_path, capsys, given, line):
    assert main(["--config", "digits", f"--trainer.loggers={given}", "--output_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "trainer.loggers" in error and line in error


def test_a_logger_that_is_not_installed_is_one_line_before_the_run(tmp_path, capsys):
    if importlib.util.find_spec("mlflow") is not None:
        pytest.skip("mlflow is installed")
    assert (
        main(["--config", "digits", "--trainer.loggers", "[csv, mlflow]", "--output_dir", str(tmp_path / "run")]) == 2
    )
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "mlflow" in error and "vmoe[loggers]" in error
    assert not (tmp_path / "run").exists()


def logged_run(folder, logger, **options) -> FinishedRun:
    options = SMALL | {"trainer.loggers": ["csv", logger], "trainer.log_every": 1} | options
    return vmoe.fit(data="digits", moe=vmoe.MoeConfig(num_experts=4), epochs=1, output_dir=folder, options=options)


def test_each_run_is_one_of_weights_and_biases_with_metrics_images_and_the_config(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    seen, logger = {}, {"wandb": {"mode": "offline"}}
    monkeypatch.setattr(WandbLogger, "log_metrics", lambda self, metrics, step=None: seen.update(metrics))
    run = logged_run(tmp_path / "first", logger)
    assert {
        "train/loss",
        "val/top1",
        "moe/blocks.1.mlp/load/0",
        "train_clean/top1",
        "routing/blocks.1.mlp",
    } <= seen.keys()
    assert seen["test/top1"] == pytest.approx(run.metrics["test/top1"]) and wandb.run is None
    assert not list(run.path.glob("events.*")) and (run.path / "metrics.csv").exists()
    logged_run(tmp_path / "second", logger)
    for name in ("first", "second"):
        assert len(list((tmp_path / name).glob("wandb/offline-run-*"))) == 1


def test_each_run_has_a_database_of_mlflow_in_its_folder(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("first", "second"):
        run = logged_run(tmp_path / name, "mlflow")
        client = MlflowClient(f"sqlite:///{tmp_path / name}/mlflow.db")
        (logged,) = client.search_runs([client.get_experiment_by_name("lightning_logs").experiment_id])
        assert logged.data.metrics["test/top1"] == pytest.approx(run.metrics["test/top1"])
        assert logged.data.params["moe.num_experts"] == "4" and logged.info.status == "FINISHED"
        assert client.list_artifacts(logged.info.run_id, "images")
    assert not (tmp_path / "mlruns").exists()


def test_a_logger_that_cannot_begin_is_one_line(tmp_path):
    pytest.importorskip("mlflow")
    with pytest.raises(UserError, match=r"trainer\.loggers: mlflow cannot begin with .*nothing://here"):
        logged_run(tmp_path, {"mlflow": {"tracking_uri": "nothing://here"}})
