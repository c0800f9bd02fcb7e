"""What each release wrote opens for ever, to the same logits, and goes on; what a newer one wrote is one line."""

import json
import shutil

import pytest
import torch
from support.old_files import RELEASED, images

import vmoe
from vmoe.checkpoints import ENTRY, RunFolder, load_checkpoint, read_checkpoint
from vmoe.checkpoints.entry import FORMAT_VERSION
from vmoe.cli.evaluate import main as evaluate
from vmoe.cli.train import main as train
from vmoe.data.draws import DRAWS_VERSION

VERSIONS = sorted(path.name for path in RELEASED.iterdir())


def test_this_version_is_among_them():
    assert vmoe.__version__ in VERSIONS, "python tests/support/old_files.py writes what a release leaves behind"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("file", ["run/checkpoints/last.ckpt", "weights.safetensors"])
@torch.no_grad()
def test_checkpoints_give_the_same_logits(version, file):
    expected = torch.tensor(json.loads((RELEASED / version / "logits.json").read_text()))
    checkpoint = load_checkpoint(RELEASED / version / file)
    torch.testing.assert_close(checkpoint.model(images()), expected, rtol=1e-5, atol=1e-6)
    assert len(checkpoint.class_names) == 10 and checkpoint.epoch == 1
    assert vmoe.moe_layers(checkpoint.model)


@pytest.mark.parametrize("version", VERSIONS)
def test_runs_go_on_and_are_evaluated(version, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(shutil.copytree(RELEASED / version, tmp_path / "copy"))
    draws = read_checkpoint(RunFolder(tmp_path / "copy" / "run").last)[ENTRY].get("draws", 1)
    assert train(["--config", "run/config.yaml", "--resume"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert ("drew other random numbers for the same seed" in said) == (draws != DRAWS_VERSION)
    assert read_checkpoint(RunFolder(tmp_path / "copy" / "run").last)[ENTRY]["epochs_done"] == 2
    assert evaluate(["run"]) == 0


def test_a_config_tells_its_version_and_a_newer_one_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (RELEASED / vmoe.__version__ / "run" / "config.yaml").read_text()
    assert text.startswith(f"# vmoe {vmoe.__version__}\n")
    (tmp_path / "newer.yaml").write_text(text.replace(vmoe.__version__, "9.10.1", 1) + "unheard_of: 3\n")
    assert train(["--config", "newer.yaml", "--resume"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"newer.yaml: written by vmoe 9.10.1, and this is {vmoe.__version__}: update it (" in error
    (tmp_path / "own.yaml").write_text(text + "unheard_of: 3\n")
    assert train(["--config", "own.yaml", "--resume"]) == 2
    assert "own.yaml: unknown key unheard_of" in capsys.readouterr().err


def test_a_checkpoint_of_a_newer_format_is_not_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(shutil.copytree(RELEASED / vmoe.__version__, tmp_path / "copy"))
    last = RunFolder(tmp_path / "copy" / "run").last
    content = torch.load(last, weights_only=True)
    content[ENTRY]["version"] = FORMAT_VERSION + 1
    torch.save(content, last)
    before = last.read_bytes()
    assert train(["--config", "run/config.yaml", "--resume"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"format {FORMAT_VERSION + 1}; this one knows {FORMAT_VERSION}" in error
    assert last.read_bytes() == before
