"""\
Draws one figure (PNG) per image: the picture, and beside it for each MoE layer the patches in the colour of their first
expert (opacity = gate), with class and register tokens separately. index.html shows all figures, and index.json holds
their numbers. With --layers each of these layers also has its own figure: first and second choices, dropped choices,
the entropy of the gates, and a map of each expert's gate.

Images are prepared as in evaluation (the central square, resized). Each is routed alone, so drops under a capacity
factor do not depend on the other images. Files that cannot be read as images are listed at the end.

  vmoe heatmap runs/digits photo.jpg more_photos/ --out heatmaps
  vmoe heatmap runs/digits photo.jpg --out heatmaps --layers all
  vmoe heatmap runs/digits photo.jpg --out heatmaps --layers 3 --capacity-factor 0.5
"""

import argparse
import shlex
from pathlib import Path

from vmoe.cli.common import job
from vmoe.cli.options import capacity_factor, choose_device, new_parser
from vmoe.text import printable


@job({"capacity_factor": "--capacity-factor"})
def main(argv: list[str]) -> None:
    """Runs the job."""
    options = _heatmap_parser().parse_args(argv)
    # Imported here, so that --help and a mistyped option answer at once.
    from vmoe.checkpoints import load_checkpoint
    from vmoe.cli.inputs import depth_of, find_files, print_left_out
    from vmoe.cli.progress import Tracked
    from vmoe.explain.heatmap.files import write_heatmaps
    from vmoe.files import require_writable
    from vmoe.version import versions

    require_writable(options.out)
    checkpoint = load_checkpoint(options.checkpoint, choose_device(options.device))
    images = find_files(options.images, checkpoint.channels)
    checkpoint.bit_depth = depth_of(checkpoint.bit_depth, images, checkpoint.channels)
    command = shlex.join(["vmoe", "heatmap", *argv])
    index = write_heatmaps(
        checkpoint, images, options.out, options.layers, options.capacity_factor, command, versions(), Tracked
    )
    for image in index["images"]:
        shown = image["most_probable"] if "labels" in image else [image["prediction"]]
        best = ", ".join(f"{each['class']} {each['probability']:.1%}" for each in shown)
        said = best if "labels" not in image else f"{', '.join(image['labels']) or 'no class'} ({best})"
        print(printable(f"{image['file']}: {said}"))
    figures = sum(len(image["pages"]) for image in index["images"])
    print_left_out(index["damaged"], len(images))
    print(f"index.html, {figures} figure{'s' * (figures > 1)} and index.json in {options.out}")


def _heatmap_parser() -> argparse.ArgumentParser:
    parser = new_parser("heatmap", __doc__)
    parser.add_argument("checkpoint", metavar="CKPT", help="a .ckpt file, or a run's folder (its best checkpoint)")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files of any size and mode, or folders")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the figures go")
    parser.add_argument(
        "--layers",
        nargs="+",
        metavar="LAYER",
        help="draw only these MoE layers, each with a figure of its own: by block (3), name (blocks.3.mlp), or all",
    )
    parser.add_argument(
        "--capacity-factor",
        type=capacity_factor,
        metavar="F",
        help="route with this capacity, to see what is dropped; inf drops nothing (default: the checkpoint's own)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    return parser
