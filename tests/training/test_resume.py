"""A run that is stopped and resumed is, bit for bit on the CPU, the run that never stopped."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from vmoe.checkpoints import ENTRY, RunFolder
from vmoe.cli.evaluate import main as evaluate
from vmoe.cli.train import main
from vmoe.cli.train_options import parse
from vmoe.training.classifier import Classifier
from vmoe.training.optim.schedule import LearningRates

# Everything random, or with a state, is on: router noise, dropout, drop path, augmentation, order, Muon, EMA.
# 3 epochs of 5 batches, 3 updates each.
RECIPE = """
data: {name: digits, batch_size: 40, subset: {per_class: 20}, augment: {preset: strong}}
model:
  name: vit_tiny_patch16_224
  kwargs: {patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2, drop_path_rate: 0.2, proj_drop_rate: 0.1}
moe: {num_experts: 4, expert_dropout: 0.1}
optim: {name: muon, adamw_lr: 5.0e-4, warmup_epochs: 1}
trainer: {epochs: 3, accumulate: 2, device: cpu, log_every: 1, ema_decay: 0.9}
"""
BATCHES = 5
ON_DEVICE = ["--data.pipeline", "device", "--data.mix.mixup_alpha", "0.8", "--data.mix.cutmix_alpha", "1"]
ON_DEVICE += ["--data.mix.until", "0.7", "--data.augment.randaugment_magnitude", "[0, 30]"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def unbroken(recipe, tmp_path_factory) -> RunFolder:
    folder = tmp_path_factory.mktemp("unbroken")
    assert main(["--config", str(recipe), "--output_dir", str(folder)]) == 0
    return RunFolder(folder)


def _rows(folder: RunFolder) -> list[dict[str, str]]:
    """metrics.csv without the one column that tells of time."""
    with open(folder.metrics, newline="") as file:
        return [
            {key: value for key, value in row.items() if key != "train/images_per_second"}
            for row in csv.DictReader(file)
        ]


def _assert_same(resumed: RunFolder, unbroken: RunFolder) -> None:
    assert _rows(resumed) == _rows(unbroken)
    for name in ("last", "best"):
        ours, theirs = (torch.load(getattr(f, name), weights_only=True) for f in (resumed, unbroken))
        assert ours["global_step"] == theirs["global_step"]
        assert ours["state_dict"].keys() == theirs["state_dict"].keys()
        for key, value in theirs["state_dict"].items():
            assert torch.equal(ours["state_dict"][key], value), (name, key)
        averages, expected = ours[ENTRY]["ema"], theirs[ENTRY]["ema"]
        assert averages["updates"] == expected["updates"] > 0
        assert all(torch.equal(averages["weights"][key], value) for key, value in expected["weights"].items())


def _stop_at(monkeypatch, batch: int) -> None:
    """SIGTERM arrives in the middle of this batch's step, counted from the start of this process."""
    step = Classifier.training_step
    seen = []

    def step_and_signal(self, *args):
        seen.append(None)
        if len(seen) == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    monkeypatch.setattr(Classifier, "training_step", step_and_signal)


# The end of an epoch, and the middle of one and of an update; the others are more of these.
@pytest.mark.parametrize(
    "batch",
    [5, 7, *(pytest.param(batch, marks=pytest.mark.slow) for batch in (1, 4, 14, 15))],
    ids=lambda batch: f"batch{batch}",
)
def test_stopped_and_resumed_equals_never_stopped(recipe, unbroken, tmp_path, monkeypatch, capsys, batch):
    arguments = ["--config", str(recipe), "--output_dir", str(tmp_path)]
    with monkeypatch.context() as patch:
        _stop_at(patch, batch)
        is_over = batch == 3 * BATCHES  # nothing is left to stop
        assert main(arguments) == (0 if is_over else 128 + signal.SIGTERM)
    if not is_over:
        assert "--resume" in capsys.readouterr().err
        torch.manual_seed(123)  # whatever the new process did before must not matter
        assert main(["--config", str(tmp_path / "config.yaml"), "--resume"]) == 0
    _assert_same(RunFolder(tmp_path), unbroken)


