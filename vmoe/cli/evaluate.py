"""\
Measures a checkpoint: top-1, top-5, negative log-likelihood, calibration error, the accuracy of each class, the
confusion matrix, AUROC and average precision, images/s (loading included, without the first batch), and what each MoE
layer drops and how evenly it is loaded. On request also its frozen features (k-NN, linear, few-shot) and corrupted
images. Features may be those of a set with another number of classes: then they alone are measured; give --out, so
that the run's own figures stay.

Writes evaluation.json, confusion.png and precision_recall.png (one of each for each capacity factor and K when several
are given) into the run's folder, or beside a checkpoint that stands in none; a second evaluation replaces them.

  vmoe evaluate runs/digits
  vmoe evaluate runs/digits/checkpoints/last.ckpt --capacity-factor 0.5 1 inf --top-k 1 2 --out sweep
  vmoe evaluate runs/cifar100 --probe few-shot linear --shots 10 --data cifar10
  vmoe evaluate runs/seed0 --ensemble-with runs/seed1 runs/seed2
  vmoe evaluate runs/cifar10 --corruptions --severities 1 3 5
  vmoe evaluate runs/cifar10 --data npz --root cifar10.1.npz --json shifted.json
"""

import argparse
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from vmoe.cli.common import job
from vmoe.cli.inputs import (
    DATA_OPTIONS,
    add_data_options,
    halving_batches,
    load_data,
    matched,
)
from vmoe.cli.options import capacity_factor, choose_device, count, new_parser
from vmoe.cli.progress import Tracked, working
from vmoe.errors import UserError
from vmoe.extras import MissingExtraError, require_extras

if TYPE_CHECKING:
    from vmoe.checkpoints import TrainedModel
    from vmoe.data import ImageDataModule
    from vmoe.evaluation.metrics import Evaluation

_PROBES = ("knn", "linear", "few-shot")
_SHOTS, _SHOT_SEEDS = 10, 5


@job(DATA_OPTIONS | {"capacity_factor": "--capacity-factor", "top_k": "--top-k"})
def main(argv: list[str]) -> None:
    """Runs the job."""
    options = _evaluate_parser().parse_args(argv)
    _check_dependent_options(options)
    halving_batches(lambda: _measure(options), options)


def _measure(options: argparse.Namespace) -> None:
    # Imported here, so that --help and a mistyped option answer at once.
    from vmoe.checkpoints import load_checkpoint, require_single_label
    from vmoe.checkpoints.source import is_remote
    from vmoe.classes import known_outputs
    from vmoe.cli.evaluate_tables import corruption_table, probe_table, result_tables, setting
    from vmoe.evaluation.evaluate import classes_differ, measure_split
    from vmoe.evaluation.guidance import require_guidance
    from vmoe.files import require_no_folder, require_writable, write_json

    corruptions = _chosen_corruptions(options.corruptions)
    device = choose_device(options.device)
    checkpoint = load_checkpoint(options.checkpoint, device)
    out = options.out or (Path() if is_remote(options.checkpoint) else _own_folder(checkpoint.path))
    json_file = options.json or out / "evaluation.json"
    require_no_folder(json_file)
    require_writable(out, json_file.parent)
    if options.oracle_router:
        require_guidance(checkpoint, "--oracle-router")
    if options.probe:
        require_single_label(checkpoint, "--probe")
    others = [load_checkpoint(path, device) for path in options.ensemble_with]
    if others:
        checkpoint = _ensemble(checkpoint, others)
    data = load_data(checkpoint, options)
    _require_one_depth(checkpoint, others, data, options.split)
    own_classes = True
    if options.probe and options.classes == "by-name":  # features work for other classes too
        own_classes = known_outputs(checkpoint.class_names, data.class_names) is not None
    if own_classes:
        checkpoint = matched(checkpoint, data, options.classes)
    if "linear" in options.probe and not data.has_validation:
        raise UserError(
            "--probe linear: chooses its penalty on the val split, which data.val_fraction=0 left empty; leave it out"
        )
    loader = data.val_dataloader() if options.split == "val" else data.test_dataloader()
    what = f"{options.split} set of {data.config.name}"
    results = []
    if own_classes:
        sweep = (options.capacity_factor, options.top_k, device)
        results = measure_split(checkpoint, data, options.split, *sweep, Tracked, options.oracle_router)
    else:
        _check_that_only_features_are_asked_for(options, classes_differ(checkpoint, data))
    report = _report(checkpoint, data, options.split, device)
    report |= {
        "ensemble_with": list(map(str, options.ensemble_with)),
        "results": [result.as_dict() for result in results],
    }

    console = Console()
    for table in result_tables(results, f"{checkpoint.path} · {what}", checkpoint.class_names):
        console.print(table)
    if options.probe:
        with working("probing the features"):
            report["probes"] = _probe(checkpoint, data, loader, device, options)
        console.print(probe_table(report["probes"], what))
    if corruptions:
        report["corruptions"] = _corrupt(checkpoint, data, device, options, corruptions)
        console.print(corruption_table(report["corruptions"]))
    write_json(json_file, report)
    by_name = {f"-{setting(each, results)}" if len(results) > 1 else "": each for each in results}
    written = _draw(by_name, checkpoint, what, out)
    if not results:
        written = ": features alone, the classifier knows other classes"
    print(f"{json_file}{written}")


