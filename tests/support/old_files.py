"""Writes a release's files into tests/fixtures/released/VERSION, for later versions to open.

Run `python tests/support/old_files.py` once per release. It writes a run that was stopped in its second epoch, its
weights as safetensors, and the logits of its last checkpoint.
"""

import json
import os
import shutil
import signal
from pathlib import Path

import torch

import vmoe
from vmoe.checkpoints import RunFolder, load_checkpoint
from vmoe.cli.export import main as export
from vmoe.cli.train import main as train
from vmoe.training.classifier import Classifier

RELEASED = Path(__file__).parents[1] / "fixtures" / "released"
RECIPE = """
data: {name: digits, batch_size: 40, image_size: 8, subset: {per_class: 12}}
model: {name: vit_tiny_patch16_224, kwargs: {patch_size: 4, embed_dim: 8, depth: 2, num_heads: 2}}
moe: {num_experts: 2, top_k: 1}
optim: {warmup_epochs: 0}
trainer: {epochs: 2, device: cpu, ema_decay: 0.9}
"""


def images() -> torch.Tensor:
    """Two images that need no random numbers: (2, 3, 8, 8)."""
    return torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8).sin()


def write() -> None:
    """Writes the folder of this version, and replaces an existing one."""
    folder = RELEASED / vmoe.__version__
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    step = Classifier.training_step

    def stopping_step(self, *args):
        if self.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    Classifier.training_step = stopping_step
    os.chdir(folder)  # no path of this machine in the files
    assert train(["--config", "recipe.yaml", "--output_dir", "run"]) == 128 + signal.SIGTERM
    assert export(["run/checkpoints/last.ckpt", "--out", "weights.safetensors"]) == 0
    for events in Path("run").glob("events.*"):
        events.unlink()
    with torch.no_grad():
        logits = load_checkpoint(RunFolder(Path("run")).last).model(images())
    Path("logits.json").write_text(json.dumps(logits.tolist()))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # else the job chooses the number of threads the number of threads
    torch.set_num_threads(1)
    write()
