"""The demonstration of `make demo`: a trained model's routing on photographs, then a training."""

import os
import time
from pathlib import Path

from PIL import Image

from vmoe.cli import evaluate, heatmap, train
from vmoe.cli.common import job
from vmoe.data.config import DataConfig
from vmoe.data.datasets import load_splits
from vmoe.data.samples import PHOTOGRAPHS, credit, photograph_path
from vmoe.files import atomic_write

MODEL = Path("assets/models/cifar100_tiny.safetensors")
CONFIG = Path("configs/digits.yaml")
RUN = Path("runs/digits")
PHOTOGRAPH_MAPS = Path("runs/photographs")
PICTURES = RUN / "pictures"
HEATMAPS = RUN / "heatmaps"


@job()
def main(_: list[str]) -> int:
    """Runs the demonstration. An unfinished run is resumed, and a finished one is reused."""
    begun = time.monotonic()
    photographs = [os.path.relpath(photograph_path(name)) for name in PHOTOGRAPHS]
    steps = {
        "A V-MoE that was trained on CIFAR-100 looks at two photographs": lambda: heatmap.main(
            [str(MODEL), *photographs, "--out", str(PHOTOGRAPH_MAPS)]
        ),
        "Training a V-MoE on handwritten digits": lambda: train.main(
            ["--config", str(CONFIG), "--output_dir", str(RUN), "--resume", "auto"]
        ),
        "Evaluating it": lambda: evaluate.main([str(RUN)]),
        "Drawing which expert takes which patch": lambda: heatmap.main(
            [str(RUN), *_write_pictures(), "--out", str(HEATMAPS)]
        ),
    }
    for number, (name, step) in enumerate(steps.items()):
        print(f"\n== {name}", flush=True)
        if code := step():
            return code
        if number == 0:
            page, seconds = PHOTOGRAPH_MAPS / "index.html", time.monotonic() - begun
            print(f"There is something to look at after {seconds:.0f} s: {page} ({credit()})", flush=True)
    print(
        f"\nThe photographs:                          {PHOTOGRAPH_MAPS / 'index.html'}"
        f"\nThe run, its metrics and its checkpoints: {RUN}"
        f"\nAccuracy and calibration:                 {RUN / 'evaluation.json'}"
        f"\nWhich expert takes which patch:           {HEATMAPS / 'index.html'}"
    )
    return 0


def _write_pictures() -> list[str]:
    """Writes one test image of each digit as a picture file."""
    test = load_splits(DataConfig(name="digits")).test
    paths = []
    for digit in range(10):
        index = list(test.labels).index(digit)
        path = PICTURES / f"{digit}.png"
        with atomic_write(path) as temporary:
            Image.fromarray(test.read(index)).save(temporary)
        paths.append(str(path))
    return paths
