"""The demonstration behind `make demo`: train, evaluate and draw, on data that come with the package."""

from pathlib import Path

from PIL import Image

from vmoe.cli import evaluate, heatmap, train
from vmoe.cli.common import run
from vmoe.data.config import DataConfig
from vmoe.data.datasets import load_splits
from vmoe.files import atomic_write

CONFIG = Path("configs/digits.yaml")
RUN = Path("runs/digits")
PICTURES = RUN / "pictures"
HEATMAPS = RUN / "heatmaps"


def main(argv: list[str] | None = None) -> int:
    """Runs the demonstration; a run that is there already goes on, or is used as it is. Returns the exit code."""
    return run(_demo, argv)


def _demo(_: list[str]) -> int:
    steps = [
        ("Training", lambda: train.main(["--config", str(CONFIG), "--output_dir", str(RUN), "--resume", "auto"])),
        ("Evaluating", lambda: evaluate.main([str(RUN)])),
        ("Drawing", lambda: heatmap.main([str(RUN), *_write_pictures(), "--out", str(HEATMAPS)])),
    ]
    for name, step in steps:
        print(f"\n== {name}", flush=True)
        if code := step():
            return code
    print(
        f"\nThe run, its metrics and its checkpoints: {RUN}"
        f"\nAccuracy and calibration:                 {RUN / 'evaluation.json'}"
        f"\nWhich expert takes which patch:           {HEATMAPS / 'index.html'}"
    )
    return 0


def _write_pictures() -> list[str]:
    """One test image of each digit, as picture files."""
    test = load_splits(DataConfig(name="digits")).test
    paths = []
    for digit in range(10):
        index = list(test.labels).index(digit)
        path = PICTURES / f"{digit}.png"
        with atomic_write(path) as temporary:
            Image.fromarray(test.read(index)).save(temporary)
        paths.append(str(path))
    return paths