@pytest.mark.slow
def test_a_run_without_validation_resumes_too(recipe, tmp_path, monkeypatch):
    unbroken, resumed = RunFolder(tmp_path / "unbroken"), RunFolder(tmp_path / "resumed")
    arguments = ["--config", str(recipe), "--data.val_fraction", "0", "--trainer.epochs", "2", "--output_dir"]
    assert main([*arguments, str(unbroken.path)]) == 0
    with monkeypatch.context() as patch:
        _stop_at(patch, 7)
        assert main([*arguments, str(resumed.path)]) == 128 + signal.SIGTERM
    torch.manual_seed(123)
    assert main(["--config", str(resumed.config), "--resume"]) == 0
    _assert_same(resumed, unbroken)


def test_adapters_resume_and_every_tool_opens_them(recipe, tmp_path, monkeypatch):
    unbroken, resumed = RunFolder(tmp_path / "unbroken"), RunFolder(tmp_path / "resumed")
    options = [
        "--config",
        str(recipe),
        "--finetune.lora.rank",
        "2",
        "--optim.name",
        "adamw",
        "--optim.adamw_lr",
        "null",
    ]
    assert main([*options, "--output_dir", str(unbroken.path)]) == 0
    with monkeypatch.context() as patch:
        _stop_at(patch, 7)
        assert main([*options, "--output_dir", str(resumed.path)]) == 128 + signal.SIGTERM
    torch.manual_seed(123)
    assert main(["--config", str(resumed.config), "--resume"]) == 0
    _assert_same(resumed, unbroken)
    arguments = [str(unbroken.path), "--device", "cpu", "--json", str(tmp_path / "r.json"), "--out", str(tmp_path)]
    assert evaluate(arguments) == 0
    found = json.loads((tmp_path / "r.json").read_text())["results"][0]["top1"]
    assert found == pytest.approx(json.loads(unbroken.summary.read_text())["metrics"]["test/top1"])


def test_unfreezing_resumes(recipe, tmp_path, monkeypatch):
    unbroken, resumed = RunFolder(tmp_path / "unbroken"), RunFolder(tmp_path / "resumed")
    options = ["--config", str(recipe), "--finetune.unfreeze_epochs", "1", "--trainer.epochs", "2", "--output_dir"]
    assert main([*options, str(unbroken.path)]) == 0
    with monkeypatch.context() as patch:
        _stop_at(patch, 7)
        assert main([*options, str(resumed.path)]) == 128 + signal.SIGTERM
    assert main(["--config", str(resumed.config), "--resume"]) == 0
    _assert_same(resumed, unbroken)


def test_a_plateau_resumes_with_its_falls(recipe, tmp_path, monkeypatch):
    """With a rate that is too high for val/loss to fall."""
    unbroken, resumed = RunFolder(tmp_path / "unbroken"), RunFolder(tmp_path / "resumed")
    options = ["--optim.name", "timm:lion", "--optim.adamw_lr", "null", "--optim.lr", "0.1", "--optim.schedule"]
    options += ["plateau", "--optim.patience_epochs", "1", "--optim.warmup_epochs", "0", "--config", str(recipe)]
    options = options[-2:] + options[:-2]
    assert main([*options, "--output_dir", str(unbroken.path)]) == 0
    with monkeypatch.context() as patch:
        _stop_at(patch, 13)
        assert main([*options, "--output_dir", str(resumed.path)]) == 128 + signal.SIGTERM
    assert main(["--config", str(resumed.config), "--resume"]) == 0
    _assert_same(resumed, unbroken)
    assert [row["lr"] for row in _rows(unbroken)] == ["0.1", "0.1", "0.010000000000000002"]


@pytest.fixture(scope="module")
def unbroken_on_device(recipe, tmp_path_factory) -> RunFolder:
    folder = tmp_path_factory.mktemp("unbroken_on_device")
    assert main(["--config", str(recipe), "--output_dir", str(folder), *ON_DEVICE]) == 0
    return RunFolder(folder)


