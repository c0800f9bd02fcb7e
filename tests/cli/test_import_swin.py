"""`vmoe import-swin`: what it writes opens and gives the same logits, and a mistake leaves nothing behind."""

from pathlib import Path

import pytest
import torch

import vmoe
from vmoe.cli.import_swin import main

FOLDER = Path(__file__).parent.parent / "fixtures" / "swin_moe"
COSINE, DENSE = FOLDER / "tiny_cosine_4expert_1rank", FOLDER / "tiny_dense"


@pytest.mark.parametrize(
    ("path", "options", "arguments"),
    [
        (COSINE, [], {"config": {}}),
        (COSINE, ["--config", str(COSINE / "config.yaml"), "--no-batch-priority"], {"config": {"USE_BPR": False}}),
        (COSINE, ["--capacity-factor", "inf", "--top-k", "2"], {"config": {"CAPACITY_FACTOR": 0, "TOP_VALUE": 2}}),
        (DENSE, ["--img-size", "128"], {"img_size": 128}),
    ],
)
@torch.no_grad()
def test_a_ckpt_opens_as_any_other(path, options, arguments, tmp_path, capsys):
    assert main([str(path), "--out", str(tmp_path / "x.ckpt"), *options]) == 0
    assert "10 classes" in capsys.readouterr().out
    model = vmoe.load(tmp_path / "x.ckpt")
    assert model.mean == (0.485, 0.456, 0.406) and model.image_size == arguments.get("img_size", 64)
    images = torch.randn(4, 3, model.image_size, model.image_size)
    expected = vmoe.load_swin_moe_checkpoint(path, **arguments)(images)
    torch.testing.assert_close(model(images), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["/no/such/prefix", "--out", "x.ckpt"], "/no/such/prefix: no such file"),
        ([str(COSINE), "--out", "x.npz"], "--out x.npz"),
        ([str(COSINE), "--out", "x.ckpt", "--top-k", "9"], "--top-k 9"),
        ([str(COSINE), "--out", "x.ckpt", "--capacity-factor", "-1"], "--capacity-factor"),
        ([str(COSINE), "--out", "x.ckpt", "--img-size", "31"], "--img-size 31"),
        ([str(COSINE), "--out", "x.ckpt", "--config", __file__], "--config"),
        ([str(COSINE), "--out", "x.ckpt", "--class-names", __file__], "--class-names"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(argv, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("vmoe import-swin: error: ") and error.count("\n") == 1 and word in error
    assert list(tmp_path.iterdir()) == []