def _draw(results: "dict[str, Evaluation]", checkpoint: "TrainedModel", what: str, out: Path) -> str:
    """Draws the results, and returns the file names to print after the JSON file's."""
    try:
        require_extras("analysis")
    except MissingExtraError as error:
        return f"; the confusion matrix is not drawn: {error}"
    from vmoe.evaluation.confusion import draw_confusion
    from vmoe.evaluation.precision_recall import draw_precision_recall

    drawn = set()
    for end, result in results.items():
        facts = (result, checkpoint.class_names, what, str(checkpoint.path))
        if getattr(result, "confusion", None) is not None:
            draw_confusion(*facts).save(out / f"confusion{end}.png")
            drawn.add("confusion matrix")
        if result.auroc is not None:
            draw_precision_recall(*facts).save(out / f"precision_recall{end}.png")
            drawn.add("precision over recall")
    why = "" if "confusion matrix" in drawn or checkpoint.multi_label else "; too many classes for a confusion matrix"
    return (f" and the {' and '.join(sorted(drawn))} in {out}" if drawn else "") + why


def _evaluate_parser() -> argparse.ArgumentParser:
    parser = new_parser("evaluate", __doc__)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="a .ckpt file, or a run's folder (its best checkpoint)")
    line = "measure the ensemble of CKPT and these: the mean of their class probabilities"
    add("--ensemble-with", nargs="+", default=[], metavar="CKPT", help=line)
    add("--split", choices=("test", "val"), default="test", help="which part (default: test)")
    line = "measure at each of these; inf drops nothing (default: the checkpoint's own)"
    add("--capacity-factor", nargs="+", type=capacity_factor, metavar="F", help=line)
    line = "measure with each token sent to so many experts (default: the checkpoint's own)"
    add("--top-k", nargs="+", type=count, metavar="K", help=line)
    line = "of a guided router of images, measure also the accuracy if the router were always right"
    add("--oracle-router", action="store_true", help=line)
    line = "read classes off frozen features: k nearest neighbours, logistic regression, ridge regression on few images"
    add("--probe", nargs="+", choices=_PROBES, default=[], help=line)
    add("--shots", type=count, metavar="N", help=f"few-shot: training images per class (default: {_SHOTS})")
    line = f"few-shot: how many random choices of them (default: {_SHOT_SEEDS})"
    add("--shot-seeds", type=count, metavar="N", help=line)
    line = "measure on corrupted images (ImageNet-C's corruptions; no name takes all)"
    add("--corruptions", nargs="*", metavar="NAME", help=line)
    line = "of the corruptions, 1 to 5 (default: all)"
    add("--severities", nargs="+", type=int, choices=range(1, 6), metavar="S", help=line)
    add_data_options(parser)
    add("--json", type=Path, metavar="FILE", help="where the numbers go")
    add("--out", type=Path, metavar="DIR", help="where the pictures go, and the numbers without --json")
    return parser


def _ensemble(first: "TrainedModel", others: "list[TrainedModel]") -> "TrainedModel":
    """The first checkpoint, with an ensemble of all models instead of its own.

    Raises:
        UserError: They need different images or know different classes.
    """
    from vmoe.classes import same_outputs, with_outputs
    from vmoe.evaluation.ensemble import Ensemble

    members = [first.model]
    for other in others:
        if other.multi_label != first.multi_label:
            raise UserError(
                f"--ensemble-with {other.path}: one of it and {first.path} knows several classes per image, the other "
                "one; leave it out"
            )
        for name in ("image_size", "crop", "channels", "mean", "std"):
            if getattr(other, name) != getattr(first, name):
                raise UserError(f"--ensemble-with {other.path}: has other {name.replace('_', ' ')} than {first.path}")
        outputs = same_outputs(other.class_names, first.class_names)
        if outputs is None:
            raise UserError(f"--ensemble-with {other.path}: has other class names than {first.path}")
        members.append(with_outputs(other.model, outputs))
    return first.with_facts_for(Ensemble(members, first.multi_label).eval())


def _require_one_depth(
    first: "TrainedModel", others: "list[TrainedModel]", data: "ImageDataModule", split: str
) -> None:
    """Refuses models of other bit depths if they matter, since all models get the same pixels.

    Raises:
        UserError: Files of the split have more than 8 bits per channel.
    """
    other = next((each for each in others if each.bit_depth != first.bit_depth), None)
    if other is None:
        return
    from vmoe.data.bit_depth import measure_bit_depth

    sets = data.image_sets()
    part = sets.get(split, sets["test"])
    if measure_bit_depth(part.images, part.positions) is not None:
        raise UserError(
            f"--ensemble-with {other.path}: reads these files of more than 8 bits by another bit depth than "
            f"{first.path}; leave it out"
        )


