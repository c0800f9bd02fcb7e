"""\
Drops experts of a V-MoE until N per layer are left, or merges similar ones into N, and measures the cost: accuracy on
the test images before and after, and on request after a short fine-tuning.

The importance of experts is measured on training images: routed-mass is the mean combine weight of an expert,
activation-norm the mean norm of its weighted output. With --merge the most important experts are heads of groups, each
other expert joins the head with the most similar router scores, hidden units are aligned, and weights are averaged by
routed mass.

Writes DIR/model.safetensors, which every tool opens, and DIR/prune.json. With --finetune, DIR/finetune is an ordinary
run that starts from it: the checkpoint's own recipe at a tenth of its learning rates, without warm-up, uncompiled.
Options after -- go to that run as options of `vmoe train`.

With --keep-classes only images of these classes are measured, and the experts that they use stay, the same number in
each layer. The logits of an image that needs no other expert do not change; the result has the number of such test
images. It is for models that route whole images (moe.route=image).

  vmoe prune runs/cifar10 --keep 4 --out runs/cifar10_of4
  vmoe prune runs/cifar10 --keep 2 --merge --finetune 1 --out runs/cifar10_merged -- --optim.lr 1e-4
  vmoe prune runs/by_image --keep-classes cat,dog --out runs/cats_and_dogs
"""

import argparse
import shlex
from collections.abc import Iterable, Iterator
from operator import length_hint
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from vmoe.cli.common import job
from vmoe.cli.inputs import DATA_OPTIONS, add_data_options, load_data, matched
from vmoe.cli.options import choose_device, count, new_parser, split_options
from vmoe.cli.progress import Tracked
from vmoe.errors import UserError
from vmoe.text import counted

if TYPE_CHECKING:
    import torch

    from vmoe.checkpoints import TrainedModel
    from vmoe.compress.pruning import Groups
    from vmoe.compress.usage import ExpertUse
    from vmoe.data import ImageDataModule
    from vmoe.training.config import TrainConfig

# The reported figure, by whether an image may have several classes: its title, and a run's metric
_FIGURES = {
    False: {"top1": ("top-1", "test/top1"), "nll": ("NLL", "test/loss")},
    True: {"average_precision": ("mAP", "test/mAP"), "bce": ("BCE", "test/loss")},
}


_ROUNDING = 1e-4  # of the largest logit: the rounding of products differs by this much between batches


@job(DATA_OPTIONS)
def main(argv: list[str]) -> int:
    """Runs the job."""
    own, for_training = split_options(argv)
    options = _prune_parser().parse_args(own)
    if for_training and options.finetune is None:
        raise UserError(f"{for_training[0]}: is for a fine-tuning, of which there is none; add --finetune EPOCHS")
    if options.out.exists():
        raise UserError(f"--out {options.out}: is there already; give another folder")
    if options.keep is None and options.keep_classes is None:
        raise UserError("--keep: is missing; give --keep N, or --keep-classes A,B,...")
    if options.keep_classes is not None and (options.merge or options.finetune is not None):
        other = "--merge" if options.merge else "--finetune"
        raise UserError(f"{other}: changes what --keep-classes leaves as it is; give one of them")
    # Imported here, so that --help and a mistyped option answer at once.
    from vmoe.checkpoints import RunFolder, load_checkpoint
    from vmoe.checkpoints.run_folder import metrics_of
    from vmoe.cli.train import trained
    from vmoe.compress.pruning import check_keeps_classes, check_prunable, groups_of_layers
    from vmoe.compress.usage import measure_use
    from vmoe.files import new_folder, write_json

    device = choose_device(options.device)
    checkpoint = load_checkpoint(options.checkpoint, device)
    try:
        if options.keep_classes is not None:
            given = f"--keep-classes {','.join(options.keep_classes)}"
            check_keeps_classes(checkpoint.model)
            check_prunable(checkpoint.model, keep=1)
        if options.keep is not None:
            given = f"--keep {options.keep}"
            check_prunable(checkpoint.model, options.keep)
    except ValueError as error:
        raise UserError(f"{given}: {checkpoint.path} {error}") from error
    data = load_data(checkpoint, options)
    before = matched(checkpoint, data, options.classes)
    config = None if options.finetune is None else _finetuning(options, checkpoint, data, device, for_training)
    classes = None if options.keep_classes is None else _indices(options.keep_classes, list(data.class_names))

    most = options.images or (2000 if classes is None else None)
    batches = Tracked(_OfClasses(data.train_eval_dataloader(most=most), classes), "use of the experts")
    use = measure_use(checkpoint.model, batches, device, with_norms=options.by == "activation-norm")
    if classes is not None:
        options.keep = _number_to_keep(checkpoint, use, options)
    groups = groups_of_layers(checkpoint.model, use, options.keep, options.by, options.merge)
    rows = {"before": _accuracy_of(before, data, device, classes)}
    with new_folder(options.out) as folder:
        _write_result(folder, checkpoint, groups, use, keeps_gates=classes is not None)
        after = matched(load_checkpoint(folder, device), data, options.classes, verbose=False)
        rows["after"] = _accuracy_of(after, data, device, classes)
        report = _prune_report(checkpoint, data, device, groups, use) | {
            "command": shlex.join(["vmoe", "prune", *argv])
        }
        if classes is not None:
            unchanged = _unchanged(before, after, _OfClasses(data.test_dataloader(), classes), device)
            report |= {"classes": [data.class_names[index] for index in classes], "unchanged": unchanged}
        write_json(folder / "prune.json", report | {"results": rows})
    if config is not None:
        code = trained(lambda: config, ["vmoe", "prune", *argv])
        if code:
            return code
        tested = metrics_of(RunFolder(Path(config.output_dir)).read_summary())
        figures = {name: tested[key] for name, (_, key) in _FIGURES[checkpoint.multi_label].items()}
        rows["fine-tuned"] = rows["after"] | figures
        write_json(options.out / "prune.json", report | {"results": rows})
    how = f"{'merged' if options.merge else 'kept'} by {options.by}"
    if classes is not None:
        how += f", of images of {counted(len(classes), 'class', 'classes')}"
    print(f"{checkpoint.path}, {counted(options.keep, 'expert')} per layer {how}")
    Console().print(_prune_table(rows, checkpoint.multi_label))
    if classes is not None:
        _print_unchanged(report, groups)
    print(f"{RunFolder(options.out).shared} and prune.json beside it")
    return 0