@pytest.mark.parametrize("batch", [4, pytest.param(10, marks=pytest.mark.slow)], ids=lambda batch: f"batch{batch}")
def test_data_on_the_device_and_mixing_resume_too(recipe, unbroken_on_device, tmp_path, monkeypatch, batch):
    with monkeypatch.context() as patch:
        _stop_at(patch, batch)
        assert main(["--config", str(recipe), "--output_dir", str(tmp_path), *ON_DEVICE]) == 128 + signal.SIGTERM
    torch.manual_seed(123)
    assert main(["--config", str(tmp_path / "config.yaml"), "--resume"]) == 0
    _assert_same(RunFolder(tmp_path), unbroken_on_device)


def test_a_run_with_its_data_on_the_device_is_evaluated_to_the_same_figures(unbroken_on_device, tmp_path):
    result = tmp_path / "result.json"
    arguments = [str(unbroken_on_device.path), "--device", "cpu", "--json", str(result), "--out", str(tmp_path)]
    assert evaluate(arguments) == 0
    found = json.loads(result.read_text())["results"][0]["top1"]
    assert found == pytest.approx(json.loads(unbroken_on_device.summary.read_text())["metrics"]["test/top1"])


@pytest.mark.slow
def test_stopped_twice(recipe, unbroken, tmp_path, monkeypatch):
    arguments = ["--config", str(recipe), "--output_dir", str(tmp_path), "--resume", "auto"]
    for batch in (2, 2, 4):
        with monkeypatch.context() as patch:
            _stop_at(patch, batch)
            assert main(arguments) == 128 + signal.SIGTERM
    assert main(arguments) == 0
    _assert_same(RunFolder(tmp_path), unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL], ids=lambda signum: signum.name)
def test_process_stopped_from_outside(recipe, unbroken, tmp_path, signum):
    code = "from vmoe.cli.train import main; raise SystemExit(main())"
    arguments = ["--config", str(recipe), "--output_dir", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, stderr=subprocess.PIPE)
    folder = RunFolder(tmp_path)
    while not folder.metrics.exists() and process.poll() is None:  # the first epoch's row: training is under way
        time.sleep(0.05)
    process.send_signal(signum)
    process.communicate()
    assert process.returncode in ({0, 143} if signum == signal.SIGTERM else {0, -signal.SIGKILL})
    assert main([*arguments, "--resume"]) == 0
    _assert_same(folder, unbroken)


def test_resuming_a_finished_run_says_so(recipe, unbroken, capsys):
    before = unbroken.last.read_bytes()
    assert main(["--config", str(recipe), "--output_dir", str(unbroken.path), "--resume"]) == 0
    assert "finished" in capsys.readouterr().out
    assert unbroken.last.read_bytes() == before


def test_a_finished_run_without_its_summary_is_tested_again(recipe, unbroken):
    before = unbroken.summary.read_text()
    unbroken.summary.unlink()
    assert main(["--config", str(recipe), "--output_dir", str(unbroken.path), "--resume"]) == 0
    assert json.loads(unbroken.summary.read_text())["metrics"] == json.loads(before)["metrics"]