def _check_dependent_options(options: argparse.Namespace) -> None:
    if options.oracle_router and options.ensemble_with:
        raise UserError("--oracle-router: an ensemble has several routers; leave --ensemble-with out")
    if options.probe and options.ensemble_with:
        raise UserError("--probe: an ensemble has no features; leave --ensemble-with out")
    for option, value in (("--shots", options.shots), ("--shot-seeds", options.shot_seeds)):
        if value is not None and "few-shot" not in options.probe:
            raise UserError(f"{option}: has no effect without --probe few-shot; add that or leave it out")
    if "linear" in options.probe and options.split == "val":
        raise UserError("--probe linear: chooses its penalty on the val split; take --split test")
    if options.severities is not None and options.corruptions is None:
        raise UserError("--severities: has no effect without --corruptions; add that or leave it out")


def _check_that_only_features_are_asked_for(options: argparse.Namespace, difference: str) -> None:
    asked = {
        "--capacity-factor": options.capacity_factor, "--top-k": options.top_k, "--corruptions": options.corruptions,
    }  # fmt: skip
    for option, value in asked.items():
        if value is not None:
            raise UserError(f"{difference}; {option} needs its own classes, leave it out")


def _chosen_corruptions(names: list[str] | None) -> list[str]:
    """The corruptions of `--corruptions`: all if it names none, none without the option."""
    if names is None:
        return []
    from vmoe.data.config import nearest
    from vmoe.data.corruptions import CORRUPTIONS

    for name in names:
        if name == "frost":
            raise UserError("--corruptions frost: overlays photographs of frost, which are not here; leave it out")
        if name not in CORRUPTIONS:
            hint = nearest(name, CORRUPTIONS) or f"they are {', '.join(CORRUPTIONS)}"
            raise UserError(f"--corruptions {name}: there is no such corruption; {hint}")
    return list(dict.fromkeys(names)) or list(CORRUPTIONS)


def _own_folder(path: Path) -> Path:
    """The run's folder of a checkpoint, or else the file's folder."""
    from vmoe.checkpoints.run_folder import RunFolder

    folder = RunFolder.around(path)
    return path.parent if folder is None else folder.path


def _probe(checkpoint, data, loader, device, options: argparse.Namespace) -> dict:
    """Predicts classes from frozen features, with probes trained on all training images prepared as in evaluation."""
    from vmoe.evaluation import features

    num_classes = data.num_classes
    batches = Tracked(data.train_eval_dataloader(most=None), f"features of the training set of {data.config.name}")
    train = features.extract_features(checkpoint.model, batches, device)
    test = features.extract_features(checkpoint.model, Tracked(loader, f"features of the {options.split} set"), device)
    sets = (train, test, num_classes)
    report = {"train_images": len(train.labels), "test_images": len(test.labels), "features": train.vectors.shape[1]}
    if "knn" in options.probe:
        how = {"neighbours": features.KNN_NEIGHBOURS, "temperature": features.KNN_TEMPERATURE}
        report["knn"] = {"top1": features.knn_accuracy(*sets, **how), **how}
    if "linear" in options.probe:
        batches = Tracked(data.val_dataloader(), "features of the val split")
        val = features.extract_features(checkpoint.model, batches, device)
        top1, l2 = features.linear_accuracy(train, val, test, num_classes)
        report["linear"] = {"top1": top1, "l2": l2}
    if "few-shot" in options.probe:
        shots, seeds = options.shots or _SHOTS, list(range(options.shot_seeds or _SHOT_SEEDS))
        each = features.few_shot_accuracies(*sets, shots, seeds)
        report["few_shot"] = {
            "shots": shots,
            "l2": features.RIDGE_L2,
            "seeds": seeds,
            "top1_each": each,
            "top1_mean": statistics.fmean(each),
            "top1_sd": statistics.stdev(each) if len(each) > 1 else None,
        }
    return report


def _corrupt(checkpoint, data, device, options: argparse.Namespace, names: list[str]) -> dict:
    """Top-1 (with several classes per image mAP) for each corruption and severity, and the mean.

    K and capacity are the checkpoint's own.
    """
    from vmoe.data.corruptions import SEVERITIES
    from vmoe.evaluation.engine import measure_batches

    severities = sorted(set(options.severities or SEVERITIES))
    field = "average_precision" if checkpoint.multi_label else "top1"
    found = {name: {} for name in names}
    for name in names:
        for severity in severities:
            loader = data.corrupted_dataloader(options.split, name, severity)
            batches = Tracked(loader, f"{name}, severity {severity}")
            result = measure_batches(checkpoint.model, batches, len(checkpoint.class_names), device)
            found[name][str(severity)] = getattr(result, field)
    mean = statistics.fmean(value for of_name in found.values() for value in of_name.values())
    return {"seed": data.config.split_seed, "severities": severities, field: found, f"mean_{field}": mean}


def _report(checkpoint, data, split: str, device) -> dict:
    from vmoe.training.run.summary import device_name
    from vmoe.version import versions

    return {
        "checkpoint": str(checkpoint.path),
        "epoch": checkpoint.epoch,
        "data": {"name": data.config.name, "root": data.config.root, "split": split},
        "class_names": checkpoint.class_names,
        "device": device_name(device),
        "versions": versions(),
    }