def _prune_parser() -> argparse.ArgumentParser:
    parser = new_parser("prune", __doc__)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="a checkpoint file, or a run's folder (its best checkpoint)")
    line = "experts that each layer keeps, below what it has (default with --keep-classes: all that they use)"
    add("--keep", type=count, metavar="N", help=line)
    add("--keep-classes", nargs="+", metavar="A,B,...", help="keep the experts of these classes, by name")
    add("--out", type=Path, required=True, metavar="DIR", help="a new folder for the result")
    line = "what makes an expert matter (default: %(default)s)"
    add("--by", choices=("routed-mass", "activation-norm"), default="routed-mass", help=line)
    add("--merge", action="store_true", help="merge the others into those kept, instead of dropping them")
    line = "training images on which the use of the experts is measured (default: 2000; all with --keep-classes)"
    add("--images", type=count, metavar="N", help=line)
    add("--finetune", type=count, metavar="EPOCHS", help="train the result for so many epochs")
    add_data_options(parser)
    return parser


def _finetuning(
    options: argparse.Namespace,
    checkpoint: "TrainedModel",
    data: "ImageDataModule",
    device: "torch.device",
    for_training: list[str],
) -> "TrainConfig":
    """The config of the short fine-tuning: the checkpoint's recipe with lower learning rates."""
    from vmoe.checkpoints import RunFolder
    from vmoe.cli.follow_up import follow_up

    own = checkpoint.config["optim"]
    rates = {name: own[name] / 10 for name in ("lr", "adamw_lr", "min_lr") if own.get(name) is not None}
    changes = {
        "output_dir": str(options.out / "finetune"),
        "init_from": str(RunFolder(options.out).shared),
        "moe": _fewer(checkpoint, options.keep),
        "optim": {**own, **rates, "warmup_epochs": 0.0},
        "trainer": {"epochs": options.finetune, "device": device.type},
    }
    return follow_up(checkpoint, data.config, changes, for_training)


def _fewer(checkpoint: "TrainedModel", keep: int, keeps_gates: bool = False) -> dict[str, Any]:
    """The moe section of the result."""
    from vmoe.compress.pruning import regrouped_config
    from vmoe.config_values import to_plain
    from vmoe.moe import MoeConfig

    return to_plain(regrouped_config(MoeConfig(**checkpoint.config["moe"]), keep, keeps_gates))


def _write_result(
    out: Path,
    checkpoint: "TrainedModel",
    groups: "dict[str, Groups]",
    use: "dict[str, ExpertUse]",
    keeps_gates: bool,
) -> None:
    from vmoe.checkpoints import RunFolder, write_changed
    from vmoe.compress.pruning import regrouped_weights

    weights = regrouped_weights(checkpoint.model, groups, use, keeps_gates)
    moe = _fewer(checkpoint, len(next(iter(groups.values()))), keeps_gates)
    write_changed(RunFolder(out).shared, checkpoint.path, weights, moe)


def _accuracy_of(
    checkpoint: "TrainedModel", data: "ImageDataModule", device: "torch.device", classes: list[int] | None
) -> dict[str, Any]:
    """A checkpoint's figures on the test images (or those of some classes), and its parameters."""
    from vmoe.evaluation.engine import measure_batches
    from vmoe.models.cost import count_parameters

    batches = Tracked(_OfClasses(data.test_dataloader(), classes), f"test set of {data.config.name}")
    result = measure_batches(checkpoint.model, batches, len(checkpoint.class_names), device)
    parameters = count_parameters(checkpoint.model)._asdict()
    figures = {name: getattr(result, name) for name in _FIGURES[checkpoint.multi_label]}
    return {"images": result.images, **figures, "parameters": parameters}