def test_an_existing_run_is_not_overwritten(recipe, unbroken, capsys):
    before = unbroken.last.read_bytes()
    assert main(["--config", str(recipe), "--output_dir", str(unbroken.path)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert unbroken.last.read_bytes() == before


def test_a_config_that_changes_the_result_is_refused_on_resume(recipe, unbroken, capsys):
    arguments = ["--config", str(recipe), "--output_dir", str(unbroken.path), "--resume"]
    assert main([*arguments, "--optim.lr", "0.5", "--trainer.epochs", "2"]) == 2
    error = capsys.readouterr().err
    assert "optim.lr (was 0.001, now 0.5)" in error
    assert "trainer.epochs (was 3, now 2)" in error
    assert main([*arguments, "--data.workers", "1", "--trainer.log_every", "7"]) == 0


def test_a_run_s_config_keeps_what_was_left_open(recipe, unbroken, tmp_path):
    """Another router then takes its own defaults; what the run's own took is said beside."""
    text = unbroken.config.read_text()
    assert "\n  group: null  # 8\n" in text and "\n  noise_std: null  # 1.0\n" in text
    config = parse(["--config", str(unbroken.config), "--moe.router", "expert_choice"])
    assert config.moe.resolved().group == "image"
    older = tmp_path / "older.yaml"  # versions before wrote the defaults down
    older.write_text(text.replace("group: null", "group: 8").replace("noise_std: null", "noise_std: 1.0"))
    assert main(["--config", str(older), "--output_dir", str(unbroken.path), "--resume"]) == 0


def test_a_run_of_another_config_is_named_with_the_command_that_goes_on(recipe, unbroken, capsys):
    arguments = ["--config", str(recipe), "--output_dir", str(unbroken.path), "--resume", "--optim.betas", "[0.1,0.2]"]
    arguments += [
        "--optim.lr",
        "0.5",
        "--optim.min_lr",
        "0.2",
        "--optim.adamw_lr",
        "0.3",
        "--seed",
        "4",
        "--moe",
        "null",
    ]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert f"to go on with its own: vmoe train --resume --output_dir {unbroken.path}" in error
    assert " more;" in error and error.count("(was ") == 4


def test_the_run_s_own_config_is_taken(recipe, unbroken, tmp_path, monkeypatch, capsys):
    """By its folder alone, wherever that was moved, and from any working folder."""
    changed = ["--optim.lr", "0.002", "--trainer.epochs", "2", "--output_dir", str(tmp_path / "first")]
    with monkeypatch.context() as patch:
        _stop_at(patch, 7)
        assert main(["--config", str(recipe), *changed]) == 128 + signal.SIGTERM
    shutil.move(tmp_path / "first", tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    config = parse(["--resume", "--output_dir", str(tmp_path / "moved")])
    assert (config.optim.lr, config.output_dir) == (0.002, str(tmp_path / "moved"))
    assert parse(["--config", "config.yaml", "--resume"]).output_dir == "."
    assert main(["--config", "config.yaml", "--resume"]) == 0
    assert not (tmp_path / "first").exists()
    assert RunFolder(tmp_path / "moved").summary.exists()
    assert main(["--config", "config.yaml"]) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_a_run_that_has_lost_its_config_goes_on_by_its_checkpoint(recipe, unbroken, tmp_path, monkeypatch, capsys):
    folder = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patch:
        _stop_at(patch, 7)
        assert main(["--config", str(recipe), "--output_dir", str(folder.path)]) == 128 + signal.SIGTERM
    written = folder.config.read_text()
    folder.config.unlink()
    assert main(["--output_dir", str(folder.path)]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main(["--resume", "--output_dir", str(folder.path)]) == 0
    assert "after 1 epoch and 2 batches" in " ".join(capsys.readouterr().out.split())
    _assert_same(folder, unbroken)
    assert folder.config.read_text() == written
    folder.config.unlink()
    folder.last.unlink()
    assert main(["--resume", "--output_dir", str(folder.path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "has neither a config.yaml nor a last checkpoint" in error


def test_resume_needs_a_run_unless_it_is_auto(recipe, tmp_path, capsys):
    arguments = ["--config", str(recipe), "--trainer.epochs", "1", "--output_dir", str(tmp_path / "run"), "--resume"]
    for given in (arguments, ["--resume", "--output_dir", str(tmp_path / "run")], [*arguments, "true"]):
        assert main(given) == 2
        assert f"there is no run in {tmp_path / 'run'}" in capsys.readouterr().err
    assert main(["--resume"]) == 2
    assert "give the run's folder as --output_dir" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*arguments, "auto"]) == 0
    assert RunFolder(tmp_path / "run").summary.exists()
    assert "no checkpoint to resume" in capsys.readouterr().out
    assert main(arguments) == 0


@pytest.mark.parametrize("resume", [[], ["--resume", "auto"]], ids=["new", "auto"])
def test_a_config_that_a_user_wrote_stays(recipe, tmp_path, capsys, resume):
    own = tmp_path / "config.yaml"
    own.write_text("# mine, with care\n" + RECIPE)
    assert main(["--config", str(own), "--output_dir", str(tmp_path), *resume]) == 2
    assert "holds a config.yaml that no run wrote" in capsys.readouterr().err
    assert own.read_text() == "# mine, with care\n" + RECIPE


def test_a_finished_run_goes_on_with_more_epochs(recipe, unbroken, tmp_path, monkeypatch, capsys):
    """By the learning rates of the longer run; its config says so from then on."""
    folder = RunFolder(Path(shutil.copytree(unbroken.path, tmp_path / "run")))
    folder.config.write_text(folder.config.read_text().replace("trainer:\n", "trainer:\n  # as long as it takes\n"))
    with monkeypatch.context() as patch:
        _stop_at(patch, 2)
        longer = ["--resume", "--output_dir", str(folder.path), "--trainer.epochs", "5"]
        assert main(longer) == 128 + signal.SIGTERM
    assert "goes on to 5 epochs in place of 3" in capsys.readouterr().out
    assert "# as long as it takes" in folder.config.read_text()
    assert main(["--resume", "--output_dir", str(folder.path)]) == 0
    assert json.loads(folder.summary.read_text())["epochs"] == 5
    rates = [float(row["lr"]) for row in _rows(folder)]
    config = parse(["--config", str(folder.config)])
    assert rates[2] == pytest.approx(1e-5, abs=1e-4) and rates[2] < rates[3] > rates[4]
    for step, rate in ((11, rates[3]), (14, rates[4])):
        assert rate == LearningRates(config.optim, 5 * 3, 3).rate(step)
    assert main(["--resume", "--output_dir", str(folder.path), "--trainer.epochs", "4"]) == 2
    assert "trainer.epochs (was 5, now 4)" in capsys.readouterr().err


def test_a_finished_run_without_its_last_checkpoint_is_not_overwritten(recipe, unbroken, tmp_path, capsys):
    folder = RunFolder(Path(shutil.copytree(unbroken.path, tmp_path / "run")))
    folder.last.unlink()
    before = folder.best.read_bytes()
    assert main(["--config", str(recipe), "--output_dir", str(folder.path), "--resume"]) == 2
    assert "has lost its last.ckpt" in capsys.readouterr().err
    assert folder.best.read_bytes() == before


def test_a_damaged_summary_is_made_anew(recipe, unbroken, tmp_path):
    folder = RunFolder(Path(shutil.copytree(unbroken.path, tmp_path / "run")))
    folder.summary.write_text("{")
    assert main(["--config", str(recipe), "--output_dir", str(folder.path), "--resume"]) == 0
    assert json.loads(folder.summary.read_text())["epochs"] == 3


def test_other_classes_are_refused_on_resume(recipe, unbroken, tmp_path, capsys):
    folder = RunFolder(Path(shutil.copytree(unbroken.path, tmp_path / "run")))
    folder.summary.unlink()
    content = torch.load(folder.last, weights_only=True)
    content[ENTRY]["class_names"][3] = "three"
    torch.save(content, folder.last)
    assert main(["--config", str(recipe), "--output_dir", str(folder.path), "--resume"]) == 2
    assert "holds other classes than the run" in capsys.readouterr().err


def test_an_edited_table_is_refused_on_resume(recipe, tmp_path, capsys):
    for number in range(40):
        Image.new("RGB", (8, 8), (number, number, number)).save(tmp_path / f"{number}.png")
    rows = [f"{number}.png,{'ant' if number % 2 else 'bee'}\n" for number in range(40)]
    table, run = tmp_path / "labels.csv", tmp_path / "run"
    table.write_text("path,label\n" + "".join(rows))
    options = ["--data.subset.per_class", "null", "--data.batch_size", "8", "--data.image_size", "16"]
    options += [
        "--data.name",
        "table",
        "--data.root",
        str(table),
        "--output_dir",
        str(run),
        "--trainer.accumulate",
        "1",
    ]
    assert main(["--config", str(recipe), *options, "--trainer.epochs", "1", "--optim.warmup_epochs", "0"]) == 0
    table.write_text("path,label\n" + "".join([*rows[:1], rows[1].replace("ant", "bee"), *rows[2:]]))
    assert main(["--resume", "--output_dir", str(run), "--trainer.epochs", "2"]) == 2
    assert "the training images or their labels are not those" in capsys.readouterr().err
    table.write_text("path,label\n" + "".join(rows))
    assert main(["--resume", "--output_dir", str(run), "--trainer.epochs", "2"]) == 0
