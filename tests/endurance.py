"""Lets a training and the tools run for long, and watches memory, file handles, processes and disk.

    python tests/endurance.py --minutes 45 --out endurance.png   # a training, and tools again and again in one process
    python tests/endurance.py --explorer 50000                   # the explorer over so many small images

Exit code 1 if anything grows: the medians of the second and the last quarter are compared. What a run writes down of
each epoch may grow by some kilobytes.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

RECIPE = """
data: {name: digits, batch_size: 128, workers: 1, augment: {preset: strong}}
model: {name: vit_tiny_patch16_224, kwargs: {patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}}
moe: {num_experts: 4}
trainer: {epochs: 1000000, device: cpu, ema_decay: 0.99}
"""
TRAIN = "import sys; from vmoe.cli.train import main; sys.exit(main())"
TOOLS = """
import contextlib, io, sys
from vmoe.cli.main import main
run, picture, out = sys.argv[1:]
while True:
    for job in (["evaluate", run, "--out", out], ["predict", run, picture, "--csv", out + "/a.csv"],
                ["heatmap", run, picture, "--out", out], ["export", run, "--out", out + "/a.safetensors"]):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as told:
            code = main(job)
        if code:
            sys.exit(told.getvalue())
"""
# What is watched, its unit, and by how much it may grow: a share, and a number besides
WATCHED = {"memory": ("MiB", 0.05, 10), "handles": ("", 0, 4), "processes": ("", 0, 0), "disk": ("MiB", 0, 2)}
SECONDS = 5


def main() -> int:
    """Runs one of the two, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--out", type=Path, default=Path("endurance.png"))
    parser.add_argument("--explorer", type=int, metavar="N", help="instead: the explorer over N images")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return explore(Path(folder), options.explorer) if options.explorer else endure(Path(folder), options)


def endure(folder: Path, options: argparse.Namespace) -> int:
    """Watches a training, and tools in one process."""
    (folder / "recipe.yaml").write_text(RECIPE)
    train = ["--config", str(folder / "recipe.yaml"), "--output_dir"]
    subprocess.run([sys.executable, "-c", TRAIN, *train, str(folder / "run"), "--trainer.epochs", "1"], check=True)
    picture = folder / "picture.png"
    pyplot.imsave(picture, np.random.default_rng(0).random((40, 40, 3)))
    places = {"training": folder / "long", "tools": folder / "tools"}
    with open(folder / "log", "w") as log:
        started = {
            "training": subprocess.Popen([sys.executable, "-c", TRAIN, *train, str(places["training"])], stdout=log),
            "tools": subprocess.Popen(
                [sys.executable, "-c", TOOLS, str(folder / "run"), str(picture), str(places["tools"])]
            ),
        }
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in started}
        start = time.monotonic()
        while time.monotonic() - start < 60 * options.minutes:
            time.sleep(SECONDS)
            for name, process in started.items():
                if process.poll() is not None:
                    raise SystemExit(f"{name}: ended with {process.returncode}")
                samples[name].append({"minutes": (time.monotonic() - start) / 60, **look(process.pid, places[name])})
        for process in started.values():
            process.terminate()
            process.wait()
    return judge(samples, options.out)


def look(pid: int, place: Path) -> dict[str, float]:
    """Of a process and those that it started: memory, open files, their number; and the disk that its folder takes."""
    family = [pid, *children(pid)]
    memory = handles = 0.0
    for member in family:
        try:
            memory += int(Path(f"/proc/{member}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
            handles += len(os.listdir(f"/proc/{member}/fd"))
        except (FileNotFoundError, ProcessLookupError):  # which has just ended
            continue
    disk = sum(path.stat().st_size for path in place.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {"memory": memory, "handles": handles, "processes": len(family), "disk": disk / 2**20}


def children(pid: int) -> list[int]:
    """The processes that a process started, and those that they did."""
    try:
        own = [int(word) for file in Path(f"/proc/{pid}/task").glob("*/children") for word in file.read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [*own, *(grandchild for child in own for grandchild in children(child))]


def judge(samples: dict[str, list[dict[str, float]]], out: Path) -> int:
    """Draws the curves, prints what grew, and returns the exit code."""
    figure, axes = pyplot.subplots(len(WATCHED), 1, figsize=(8, 9), sharex=True)
    grown = 0
    for axis, (what, (unit, share, number)) in zip(axes, WATCHED.items(), strict=True):
        for name, rows in samples.items():
            values = [row[what] for row in rows]
            axis.plot([row["minutes"] for row in rows], values, label=name)
            quarter = len(values) // 4
            before, after = (statistics.median(part) for part in (values[quarter : 2 * quarter], values[-quarter:]))
            grows = after > before * (1 + share) + number
            grown += grows
            print(f"{name}, {what}: {before:.1f} -> {after:.1f} {unit} {'GROWS' if grows else ''}".rstrip())
        axis.set_ylabel(f"{what} ({unit})" if unit else what)
        axis.set_ylim(0)
    axes[0].legend()
    axes[-1].set_xlabel("minutes")
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    return 1 if grown else 0


def explore(folder: Path, count: int) -> int:
    """Peak memory and time of the explorer over many images, and the size of its page."""
    from vmoe.cli.main import main as vmoe

    (folder / "recipe.yaml").write_text(RECIPE)
    train = ["train", "--config", str(folder / "recipe.yaml"), "--output_dir", str(folder / "run")]
    assert vmoe([*train, "--trainer.epochs", "1"]) == 0
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8), np.arange(count) % 10
    few = {"train_x": images[:10], "train_y": labels[:10], "val_x": images[:10], "val_y": labels[:10]}
    np.savez(folder / "many.npz", test_x=images, test_y=labels, **few)
    start = time.monotonic()
    data = ["--data", "npz", "--root", str(folder / "many.npz"), "--batch-size", "256"]
    assert vmoe(["explore", str(folder / "run"), "--out", str(folder / "out"), *data]) == 0
    seconds, peak = time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    told = json.loads((folder / "out" / "data" / "report.json").read_text())["provenance"]["num_images"]
    page = (folder / "out" / "index.html").stat().st_size / 2**20
    print(f"{told:,} images: {seconds:.0f} s, peak memory {peak:,.0f} MiB, page {page:.1f} MiB")
    return 0 if told == count and page < 25 else 1


if __name__ == "__main__":
    raise SystemExit(main())
