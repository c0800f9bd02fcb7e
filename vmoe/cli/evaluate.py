"""`vmoe evaluate`: measures a checkpoint on a data set."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vmoe.cli.common import run
from vmoe.cli.inputs import Tracked, load_data
from vmoe.cli.options import capacity_factor, choose_device, new_parser

if TYPE_CHECKING:
    from vmoe.analysis.evaluation import Evaluation

_DESCRIPTION = """\
Measures a checkpoint: top-1, top-5, negative log-likelihood, calibration error, the accuracy of each class, the
confusion matrix, images/s (loading included, without the first batch), and what each MoE layer drops and how evenly it
is loaded.

Writes evaluation.json and confusion.png (one for each capacity factor when several are given) into the run's folder, or
beside a checkpoint that stands in none; a second evaluation replaces them.

  vmoe evaluate runs/digits
  vmoe evaluate runs/digits/checkpoints/last.ckpt --capacity-factor 0.5 1 inf --out sweep
  vmoe evaluate runs/cifar10 --data npz --root cifar10.1.npz --json shifted.json
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the job with `argv`; returns its exit code."""
    return run(_evaluate, argv)


def _evaluate(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    # Imported here, so that --help and a mistyped option answer at once.
    from vmoe.analysis.confusion import draw_confusion
    from vmoe.analysis.evaluation import evaluate, evaluate_capacities
    from vmoe.checkpoints import load_checkpoint
    from vmoe.files import write_json

    device = choose_device(options.device)
    checkpoint = load_checkpoint(options.checkpoint, device)
    data = load_data(checkpoint, options)
    loader = data.val_dataloader() if options.split == "val" else data.test_dataloader()
    batches = Tracked(loader, f"{options.split} set of {data.config.name}")
    num_classes = len(checkpoint.class_names)
    if options.capacity_factor is None:
        results = [evaluate(checkpoint.model, batches, num_classes, device)]
    else:
        results = list(evaluate_capacities(checkpoint.model, batches, num_classes, options.capacity_factor, device))

    console = Console()
    console.print(_summary(results, f"{checkpoint.path} · {options.split} set of {data.config.name}"))
    if results[0].layers:
        console.print(_layer_table(results))
    console.print(_class_table(results[0], checkpoint.class_names))
    out = options.out or _own_folder(checkpoint.path)
    json_file = options.json or out / "evaluation.json"
    write_json(json_file, _report(checkpoint, data, options.split, device, results))
    for result in results:
        name = "confusion.png" if len(results) == 1 else f"confusion-{_factor(result.capacity_factor)}.png"
        title = f"{options.split} set of {data.config.name} · {checkpoint.path}"
        draw_confusion(result, checkpoint.class_names, title).save(out / name)
    print(f"{json_file} and the confusion matrix in {out}")


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("evaluate", _DESCRIPTION)
    parser.add_argument("checkpoint", metavar="CKPT", help="a .ckpt file, or a run's folder (its best checkpoint)")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="which part (default: test)")
    parser.add_argument(
        "--capacity-factor",
        nargs="+",
        type=capacity_factor,
        metavar="F",
        help="measure at each of these; inf drops nothing (default: the checkpoint's own)",
    )
    parser.add_argument("--data", metavar="NAME", help="another set than the run's: digits, cifar10, folder, npz, ...")
    parser.add_argument("--root", metavar="DIR", help="where the data are, if not where the run had them")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images a batch")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that load images")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the numbers go")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the pictures go, and the numbers without --json")
    return parser


def _own_folder(path: Path) -> Path:
    """The run's folder of a checkpoint, or the folder it stands in."""
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


def _factor(value: float | None) -> str:
    return "inf" if value is None else f"{value:g}"


def _summary(results: "list[Evaluation]", title: str) -> Table:
    table = Table(title=escape(title), title_justify="left")
    five = f"top-{min(5, len(results[0].class_accuracy))}"
    for column in ("capacity", "images", "top-1", five, "NLL", "ECE", "dropped", "images/s"):
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(
            _factor(result.capacity_factor) if result.layers else "dense",
            f"{result.images:,}",
            *(f"{share:.2%}" for share in (result.top1, result.top5)),
            f"{result.nll:.4f}",
            f"{result.ece:.4f}",
            "-" if result.dropped is None else f"{result.dropped:.2%}",
            "-" if result.images_per_second is None else f"{result.images_per_second:,.0f}",
        )
    return table


def _layer_table(results: "list[Evaluation]") -> Table:
    table = Table(title="experts (load: 1 = the fair share, 0 = dead)", title_justify="left")
    table.add_column("layer", no_wrap=True)
    table.add_column("least load", justify="right")
    table.add_column("most load", justify="right")
    for result in results:
        table.add_column(f"dropped at {_factor(result.capacity_factor)}", justify="right")
    for name, use in results[0].layers.items():
        dropped = [f"{result.layers[name].dropped:.2%}" for result in results]
        table.add_row(name, f"{min(use.load):.2f}", f"{max(use.load):.2f}", *dropped)
    return table


def _class_table(result: "Evaluation", names: list[str], shown: int = 10) -> Table:
    """The accuracy of each class, worst first, with the class it is most often taken for."""
    order = sorted((accuracy, index) for index, accuracy in enumerate(result.class_accuracy) if accuracy is not None)
    title = "accuracy by class" if len(order) <= shown else f"accuracy by class: the {shown} worst of {len(order)}"
    table = Table(title=title, title_justify="left")
    for column in ("class", "top-1", "images", "most often taken for"):
        table.add_column(column, justify="right" if column in ("top-1", "images") else "left")
    for accuracy, index in order[:shown]:
        row = list(result.confusion[index])
        total, row[index] = sum(row), 0
        other = max(range(len(row)), key=row.__getitem__)
        taken_for = f"{names[other]} ({row[other]})" if row[other] else "-"
        table.add_row(escape(names[index]), f"{accuracy:.2%}", str(total), escape(taken_for))
    return table


def _report(checkpoint, data, split: str, device, results: "list[Evaluation]") -> dict:
    from vmoe.training.summary import device_name, versions

    return {
        "checkpoint": str(checkpoint.path),
        "epoch": checkpoint.epoch,
        "data": {"name": data.config.name, "root": data.config.root, "split": split},
        "class_names": checkpoint.class_names,
        "device": device_name(device),
        "versions": versions(),
        "results": [result.as_dict() for result in results],
    }
