"""\
Names the most probable classes of pictures of any size and mode, prepared as in evaluation (the central square,
resized). MODEL is a checkpoint, a run's folder, a safetensors file, a folder written by `vmoe export --format hub`, or
an ONNX file. Files that cannot be read as images are listed at the end.

  vmoe predict assets/models/cifar10_small.safetensors photo.jpg holiday/ --csv answers.csv
  vmoe predict cifar10_small.onnx photo.jpg --top 1
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vmoe.cli.common import job
from vmoe.cli.options import choose_device, count, new_parser
from vmoe.errors import UserError
from vmoe.text import printable, readable

if TYPE_CHECKING:
    from vmoe.checkpoints import TrainedModel


@job({"CKPT": "MODEL"})
def main(argv: list[str]) -> None:
    """Runs the job."""
    from vmoe.cli.inputs import halving_batches

    options = _predict_parser().parse_args(argv)
    halving_batches(lambda: _predicted(options), options)


def _predicted(options: argparse.Namespace) -> None:
    # Imported here, so that --help and a mistyped option answer at once.
    from vmoe.cli.inputs import note_batches, say_left_out
    from vmoe.cli.progress import Tracked
    from vmoe.data.image_files import none_readable
    from vmoe.export.predictor import Program, load_predictor
    from vmoe.files import require_writable, write_csv, write_json

    require_writable(*(file.parent for file in (options.csv, options.json) if file is not None))
    model = load_predictor(options.model, choose_device(options.device))
    if options.routing and isinstance(model, Program):
        raise UserError("--routing: a program does not tell its routing; give the checkpoint it was made from")
    batch = 1 if options.routing else options.batch_size
    note_batches(options, batch, model)
    found = model.predict(options.images, batch_size=batch, skip_damaged=True, progress=Tracked)
    for line in found.notes:
        print(printable(line), file=sys.stderr)
    if not len(found):
        raise none_readable(found.left_out)
    answers = [
        {"file": readable(str(file)), "predictions": predictions}
        for file, predictions in zip(found.pictures, found.top(options.top), strict=True)
    ]
    if options.routing:
        for file, answer in zip(found.pictures, answers, strict=True):
            answer["routing"] = _shares_of_experts(model, file, found.bit_depth)
    for answer in answers:
        best = ", ".join(f"{each['class']} {each['probability']:.1%}" for each in answer["predictions"])
        print(printable(f"{answer['file']}: {best}"))
        for layer, shares in answer.get("routing", {}).items():
            print(f"  {layer}: " + ", ".join(f"expert {index} {share:.0%}" for index, share in _four_largest(shares)))
    if options.json is not None:
        write_json(options.json, {"model": str(options.model), "images": answers, "damaged": found.left_out})
    if options.csv is not None:
        rows = [
            {"file": answer["file"], "rank": rank, **each, "probability": f"{each['probability']:.6f}"}
            for answer in answers
            for rank, each in enumerate(answer["predictions"], 1)
        ]
        write_csv(options.csv, rows)
    say_left_out(found.left_out, len(found) + len(found.left_out))


def _shares_of_experts(model: "TrainedModel", file: Path, bit_depth: int | None) -> dict[str, list[float]]:
    """For each MoE layer, the share of the choices of an image's patches that went to each expert."""
    from vmoe.data import load_image
    from vmoe.explain.heatmap.routed import describe_layer, route_image

    image = load_image(file, bit_depth)
    routed = route_image(model, image, model.image_size, model.mean, model.std)
    return {name: describe_layer(layer)["choice_share"] for name, layer in routed.layers.items()}


def _four_largest(shares: list[float]) -> list[tuple[int, float]]:
    return sorted(((index, share) for index, share in enumerate(shares) if share), key=lambda each: -each[1])[:4]


def _predict_parser() -> argparse.ArgumentParser:
    parser = new_parser("predict", __doc__)
    parser.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint, a folder, a safetensors or ONNX file")
    parser.add_argument("images", metavar="IMAGE_OR_FOLDER", nargs="+", help="image files, or folders of them")
    parser.add_argument("--top", type=count, default=5, metavar="N", help="classes an image (default: %(default)s)")
    parser.add_argument("--routing", action="store_true", help="tell which experts an image's patches go to")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the answers as a table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the answers, and the files left out, as JSON")
    parser.add_argument("--batch-size", type=count, default=32, metavar="B", help="images at once (default: 32)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: auto)")
    return parser
