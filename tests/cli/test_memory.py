"""Out of memory: one line, and smaller batches where a job can go on with them."""

import json
import shlex

import pytest
import torch
from PIL import Image
from support.saved_runs import save_run
from timm.models import VisionTransformer

from vmoe.cli.evaluate import main as evaluate
from vmoe.cli.explore import main as explore
from vmoe.cli.predict import main as predict
from vmoe.cli.train import main as train
from vmoe.memory import is_out_of_memory, memory_line

TEXT = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. "
    "GPU 1 has a total capacity of 139.80 GiB of which 1.06 GiB is free. "
    "Process 4711 has 100.25 GiB memory in use. "
    "Including non-PyTorch memory, this process has 38.49 GiB memory in use. "
    "Of the allocated memory 36.00 GiB is allocated by PyTorch, and 1.50 GiB is reserved by PyTorch but unallocated."
)
FACTS = "GPU 1 has 139.80 GiB, of which 1.06 GiB is free, this process holds 38.49 GiB, process 4711 holds 100.25 GiB"


@pytest.fixture
def small_gpu(monkeypatch):
    """A function that lets models take at most so many images; gives the sizes of the batches that they took."""
    forward, sizes = VisionTransformer.forward, []

    def set_room(most: int) -> list[int]:
        def limited(self, images, *args, **kwargs):
            if len(images) > most and not images.is_meta:
                raise torch.OutOfMemoryError(TEXT)
            if not images.is_meta:
                sizes.append(len(images))
            return forward(self, images, *args, **kwargs)

        monkeypatch.setattr(VisionTransformer, "forward", limited)
        return sizes

    return set_room


def test_the_line_tells_what_there_was_and_who_holds_it():
    error = torch.OutOfMemoryError(TEXT)
    assert is_out_of_memory(error)
    assert memory_line(error, "do this") == f"out of GPU memory: {FACTS}; do this"
    assert memory_line(RuntimeError("CUDA error: out of memory"), "do this") == "out of GPU memory; do this"
    assert not is_out_of_memory(RuntimeError("shapes differ"))


@pytest.mark.parametrize(
    ("moe", "room", "sizes"),
    [
        ({"num_experts": 4}, 100, {64, 39}),  # 256, 128, 64 of 359 images
        ({"num_experts": 4, "eval_capacity_factor": 1.0, "group": 48}, 100, {96, 71}),  # 256, 96: whole groups
    ],
)
def test_evaluation_goes_on_with_smaller_batches(tmp_path, capsys, small_gpu, moe, room, sizes):
    run = save_run(tmp_path / "run", moe)
    arguments = [str(run), "--device", "cpu", "--batch-size", "256"]
    assert evaluate([*arguments, "--json", str(tmp_path / "whole.json"), "--out", str(tmp_path)]) == 0
    taken = small_gpu(room)
    assert evaluate([*arguments, "--json", str(tmp_path / "parts.json"), "--out", str(tmp_path)]) == 0
    assert set(taken) - {1} == sizes
    assert f"{FACTS}; begins again with batches of" in capsys.readouterr().err
    whole, parts = (json.loads((tmp_path / f"{name}.json").read_text())["results"][0] for name in ("whole", "parts"))
    assert (parts["top1"], parts["images"]) == (whole["top1"], whole["images"])


def test_where_no_batch_fits_it_is_one_line(tmp_path, capsys, small_gpu):
    run = save_run(tmp_path / "run", {"num_experts": 4})
    small_gpu(0)
    assert evaluate([str(run), "--device", "cpu", "--batch-size", "2", "--out", str(tmp_path / "out")]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line == f"vmoe evaluate: error: out of GPU memory: {FACTS}; " + line.rpartition("; ")[2]
    assert "--batch-size" in line


def test_predictions_and_the_explorer_go_on_too(tmp_path, capsys, small_gpu):
    run = save_run(tmp_path / "run", {"num_experts": 4})
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(12):
        Image.new("L", (16, 16), 20 * number).save(pictures / f"{number}.png")
    sizes = small_gpu(8)
    common = ["--device", "cpu", "--batch-size", "12"]
    assert predict([str(run), str(pictures), *common, "--json", str(tmp_path / "p.json")]) == 0
    assert sizes == [6, 6]
    assert "begins again with batches of 6 images in place of 12" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "p.json").read_text())["images"]) == 12
    little = shlex.split("--replicates 20 --probe-images 0 --cause-images 0")
    assert explore([str(run), "--images", str(pictures), "--out", str(tmp_path / "out"), *common, *little]) == 0
    assert (tmp_path / "out" / "index.html").exists()
    assert "begins again with batches of 6 images in place of 12" in capsys.readouterr().err


def test_training_says_what_takes_less(tmp_path, capsys, small_gpu):
    small_gpu(8)
    kwargs = json.dumps({"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3})
    options = ["--data.name", "digits", "--model.kwargs", kwargs, "--moe.num_experts", "4", "--trainer.device", "cpu"]
    assert train([*options, "--data.batch_size", "32", "--output_dir", str(tmp_path / "run")]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert (
        f"vmoe train: error: out of GPU memory: {FACTS}; lower data.batch_size=32 and raise trainer.accumulate=1"
        in line
    )
    assert "moe.recompute_activation" in line and "trainer.precision=bf16" in line
