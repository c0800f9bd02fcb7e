"""\
Prints the most probable classes of pictures of any size and mode, or all their classes if the model knows several per
image. Pictures are prepared as in evaluation (the central square, resized). MODEL is a checkpoint, a run's folder, a
safetensors file, a folder written by `vmoe export --format hub`, the name of one on the hub (USER/NAME), a released
model (`vmoe models` lists them), the address of a safetensors file, or an ONNX file. Files that cannot be read as
images are listed at the end.

  vmoe predict assets/models/cifar100_tiny.safetensors photo.jpg holiday/ --csv answers.csv
  vmoe predict runs/mine holiday/ --threshold 0.5 --tta --embeddings vectors.npz
  vmoe predict calibrated.safetensors holiday/ --coverage 0.9
  vmoe predict cifar10_small.onnx photo.jpg --top 1
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vmoe.cli.common import job
from vmoe.cli.options import choose_device, count, new_parser, probability
from vmoe.errors import UserError
from vmoe.extras import require_module
from vmoe.text import printable, readable

if TYPE_CHECKING:
    from vmoe.checkpoints import TrainedModel


@job({"CKPT": "MODEL", "coverage": "--coverage"})
def main(argv: list[str]) -> None:
    """Runs the job."""
    from vmoe.cli.inputs import halving_batches

    options = _predict_parser().parse_args(argv)
    halving_batches(lambda: _predicted(options), options)


def _predicted(options: argparse.Namespace) -> None:
    # Imported here, so that --help and a mistyped option answer at once.
    from vmoe.checkpoints.calibration import least_probability
    from vmoe.checkpoints.prediction import UNKNOWN
    from vmoe.cli.inputs import note_batches, print_left_out
    from vmoe.cli.progress import Tracked
    from vmoe.data.image_files import none_readable
    from vmoe.export.predictor import Program, load_predictor
    from vmoe.files import require_no_folder, require_writable, write_arrays, write_csv, write_json

    written = (options.csv, options.json, options.parquet, options.logits, options.embeddings)
    files = [file for file in written if file is not None]
    for file in files:
        if sum(file.resolve() == other.resolve() for other in files) > 1:
            raise UserError(f"{file}: two results are to be written there; name a file for each")
    require_no_folder(*files)
    require_writable(*(file.parent for file in files))
    if options.parquet is not None:
        require_module("pyarrow")
    model = load_predictor(options.model, choose_device(options.device))
    if options.routing and isinstance(model, Program):
        raise UserError("--routing: a program records no routing; give the checkpoint it was made from")
    if options.embeddings is not None and isinstance(model, Program):
        raise UserError("--embeddings: a program gives logits alone; give the checkpoint it was made from")
    if options.coverage is not None:
        if options.tta:
            raise UserError("--coverage: goes without --tta, for which no model is calibrated")
        if model.multi_label:
            what = f"--coverage: is for one class per image, and {options.model} knows several"
            raise UserError(f"{what}; --threshold chooses among them")
        if model.calibration is None:
            what = f"--coverage {options.coverage:g}: {options.model} is not calibrated"
            raise UserError(f"{what}; `vmoe calibrate` writes a file that is")
        least_probability(model.calibration, options.coverage)  # raises before the work if the coverage is too high
    batch = 1 if options.routing else options.batch_size
    note_batches(options, batch, model)
    found = model.predict(
        options.images,
        batch_size=batch,
        skip_damaged=True,
        tta=options.tta,
        features=options.embeddings is not None,
        progress=Tracked,
    )
    for line in found.notes:
        print(printable(line), file=sys.stderr)
    if not len(found):
        raise none_readable(found.left_out)
    answers = [
        {"file": readable(str(file)), "predictions": predictions}
        for file, predictions in zip(found.pictures, found.top(options.top), strict=True)
    ]
    if found.multi_label:
        labels = found.labels if options.threshold is None else found.labels_from(options.threshold)
        for names, answer in zip(labels, answers, strict=True):
            answer["labels"] = names
    elif options.threshold is not None:
        for label, answer in zip(found.labels_from(options.threshold), answers, strict=True):
            answer["label"] = label
    if options.coverage is not None:
        for classes, answer in zip(found.sets(options.coverage), answers, strict=True):
            answer["set"] = classes
    if options.routing:
        for file, answer in zip(found.pictures, answers, strict=True):
            answer["routing"] = _shares_of_experts(model, file, found.bit_depth)
    for answer in answers:
        best = ", ".join(f"{each['class']} {each['probability']:.1%}" for each in answer["predictions"])
        if found.multi_label:
            best = f"{', '.join(answer['labels']) or 'no class'} ({best})"
        elif answer.get("label") == UNKNOWN:
            best = f"{UNKNOWN} ({best})"
        if "set" in answer:
            best = f"{' or '.join(answer['set'])} ({best})"
        print(printable(f"{answer['file']}: {best}"))
        for layer, shares in answer.get("routing", {}).items():
            print(f"  {layer}: " + ", ".join(f"expert {index} {share:.0%}" for index, share in _four_largest(shares)))
    if options.json is not None:
        write_json(options.json, {"model": str(options.model), "images": answers, "damaged": found.left_out})
    ranked = found.top(len(found.class_names)) if found.multi_label else found.top(options.top)
    rows = [
        {"file": answer["file"], "rank": rank, **each, **_label_of(answer, each["class"])}
        for answer, classes in zip(answers, ranked, strict=True)
        for rank, each in enumerate(classes, 1)
        # a class with a low threshold may be a label without being among the most probable classes
        if rank <= options.top or each["class"] in answer["labels"]
    ]
    if options.csv is not None:
        write_csv(options.csv, [{**row, "probability": f"{row['probability']:.6f}"} for row in rows])
    if options.parquet is not None:
        _write_parquet(options.parquet, rows)
    names = {"files": [answer["file"] for answer in answers], "class_names": found.class_names}
    if options.logits is not None:
        write_arrays(options.logits, {**names, "logits": found.logits})
    if options.embeddings is not None:
        write_arrays(options.embeddings, {**names, "embeddings": found.features})
    print_left_out(found.left_out, len(found) + len(found.left_out))


def _label_of(answer: dict, class_name: str) -> dict:
    """A table row's entry on the label: the label itself, or with several classes whether this class is one."""
    if "labels" in answer:
        return {"is_label": class_name in answer["labels"]}
    label = {"label": answer["label"]} if "label" in answer else {}
    return label | ({"set": "; ".join(answer["set"])} if "set" in answer else {})