class _OfClasses:
    """Batches with only the images of some classes; None keeps all."""

    def __init__(self, batches: Iterable, classes: list[int] | None) -> None:
        self._batches, self._classes = batches, classes

    def __length_hint__(self) -> int:
        return length_hint(self._batches)

    def __iter__(self) -> Iterator:
        import torch

        if self._classes is None:
            yield from self._batches
            return
        for images, labels, *_ in self._batches:
            wanted = torch.tensor(self._classes, device=labels.device)
            is_wanted = torch.isin(labels, wanted) if labels.dim() == 1 else labels[:, wanted].any(1)
            if is_wanted.any():
                yield images[is_wanted], labels[is_wanted]


def _indices(wanted: list[str], names: list[str]) -> list[int]:
    """The indices of the classes in --keep-classes, separated by spaces or commas."""
    parts = [name for given in wanted for name in ([given] if given in names else given.split(","))]
    chosen = [part if part in names else part.strip() for part in parts if part.strip()]
    known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    if not chosen:
        raise UserError(f"--keep-classes: names no class; the images have {known}")
    for name in chosen:
        if name not in names:
            raise UserError(f"--keep-classes: {name!r} is no class of the images, which are {known}")
    return sorted({names.index(name) for name in chosen})


def _number_to_keep(checkpoint: "TrainedModel", use: "dict[str, ExpertUse]", options: argparse.Namespace) -> int:
    """The number of experts per layer with --keep-classes: --keep, or all that images of these classes use."""
    from vmoe.compress.pruning import experts_in_use

    used, experts = experts_in_use(checkpoint.model, use), len(next(iter(use.values())).mass_E)
    given = f"--keep-classes {','.join(options.keep_classes)}"
    if used == 0 and options.images is not None:
        raise UserError(f"{given}: no image of them is among the {options.images:,} of --images; give more")
    if used == 0:
        raise UserError(f"{given}: there are no training images of them")
    if options.keep is None and used == experts:
        raise UserError(
            f"{given}: their images use every expert of a layer; give --keep N too, for the N that they use most"
        )
    return options.keep or used


def _unchanged(
    before: "TrainedModel", after: "TrainedModel", batches: Iterable, device: "torch.device"
) -> dict[str, Any]:
    """The number of images with unchanged logits, and the largest difference of these."""
    import torch

    images, same, largest = 0, 0, 0.0
    with torch.inference_mode():
        for pixels, *_ in batches:
            logits, others = (model.model(pixels.to(device)).float() for model in (before, after))
            difference = (logits - others).abs().amax(1)
            is_same = difference <= _ROUNDING * logits.abs().amax(1).clamp_min(1)
            images, same = images + len(pixels), same + int(is_same.sum())
            largest = max(largest, float(difference[is_same].max()) if is_same.any() else 0.0)
    return {"images": images, "same_logits": same, "largest_difference": largest}


def _print_unchanged(report: dict[str, Any], groups: "dict[str, Groups]") -> None:
    for name, of_layer in groups.items():
        print(f"{name} keeps {', '.join(str(expert) for expert, *_ in of_layer)}")
    found = report["unchanged"]
    print(
        f"the logits of {found['same_logits']:,} of {found['images']:,} test images of these classes are unchanged "
        f"(largest difference {found['largest_difference']:.1g})"
    )


def _prune_table(rows: dict[str, dict[str, Any]], multi_label: bool) -> Table:
    table = Table()
    (share, (title, _)), (loss, (loss_title, _)) = _FIGURES[multi_label].items()
    for column in ("", title, loss_title, "parameters", "active"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in rows.items():
        numbers = (f"{row['parameters'][kind]:,}" for kind in ("total", "active"))
        shown = "-" if row[share] is None else f"{row[share]:.2%}"
        table.add_row(name, shown, f"{row[loss]:.4f}", *numbers)
    return table


def _prune_report(
    checkpoint: "TrainedModel",
    data: "ImageDataModule",
    device: "torch.device",
    groups: "dict[str, Groups]",
    use: "dict[str, ExpertUse]",
) -> dict[str, Any]:
    from vmoe.training.run.summary import device_name
    from vmoe.version import versions

    layers = {
        name: {
            "groups": [list(group) for group in groups[name]],
            "routed_mass": each.mass_E.tolist(),
            "activation_norm": None if each.norm_E is None else each.norm_E.tolist(),
        }
        for name, each in use.items()
    }
    return {
        "checkpoint": str(checkpoint.path),
        "data": {"name": data.config.name, "root": data.config.root},
        "layers": layers,
        "device": device_name(device),
        "versions": versions(),
    }