def _write_parquet(path: Path, rows: list[dict]) -> None:
    import pyarrow
    from pyarrow import parquet

    from vmoe.files import atomic_write

    # Parquet's texts are UTF-8, but a file's name may be invalid UTF-8
    plain = [{**row, "file": row["file"].encode(errors="replace").decode()} for row in rows]
    with atomic_write(path) as temporary:
        parquet.write_table(pyarrow.Table.from_pylist(plain), temporary)


def _shares_of_experts(model: "TrainedModel", file: Path, bit_depth: int | None) -> dict[str, list[float]]:
    """Per MoE layer, each expert's share of the choices of an image's patches."""
    from vmoe.data import load_image
    from vmoe.explain.heatmap.routed import describe_layer, route_image

    image = load_image(file, bit_depth, model.channels)
    routed = route_image(model, image, model.image_size, model.mean, model.std, crop=model.crop)
    return {name: describe_layer(layer)["choice_share"] for name, layer in routed.layers.items()}


def _four_largest(shares: list[float]) -> list[tuple[int, float]]:
    return sorted(((index, share) for index, share in enumerate(shares) if share), key=lambda each: -each[1])[:4]


def _predict_parser() -> argparse.ArgumentParser:
    parser = new_parser("predict", __doc__)
    opened = "a checkpoint, a folder, a .safetensors or .onnx file, or a name: see `vmoe models`"
    parser.add_argument("model", metavar="MODEL", help=opened)
    parser.add_argument("images", metavar="IMAGE_OR_FOLDER", nargs="+", help="image files, or folders of them")
    parser.add_argument("--top", type=count, default=5, metavar="N", help="classes per image (default: %(default)s)")
    parser.add_argument("--routing", action="store_true", help="print which experts an image's patches go to")
    parser.add_argument("--tta", action="store_true", help="mean of each image and its mirror image")
    line = "no class has at least P: the image is unknown; of several classes per image, all that have it are named"
    parser.add_argument("--threshold", type=probability, metavar="P", help=line)
    line = "a set of classes for each image, which holds the right one with this probability; needs `vmoe calibrate`"
    parser.add_argument("--coverage", type=probability, metavar="P", help=line)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the answers as a table")
    parser.add_argument("--parquet", type=Path, metavar="FILE", help="write the same table as Parquet")
    parser.add_argument("--logits", type=Path, metavar="FILE", help="write all logits as arrays, .npz")
    parser.add_argument("--embeddings", type=Path, metavar="FILE", help="write what the classifier takes, .npz")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the answers, and the files left out, as JSON")
    parser.add_argument("--batch-size", type=count, default=32, metavar="B", help="images at once (default: 32)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: auto)")
    return parser
